"""Training a PyTorch module in threads over a real server, and the same in one process."""

from __future__ import annotations

import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server import Training

RANDOM = threading.Lock()
"""Held by whoever draws random numbers: PyTorch's generator is one for all threads."""

MODELS = Path(__file__).parents[2] / "demos" / "benchmarks" / "_torch_models.py"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def zoo():
    """The models of the benchmarks, by name."""
    return runpy.run_path(str(MODELS))


class Run:
    """A training run: what, on which batches, by which rule.

    Attributes:
        make: makes the module; the same each time.
        loss: from the module, a step's index and a rank to the loss.
        sample: for the order of layers, or None.
    """

    training = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)

    def __init__(self, make, loss, sample=None, steps=6):
        self.make, self.loss, self.sample, self.steps = make, loss, sample, steps

    def body(self, session, step):
        loss = self.loss(session.model, step.index, session.slot)
        step.report(loss, 1)
        loss.backward()

    def work(self, address, body=None, **options):
        from dynacomm_async.adapters.torch import TorchSession

        with RANDOM:
            session = TorchSession(address, self.make(), self.sample, **options)
        with session:
            for step in session.steps():
                (body or self.body)(session, step)
        return session

    def train(self, start_server, workers=2, body=None, **options):
        """Return the sessions of all workers, by rank, and the server's result."""
        server = start_server(None, workers=workers, steps=self.steps, training=self.training)
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(self.work, server.address, body, **options) for _ in range(workers)]
            sessions = sorted((job.result() for job in jobs), key=lambda s: s.slot)
        return sessions, server.result()

    def replay(self, workers, backward=None):
        """Train in one process, parameter by parameter; return its module.

        Each rank's sub-batch is computed by itself, gradients and batch statistics are added up in
        rank order.
        """
        import torch

        model = self.make()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        masters = {n: p.detach().float().numpy().copy() for n, p in named.items()}
        states = {n: np.zeros(value.size, np.float32) for n, value in masters.items()}
        norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
        running = [[b.float().numpy().copy() for b in buffers_of(m)] for m in norms]
        for norm in norms:
            norm.momentum = 1.0  # so that its buffers hold the batch's statistics
        rule, tenth = self.training.rule, np.float32(self.training.statistics_momentum)
        for step in range(self.steps):
            gradients, statistics = [], []
            for rank in range(workers):
                model.zero_grad()
                if backward is None:
                    self.loss(model, step, rank).backward()
                else:
                    backward(model, step, rank)
                gradients.append({n: gradient_of(p) for n, p in named.items()})
                statistics.append(
                    [[b.float().numpy().copy() for b in buffers_of(m)] for m in norms]
                )
            for name, value in masters.items():
                rule.update(
                    value.reshape(-1),
                    mean_in_rank_order([own[name].reshape(-1) for own in gradients]),
                    (states[name],),
                    step=step,
                    rate=self.training.rate.rate(step),
                    decay=self.training.weight_decay,
                )
                with torch.no_grad():
                    named[name].copy_(torch.from_numpy(value))
            for index in range(len(norms)):
                for which in range(2):
                    batch = mean_in_rank_order([own[index][which] for own in statistics])
                    value = running[index][which]
                    running[index][which] = value * (np.float32(1) - tenth) + batch * tenth
        for norm, values in zip(norms, running, strict=True):
            for buffer, value in zip(buffers_of(norm), values, strict=True):
                buffer.copy_(torch.from_numpy(value))
        return model


def buffers_of(norm):
    return norm.running_mean, norm.running_var


def gradient_of(parameter):
    import torch

    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().float().numpy().copy()


def mean_in_rank_order(parts):
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return total / np.float32(len(parts))


def differences(found, expected):
    """The names of parameters and running statistics whose bits differ."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    return [
        name
        for name in ours
        if not name.endswith("num_batches_tracked")
        and ours[name].float().numpy().tobytes() != theirs[name].float().numpy().tobytes()
    ]


@pytest.fixture(scope="session")
def make_run():
    return Run


@pytest.fixture
def check_same():
    """Check that all workers' modules have the bits of the other one."""

    def check(sessions, expected):
        for session in sessions:
            assert differences(session.model, expected) == []

    return check
