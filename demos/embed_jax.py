"""JAX under the transport: layer by layer, so that transfers hide behind computing.

What it shows
    A function of flat parameters for each layer; ``jax.vjp`` gives each layer's backward pass as a
    function of its own. Between them the loop waits for parameters and hands gradients over, as any
    code can (see ``embed_numpy.py``, which explains more, and has the server's side written out).

Run it::

    python demos/embed_jax.py              # server and two workers as threads of this process

What to look for
    Workers and server end with the same parameters, bit for bit, and a loss near zero.

What it leaves out
    One jitted function for the whole step is faster where the network is: wait for every layer,
    call ``jax.value_and_grad``, hand every gradient over; transfers then overlap the other workers'
    work only. Without JAX it says so and ends.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    print("JAX is not installed: pip install jax; nothing to show without")
    sys.exit(0)

import dynacomm_async as dc
from dynacomm_async.testing import RunningServer

SIZES = (16, 64, 64, 4)
SHAPES = {f"dense{i}": shape for i, shape in enumerate(pairwise(SIZES), start=1)}
LAYERS = {layer: (m + 1) * n for layer, (m, n) in SHAPES.items()}
WORKERS, BATCH = 2, 32


@partial(jax.jit, static_argnums=0)
def apply(layer: str, flat: jax.Array, x: jax.Array) -> jax.Array:
    """Return a layer's output: weights (m, n), then n biases; all but the last end in tanh."""
    m, n = SHAPES[layer]
    z = x @ flat[: m * n].reshape(m, n) + flat[m * n :]
    return z if layer == list(LAYERS)[-1] else jnp.tanh(z)


@jax.jit
def loss_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of a softmax."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def make_batch(step: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """Return images and labels: a function of the step, since a step's index may repeat."""
    numbers = np.random.default_rng((step, rank))
    labels = numbers.integers(0, SIZES[-1], BATCH)
    centres = np.random.default_rng(0).standard_normal((SIZES[-1], SIZES[0]))
    images = centres[labels] + 0.3 * numbers.standard_normal((BATCH, SIZES[0]))
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels)


def work(address: dc.Address) -> NDArray[np.float32]:
    """Train until the run ends; return the final parameters."""
    with dc.Session(address, layers=LAYERS) as session:
        for step in session.steps():
            x, labels = make_batch(step.index, session.slot)
            pullbacks = []
            for layer in LAYERS:
                flat = jnp.array(step.parameters(layer))  # a copy: what it views will change
                x, pullback = jax.vjp(partial(apply, layer), flat, x)
                pullbacks.append(pullback)
            loss, dx = jax.value_and_grad(loss_of)(x, labels)
            step.report(float(loss), BATCH)
            for layer, pullback in zip(reversed(LAYERS), reversed(pullbacks), strict=True):
                dflat, dx = pullback(dx)
                session.gradients[session.slice_of(layer)] = dflat
                step.gradient_ready(layer)  # returns at once
        return session.parameters.copy()


def initial_values() -> NDArray[np.float32]:
    """Return random weights and biases."""
    numbers = np.random.default_rng(0)
    parts = [numbers.standard_normal((m + 1) * n) / np.sqrt(m) for m, n in SHAPES.values()]
    return np.concatenate(parts).astype(np.float32)


def main() -> None:
    """Serve and work in one process."""
    parser = argparse.ArgumentParser(
        description="Train JAX code with a parameter server.",
        epilog="example: python demos/embed_jax.py --steps 50",
    )
    parser.add_argument("--steps", type=int, default=100, metavar="K", help="(default: 100)")
    args = parser.parse_args()
    training = dc.Training(dc.SGD(0.9), dc.Constant(0.05))
    options = {"steps": args.steps, "initial": initial_values(), "training": training}
    with (
        RunningServer(LAYERS, workers=WORKERS, **options) as server,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        workers = [pool.submit(work, server.address) for _ in range(WORKERS)]
        result = server.result(timeout_s=60)
        found = [dc.parameters_sha256(worker.result())[:16] for worker in workers]
    print(f"loss {result.losses[0]:.4f} at first, {result.losses[-1]:.4f} in the end")
    for rank, sha256 in enumerate(found):
        print(f"worker {rank}: parameters sha256 {sha256}")
    print(f"server: parameters sha256 {result.parameters_sha256[:16]}")
    if set(found) != {result.parameters_sha256[:16]}:
        sys.exit("the parameters are NOT the same everywhere; please report this as a bug")
    print("all hold the same parameters, bit for bit")


if __name__ == "__main__":
    main()
