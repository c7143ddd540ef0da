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
    Evaluation while training, and checkpoints. Who starts which process is in ``_roles.py``, which
    knows nothing of NumPy. Without scikit-learn, which brings the digits, it trains on synthetic
    blobs instead.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from itertools import pairwise
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: one core computes, one talks

import numpy as np
from _roles import play
from numpy.typing import NDArray

import dynacomm_async as dc

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

SIZES = (64, 128, 64, 10)
LAYERS = {f"dense{i}": (m + 1) * n for i, (m, n) in enumerate(pairwise(SIZES), start=1)}
SHAPES = dict(zip(LAYERS, pairwise(SIZES), strict=True))
"""A layer's floats are an (m, n) weight matrix, then n biases."""

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
        for step in session.steps():
            batch = batch_indices(len(x_train), step.index, session.slot, session.workers)
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
        return describe(f"worker {session.slot}", session.parameters, x_test, y_test)


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


def make_server(*, steps: int, **options: Any) -> dc.ParameterServer:
    """Return a server to enter with ``async with``: ``result = await server.finished()``.

    The other options are ``workers``, ``listen`` and the like; ``_roles.py`` passes them on.
    """
    return dc.ParameterServer(
        LAYERS,
        steps=steps,
        initial=initial_values(),
        training=dc.Training(Signum(), dc.Cosine(0.003, steps, warmup=5)),
        **options,
    )


def main() -> None:
    """Play one role, or all."""
    parser = argparse.ArgumentParser(
        description="Train plain NumPy code with a parameter server.",
        epilog="example: python demos/embed_numpy.py --blocking --steps 300",
    )
    parser.add_argument("--blocking", action="store_true", help="workers do not use async")

    def be_worker(args: argparse.Namespace) -> str:
        return work_blocking(args.address) if args.blocking else asyncio.run(work(args.address))

    play(parser, make_server, be_worker)


if __name__ == "__main__":
    main()
