"""A worker of the toy model as a process of its own: ``python working.py HOST:PORT [JSON]``.

It prints the index of each step that it begins. The JSON says what it does differently:
``layers``, the model; ``idle_at``, the step in which it stops to compute and only listens;
``retry_s``; ``again``, to join anew each time that its membership has passed to another.
"""

from __future__ import annotations

import importlib.util
import json
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

    def begin(session, index):
        print(index, flush=True)
        if index == told.get("idle_at"):
            threading.Event().wait()

    while True:
        try:
            toy.work(
                parse_address(address),
                at_step=begin,
                plans=one_message,
                retry_s=told.get("retry_s", 10.0),
            )
        except DynaCommError as error:
            code = error.code if isinstance(error, PeerError) else type(error).__name__
            if code in told.get("again", ()):
                print(code, flush=True)
                continue
            if code == "run-full":  # the place is not free yet
                return 3
            print(f"{code}: {error}", file=sys.stderr)
            return 4
        return 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}))
