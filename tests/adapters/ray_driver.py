"""A program for test_ray.py: the driver of several runs on the Ray cluster at ADDRESS.

    python ray_driver.py ADDRESS FOLDER

Prints one line of JSON for each run: its name, how it ended, and the news that it told.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import ray

from dynacomm_async import SGD, ConfigError, Constant, ParameterServer, Plan, Session, Training
from dynacomm_async.adapters.ray import train
from dynacomm_async.worker import FixedPlan

LAYERS = {"front": 5000, "back": 9000}
STEPS, WORKERS, HALF_WAY = 12, 2, 5
LAYERWISE = FixedPlan(Plan.from_cuts("by hand", len(LAYERS), [1], [1]))


class Telling:
    """Momentum that leaves a file when it begins with the step in which a worker dies."""

    n_states = 1

    def __init__(self, told):
        self._told = told
        self._rule = SGD(0.9)

    def __repr__(self):
        return "Telling()"

    def update(self, *arrays, step, **options):
        self._rule.update(*arrays, step=step, **options)
        if step == HALF_WAY:
            self._told.touch()


def initial():
    return np.random.default_rng(5).standard_normal(sum(LAYERS.values())).astype(np.float32)


def gradient(parameters, slot, step):
    noise = np.random.default_rng((slot, step)).standard_normal(parameters.size)
    return parameters * np.float32(0.1) + noise.astype(np.float32)


def work(at_half, server):
    with Session(server, LAYERS, plans=lambda grid, estimator: LAYERWISE) as session:
        slot = session.welcome.slot
        for step in session.steps():
            step.wait("front")
            step.wait("back")
            session.gradients[:] = gradient(session.parameters, slot, step.index)
            step.gradient_ready("back")
            if step.index == HALF_WAY and slot == 1:
                at_half()
            step.gradient_ready("front")


def go_on():
    pass


def die_once_the_back_is_updated(folder):
    """The front of the step can never be, now: the back is a step ahead already."""
    if not (folder / "died").exists():
        while not (folder / "updated").exists():
            time.sleep(0.01)  # across processes there is nothing to wait for
        (folder / "died").touch()
        os._exit(1)


def die():
    os._exit(1)


def fail():
    raise ZeroDivisionError("nothing to divide by")


def make_nothing(**options):
    raise ConfigError("no server like that")


def run(name, folder, at_half=go_on, make_server=None, **options):
    news: list[str] = []
    steps: list[int] = []
    make_server = make_server or partial(
        ParameterServer,
        LAYERS,
        steps=STEPS,
        training=Training(Telling(folder / "updated"), Constant(0.05)),
        initial=initial(),
    )
    ended = {"run": name}
    try:
        result = train(
            make_server,
            partial(work, at_half),
            workers=WORKERS,
            checkpoint_dir=folder / name,
            insecure=True,
            on_news=lambda item: news.append(str(item)),
            on_step=lambda record: steps.append(record.index),
            **options,
        )
        ended["sha256"] = result.parameters_sha256
    except Exception as error:
        cause = type(error.__cause__).__mro__
        ended |= {"error": type(error).__name__, "text": str(error)}
        ended["remote"] = any(base.__name__ == "RayTaskError" for base in cause)
    print(json.dumps(ended | {"news": news, "steps": steps}), flush=True)


def main(address, folder):
    ray.init(address=address, log_to_driver=False, logging_level="error")
    run("half-way", folder, partial(die_once_the_back_is_updated, folder))
    run("too-often", folder, die, restarts=0)
    run("failing", folder, fail)
    run("no-server", folder, make_server=make_nothing)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
