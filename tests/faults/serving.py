"""A server as a process of its own, to be killed: ``python serving.py ARGUMENTS-AS-JSON``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from dynacomm_async.optim import SGD, StepDecay
from dynacomm_async.server import Applied, Checkpoints, Mode, ParameterServer, Training
from dynacomm_async.transport import Address, run
from dynacomm_async.wire.grid import LayerSpec

TRAINING = Training(SGD(0.9, nesterov=True), StepDecay(0.05, 4, 0.5), weight_decay=0.01)


class Log:
    """The updates of all lives, one line each; a checkpoint is a number of updates of cells."""

    def __init__(self, path: Path, checkpoints: Checkpoints) -> None:
        self._file = path.open("a", buffering=1)
        state = checkpoints.load()
        n = 0 if state is None or state.versions is None else int(state.versions.sum())
        self._file.write(json.dumps({"begins_with": n}) + "\n")

    def add(self, applied: Applied) -> None:
        step, cells, slots, _ = applied
        self._file.write(json.dumps([step, *cells, *slots, time.monotonic_ns()]) + "\n")


async def serve(told: dict) -> None:
    folder = Path(told["folder"])
    initial = np.load(folder / "initial.npz")
    staleness = told.get("staleness")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        log = Log(folder / "log", checkpoints) if staleness is not None else None
        async with ParameterServer(
            [LayerSpec(*row) for row in told["layers"]],
            workers=told["workers"],
            steps=told["steps"],
            training=TRAINING,
            initial=initial["parameters"],
            initial_statistics=initial["statistics"],
            run="killed",
            listen=Address(told.get("host", "127.0.0.1"), told["port"]),
            insecure="host" in told,
            checkpoints=checkpoints,
            checkpoint_every=told["every"],
            resume=True,
            heartbeat_s=told.get("heartbeat_s", 15.0),
            mode=Mode(staleness=None if staleness is None else float(staleness)),
            on_applied=None if log is None else log.add,
            on_step=lambda record: print(record.index, flush=True),
        ) as server:
            print("listening", server.address.port, flush=True)
            result = await server.finished()
    np.savez(folder / "result.npz", parameters=result.parameters, statistics=result.statistics)


if __name__ == "__main__":
    run(serve(json.loads(sys.argv[1])))
