"""A worker of the toy model as a process of its own, to be killed: ``python working.py PORT``.

It prints the index of each step that it begins.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from dynacomm_async.errors import PeerError
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.transport import Address
from dynacomm_async.wire.grid import Grid
from dynacomm_async.worker import FixedPlan, Plans


def one_message(grid: Grid, estimator: Estimator) -> Plans:
    """Everything in one message from the first step on: a step changes nothing before it is over,
    so that whoever takes a lost worker's place can compute it."""
    return FixedPlan(Plan.from_cuts("one", len(grid.layers), [], []))


def work(port: int) -> int:
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("helpers", path)
    assert spec is not None
    assert spec.loader is not None
    helpers = sys.modules["helpers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    try:
        helpers.Toy().work(
            Address("127.0.0.1", port),
            at_step=lambda session, index: print(index, flush=True),
            plans=one_message,
        )
    except PeerError as error:
        return 3 if error.code == "run-full" else 4  # the place is not free yet
    return 0


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1])))
