"""The examples in docstrings that people copy from run as they stand, but for the address."""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap
import threading

import numpy as np
import pytest

import dynacomm_async
from dynacomm_async import ParameterServer, Session, connect
from dynacomm_async.ranges import Range
from dynacomm_async.testing import (
    FakeClockLoop,
    FaultyLink,
    RunningServer,
    channels,
    clock,
    open_memory_pair,
    pass_time,
)
from dynacomm_async.wire.messages import Gradients

LAYERS = {"w": 10}
ADDRESS = '"127.0.0.1:7070"'


def example_of(documented):
    """The indented block behind ``Example::``."""
    _, _, text = inspect.getdoc(documented).partition("Example::\n\n")
    lines = []
    for line in text.splitlines():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    assert lines, f"{documented} has no example"
    return textwrap.dedent("\n".join(lines))


def run_code(code, **names):
    """Run it, top-level ``async with`` and all; return the names that it leaves."""
    compiled = compile(code, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    found = eval(compiled, names)
    if inspect.iscoroutine(found):
        asyncio.run(found)
    return names


def gradient_of(parameters):
    return parameters + 1


def train(address):
    with Session(address, LAYERS, initial=np.zeros(10, np.float32)) as session:
        for step in session.steps():
            step.wait("w")
            session.gradients[:] = gradient_of(session.parameters)
            step.gradient_ready("w")


def expected(steps):
    values = np.zeros(10, np.float32)
    for _ in range(steps):
        values = values - np.float32(0.01) * (values + np.float32(1))
    return values


@pytest.mark.parametrize(
    ("documented", "names"), [(Session, {"Session": Session}), (connect, {"connect": connect})]
)
def test_a_workers_example_trains(documented, names, start_server):
    code = example_of(documented)
    assert ADDRESS in code
    server = start_server(LAYERS, workers=1, steps=3, initial=np.zeros(10, np.float32))
    run_code(code.replace(ADDRESS, f'"{server.address}"'), gradient_of=gradient_of, **names)

    assert np.allclose(server.result().parameters, expected(3))


def test_the_servers_example_serves():
    workers = []

    def start_workers(text, address):
        assert text == "listening on"
        for _ in range(2):
            workers.append(threading.Thread(target=train, args=(address,)))
            workers[-1].start()

    found = run_code(
        example_of(ParameterServer), ParameterServer=ParameterServer, print=start_workers
    )
    for worker in workers:
        worker.join()

    assert found["result"].steps == 100
    assert np.allclose(found["result"].parameters, expected(100), atol=1e-5)


def test_the_running_servers_example_passes():
    zeros = np.zeros(10, np.float32)
    run_code(
        example_of(RunningServer), RunningServer=RunningServer, zeros=zeros, train_against=train
    )


def test_the_faulty_links_example_passes(start_server):
    # Nine thousand bytes must be more than nothing and less than the run.
    server = start_server({"w": 1000}, workers=1, steps=4, initial=np.zeros(1000, np.float32))

    def train_against(address):
        with Session(address) as session:
            for step in session.steps():
                step.wait("w")
                session.gradients[:] = 1
                step.gradient_ready("w")

    run_code(
        example_of(FaultyLink), FaultyLink=FaultyLink, server=server, train_against=train_against
    )
    assert server.result().steps == 4


def test_the_clocks_example_lets_a_minute_pass():
    due = []
    run_code(
        example_of(FakeClockLoop),
        asyncio=asyncio,
        FakeClockLoop=FakeClockLoop,
        pass_time=pass_time,
        limit_is_over=lambda: due.append(60),
    )
    assert due == [60]
    assert clock.__doc__


def test_the_channels_example_receives():
    found = run_code(
        example_of(channels), open_memory_pair=open_memory_pair, Gradients=Gradients, Range=Range
    )
    (payload,) = found["pair"].at_server.payloads
    assert payload == bytes(16_384)


@pytest.mark.peers
def test_the_pytorch_example_trains(start_server):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from dynacomm_async.adapters import torch as adapter

    code = example_of(adapter)
    assert ADDRESS in code
    server = start_server(None, workers=1, steps=3)

    def batch(index, slot, workers):
        assert (slot, workers) == (0, 1)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, 3, generator=generator), torch.tensor([0, 1, 0, 1])

    found = run_code(
        code.replace(ADDRESS, f'"{server.address}"'),
        TorchSession=adapter.TorchSession,
        make_model=lambda: torch.nn.Linear(3, 2),
        images=torch.zeros(1, 3),
        batch=batch,
        cross_entropy=torch.nn.functional.cross_entropy,
    )
    values = [parameter.detach().numpy().ravel() for parameter in found["model"].parameters()]
    assert np.concatenate(values).tobytes() == server.result().parameters.tobytes()


def test_every_public_name_is_documented():
    without = [
        name
        for name in dynacomm_async.__all__
        if callable(getattr(dynacomm_async, name))
        and not inspect.getdoc(getattr(dynacomm_async, name))
    ]
    assert without == []
