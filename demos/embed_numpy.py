"""The transport under your own NumPy code: a small network that knows nothing of our engine.

What it shows
    A classifier written out in plain NumPy, trained by two workers and a parameter server. The
    library is told the layers as names and sizes, and lends two flat arrays: parameters come in,
    gradients go out, layer by layer, while the code below computes. The server is embedded too,
    with initial values and an update rule of its own (``Signum``, a dozen lines).

Run it::

    python demos/embed_numpy.py              # server and two workers on this machine
    python demos/embed_numpy.py --blocking   # the same, without async and await

or each part by hand, in three terminals (or on three machines, with ``--address`` of the first
and ``--insecure`` there, since nothing is authenticated)::

    python demos/embed_numpy.py --role server
    python demos/embed_numpy.py --role worker
    python demos/embed_numpy.py --role worker

What to look for
    All workers and the server end with the same parameters, bit for bit (the hashes), and those
    classify about 95 in 100 digits that they have not seen. ``work`` and ``work_blocking`` are all
    that has to be added to a training loop; scheduling happens behind them.

What it leaves out
    Evaluation while training, more than one epoch order, and failures: a lost worker ends the run.
    Without scikit-learn, which brings the digits, it trains on synthetic blobs instead.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from itertools import pairwise

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: one core computes, one talks

import numpy as np
from numpy.typing import NDArray

import dynacomm_async as dc

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

SIZES = (64, 128, 64, 10)
LAYERS = {f"dense{i}": (m + 1) * n for i, (m, n) in enumerate(pairwise(SIZES), start=1)}
SHAPES = dict(zip(LAYERS, pairwise(SIZES), strict=True))
"""A layer's floats are an (m, n) weight matrix, then n biases."""

WORKERS = 2
BATCH = 32


# -- the network, in plain NumPy -----------------------------------------------------------------


def split(layer: str, flat: Floats) -> tuple[Floats, Floats]:
    """Return a layer's weights and biases as views of its floats."""
    m, n = SHAPES[layer]
    return flat[: m * n].reshape(m, n), flat[m * n :]


def forward(layer: str, flat: Floats, x: Floats) -> Floats:
    """Return the layer's output; all but the last layer end in a ReLU."""
    weights, bias = split(layer, flat)
    z = x @ weights + bias
    return z if layer == list(LAYERS)[-1] else np.maximum(z, 0)


def backward(layer: str, flat: Floats, x: Floats, dz: Floats, gradient: Floats) -> Floats:
    """Write the layer's gradient; return that of the layer before, through its ReLU."""
    weights, _ = split(layer, flat)
    dweights, dbias = split(layer, gradient)
    np.matmul(x.T, dz, out=dweights)
    np.sum(dz, axis=0, out=dbias)
    return (dz @ weights.T) * (x > 0)


def loss_and_gradient(logits: Floats, labels: Labels) -> tuple[float, Floats]:
    """Return the mean cross-entropy of a softmax, and its gradient."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    gradient = np.exp(log_p)
    gradient[rows, labels] -= 1
    return float(-log_p[rows, labels].mean()), gradient / np.float32(len(labels))


def initial_values(seed: int = 0) -> Floats:
    """Return random weights and zero biases, all layers one after another."""
    numbers = np.random.default_rng(seed)
    flat = np.zeros(sum(LAYERS.values()), np.float32)
    start = 0
    for layer, count in LAYERS.items():
        weights, _ = split(layer, flat[start : start + count])
        weights[:] = numbers.standard_normal(weights.shape) * np.sqrt(2 / len(weights))
        start += count
    return flat


# -- the data ------------------------------------------------------------------------------------


def load_data() -> tuple[Floats, Labels, Floats, Labels]:
    """Return training images and labels, then those held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        numbers = np.random.default_rng(0)
        labels = numbers.integers(0, 10, 1800)
        images = numbers.standard_normal((10, 64))[labels] + numbers.standard_normal((1800, 64))
    else:
        scans = load_digits()
        images, labels = scans.data / 16 - 0.3, scans.target
    x, y = images.astype(np.float32), labels.astype(np.int64)
    held_out = np.arange(len(x)) % 5 == 4
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def batch_indices(n: int, step: int, rank: int, workers: int) -> NDArray[np.int64]:
    """Return this worker's samples: a function of the step, since a step's index may repeat."""
    chosen = np.random.default_rng(step).permutation(n)[: workers * BATCH]
    return chosen[rank::workers]


# -- a worker ------------------------------------------------------------------------------------


async def work(address: str) -> str:
    """Train until the run ends; return what came of it."""
    x_train, y_train, x_test, y_test = load_data()
    async with dc.connect(address, layers=LAYERS) as session:
        async for step in session.steps():
            batch = batch_indices(len(x_train), step.index, session.slot, session.workers)
            inputs, x = [], x_train[batch]
            for layer in LAYERS:
                flat = await step.parameters(layer)  # waits only if they are not here yet
                inputs.append(x)
                x = forward(layer, flat, x)
            loss, dz = loss_and_gradient(x, y_train[batch])
            step.report(loss, len(batch))
            for layer in reversed(LAYERS):
                place = session.slice_of(layer)
                flat, gradient = session.parameters[place], session.gradients[place]
                dz = backward(layer, flat, inputs.pop(), dz, gradient)
                step.gradient_ready(layer)  # returns at once
        return describe(f"worker {session.slot}", session.parameters, x_test, y_test)


def work_blocking(address: str) -> str:
    """The same for code that does not await: ``wait`` blocks, and nothing else changes."""
    x_train, y_train, x_test, y_test = load_data()
    with dc.Session(address, layers=LAYERS) as session:
        rank, workers = session.welcome.slot, session.welcome.workers
        for step in session.steps():
            batch = batch_indices(len(x_train), step.index, rank, workers)
            inputs, x = [], x_train[batch]
            for layer in LAYERS:
                step.wait(layer)
                inputs.append(x)
                x = forward(layer, session.parameters[session.slice_of(layer)], x)
            loss, dz = loss_and_gradient(x, y_train[batch])
            step.report(loss, len(batch))
            for layer in reversed(LAYERS):
                place = session.slice_of(layer)
                flat, gradient = session.parameters[place], session.gradients[place]
                dz = backward(layer, flat, inputs.pop(), dz, gradient)
                step.gradient_ready(layer)
        return describe(f"worker {rank}", session.parameters, x_test, y_test)


def describe(who: str, parameters: Floats, images: Floats, labels: Labels) -> str:
    """Return a line with the accuracy on images not trained on, and the parameters' hash."""
    x, start = images, 0
    for layer, count in LAYERS.items():
        x = forward(layer, parameters[start : start + count], x)
        start += count
    accuracy = (x.argmax(axis=1) == labels).mean()
    sha256 = dc.parameters_sha256(parameters)
    return f"{who}: test accuracy {accuracy:.3f}, parameters sha256 {sha256[:16]}"


# -- the server ----------------------------------------------------------------------------------


class Signum:
    """Steps by the sign of the running mean of the gradient (arXiv 1802.04434).

    Any rule will do that works elementwise on ranges of the parameters: the server calls it range
    by range, in whatever order they complete. It keeps nothing itself; the server owns the states
    (here one float for each parameter, zero at first) and hands over the right part of them.
    """

    n_states = 1

    def update(
        self,
        parameters: Floats,
        gradient: Floats,
        states: tuple[Floats, ...],
        *,
        step: int,
        rate: float,
        decay: float,
    ) -> None:
        """Update one range in place."""
        (mean,) = states
        mean *= 0.9
        mean += 0.1 * gradient
        parameters -= rate * (np.sign(mean) + decay * parameters)


def make_server(args: argparse.Namespace, listen: dc.Address) -> dc.ParameterServer:
    """Return a server to enter with ``async with``."""

    def on_step(record: dc.StepRecord) -> None:
        if (record.index + 1) % 50 == 0:
            print(f"step {record.index + 1}: loss {record.loss:.4f}", flush=True)

    return dc.ParameterServer(
        LAYERS,
        workers=args.workers,
        steps=args.steps,
        initial=initial_values(),
        training=dc.Training(Signum(), dc.Cosine(0.003, args.steps, warmup=5)),
        listen=listen,
        insecure=args.insecure,
        on_step=on_step,
    )


async def serve(args: argparse.Namespace) -> None:
    """Serve one run."""
    host, _, port = args.address.rpartition(":")
    async with make_server(args, dc.Address(host, int(port))) as server:
        print(f"listening on {server.address}, waiting for {args.workers} workers", flush=True)
        result = await server.finished()
    print(f"server: parameters sha256 {result.parameters_sha256[:16]}")


async def do_all(args: argparse.Namespace) -> None:
    """Serve a run in this process, with the workers as processes of their own."""
    async with make_server(args, dc.Address("127.0.0.1", 0)) as server:
        command = [sys.executable, __file__, "--role", "worker", "--address", str(server.address)]
        if args.blocking:
            command.append("--blocking")
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(run_worker(command)) for _ in range(args.workers)]
            result = await server.finished()
    lines = sorted(worker.result() for worker in workers)
    print("\n".join(lines))
    print(f"server: parameters sha256 {result.parameters_sha256[:16]}")
    check_same([*hashes(lines), result.parameters_sha256[:16]])


class WorkerFailed(Exception):
    """A worker process ended before the run did; its own message is above."""


async def run_worker(command: list[str]) -> str:
    """Run a worker process and return what it prints; cancelled, end it at once.

    Raises:
        WorkerFailed: it did not end well.
    """
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise WorkerFailed(f"a worker ended with exit code {process.returncode}")
    return output.decode().strip()


def hashes(lines: list[str]) -> Iterator[str]:
    """Yield the last word of each line."""
    return (line.split()[-1] for line in lines)


def check_same(found: list[str]) -> None:
    """Say that all hashes are the same, or fail."""
    if len(set(found)) > 1:
        raise SystemExit("the parameters are NOT the same everywhere; please report this as a bug")
    print("all hold the same parameters, bit for bit")


def main() -> None:
    """Play one role, or all."""
    parser = argparse.ArgumentParser(
        description="Train plain NumPy code with a parameter server.",
        epilog="example: python demos/embed_numpy.py --blocking --steps 200",
    )
    parser.add_argument("--role", choices=["all", "server", "worker"], default="all")
    parser.add_argument(
        "--address",
        default="127.0.0.1:7070",
        metavar="HOST:PORT",
        help="where the server listens; for the roles server and worker (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N", help="(default: 2)")
    parser.add_argument("--steps", type=int, default=300, metavar="K", help="(default: 300)")
    parser.add_argument("--blocking", action="store_true", help="workers do not use async")
    parser.add_argument(
        "--insecure", action="store_true", help="let the server listen beyond this machine"
    )
    args = parser.parse_args()
    if args.role == "server":
        asyncio.run(serve(args))
    elif args.role == "all":
        asyncio.run(do_all(args))
    elif args.blocking:
        print(work_blocking(args.address))
    else:
        print(asyncio.run(work(args.address)))


if __name__ == "__main__":
    try:
        main()
    except* (dc.DynaCommError, WorkerFailed) as failed:
        sys.exit(f"error: {failed.exceptions[0]}")
    except* KeyboardInterrupt:
        sys.exit(130)
