"""A server that is killed comes back at a checkpoint; the loop computes those steps again."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from dynacomm_async.transport import Address

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

nn = torch.nn

pytestmark = [pytest.mark.peers, pytest.mark.slow]

STEPS, EVERY, KILLED_AFTER = 16, 4, 7

SERVER = f"""
import sys
import numpy as np
import dynacomm_async as dc
from dynacomm_async.server import Checkpoints
from dynacomm_async.transport import Address, run

async def main(folder, port):
    with Checkpoints(folder + "/checkpoints") as checkpoints:
        async with dc.ParameterServer(
            None,
            workers=2,
            steps={STEPS},
            training=dc.Training(dc.SGD(0.9), dc.Constant(0.05), weight_decay=0.01),
            run="killed",
            listen=Address("127.0.0.1", port),
            checkpoints=checkpoints,
            checkpoint_every={EVERY},
            resume=True,
            on_step=lambda record: print(record.index, flush=True),
        ) as server:
            print("listening", flush=True)
            result = await server.finished()
    np.savez(folder + "/result.npz", parameters=result.parameters)

run(main(sys.argv[1], int(sys.argv[2])))
"""


def normed():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def loss_of(model, step, rank):
    """Data of the step and the rank alone."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1000 * step + rank))
    return model(x).square().mean()


@contextmanager
def serving(folder, port):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder), str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "listening\n"
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_step_that_comes_again_repeats_its_batch_and_ends_with_the_same_bits(
    make_run, check_same, tmp_path
):
    drawing = threading.Lock()  # PyTorch's generator is one for all threads
    taken = {0: [], 1: []}

    def body(session, step):
        taken[session.slot].append(step.index)
        step.wait()  # not while the other waits for the lock
        with drawing:
            torch.manual_seed(100 * step.index + session.slot)  # for dropout
            loss = loss_of(session.model, step.index, session.slot)
        if step.abandoned:
            return  # whatever comes of it would count for nothing
        loss.backward()

    def backward(model, step, rank):
        torch.manual_seed(100 * step + rank)
        loss_of(model, step, rank).backward()

    run = make_run(normed, loss_of, torch.zeros(6, 5), steps=STEPS)
    port = free_port()
    address = Address("127.0.0.1", port)
    with ThreadPoolExecutor(2) as pool:
        with serving(tmp_path, port) as server:
            work = [pool.submit(run.work, address, body, retry_s=30.0) for _ in range(2)]
            while int(server.stdout.readline()) < KILLED_AFTER:
                pass
        with serving(tmp_path, port) as server:
            sessions = [worker.result() for worker in work]
            assert server.wait(30) == 0

    expected = run.replay(2, backward)
    check_same(sessions, expected)
    with np.load(tmp_path / "result.npz") as found:
        values = {name: p.detach().numpy() for name, p in expected.named_parameters()}
        assert found["parameters"].tobytes() == b"".join(v.tobytes() for v in values.values())
    for steps in taken.values():
        assert len(steps) > len(set(steps)) == STEPS  # some came again
