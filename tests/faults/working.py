"""A worker of the toy model as a process of its own: ``python working.py HOST:PORT [JSON]``.

It prints the index of each step that it begins. The JSON says what it does differently:
``layers``, the model; ``cuts``, between the layers, of its messages; ``idle_at``, the step in which
it stops to compute and only listens; ``retry_s``; ``again``, the codes of refusals after which it
joins anew; ``spoilt``, whether it computes nonsense from the moment on at which it is woken up
(SIGCONT) until it has joined anew.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import threading
from pathlib import Path

from dynacomm_async.errors import DynaCommError, PeerError
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.transport import parse_address
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.worker import FixedPlan, Plans


def one_message(grid: Grid, estimator: Estimator) -> Plans:
    """Everything in one message from the first step on: a step changes nothing before it is over,
    so that whoever takes a lost worker's place can compute it."""
    return FixedPlan(Plan.from_cuts("one", len(grid.layers), [], []))


def work(address: str, told: dict) -> int:
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("helpers", path)
    assert spec is not None
    assert spec.loader is not None
    helpers = sys.modules["helpers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    layers = told.get("layers")
    toy = helpers.Toy(*([] if layers is None else [tuple(LayerSpec(*row) for row in layers)]))

    spoilt = threading.Event()
    if told.get("spoilt"):
        signal.signal(signal.SIGCONT, lambda number, frame: spoilt.set())
        toy.noise = lambda slot, step: helpers.Toy.noise(toy, slot, step) + 1000 * spoilt.is_set()

    def plans(grid, estimator):
        if "cuts" in told:
            return FixedPlan(Plan.from_cuts("cut", len(grid.layers), told["cuts"], told["cuts"]))
        return one_message(grid, estimator)

    def begin(session, index):
        print(index, flush=True)
        if index == told.get("idle_at"):
            threading.Event().wait()

    while True:
        try:
            toy.work(
                parse_address(address),
                at_step=begin,
                plans=plans,
                retry_s=told.get("retry_s", 60.0),
            )
        except DynaCommError as error:
            code = error.code if isinstance(error, PeerError) else type(error).__name__
            if code in told.get("again", ()):
                spoilt.clear()
                if code == "run-full":
                    spoilt.wait(0.02)
                else:
                    print(code, flush=True)
                continue
            if code == "run-full":  # the place is not free yet
                return 3
            print(f"{code}: {error}", file=sys.stderr)
            return 4
        return 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}))
