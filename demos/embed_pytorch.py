"""A PyTorch module trained over the parameter server, by five added lines.

What it shows
    An ordinary module (convolutions, batch normalisation, a dense layer) and an ordinary loop.
    ``work`` marks the lines that are new; what is gone is the optimizer, since the server has the
    update rule. The order of the layers is learnt from a sample; hooks wait for what a module needs
    right before it is called, and hand each gradient over when backward has made it.

Run it::

    python demos/embed_pytorch.py              # server and two workers on this machine
    python demos/embed_pytorch.py --steps 300

or each part by hand, in three terminals (or on three machines, with ``--address`` of the first
and ``--insecure`` there, since nothing is authenticated)::

    python demos/embed_pytorch.py --role server
    python demos/embed_pytorch.py --role worker
    python demos/embed_pytorch.py --role worker

What to look for
    All workers and the server end with the same parameters, bit for bit (the hashes), and with the
    same running statistics, so that the test accuracy is the same too: about 0.98 on digits.

What it leaves out
    Other update rules (``dynacomm_async.Training``), gradient accumulation, frozen layers, float16,
    saving under way: see ``help(dynacomm_async.adapters.torch)``. Who starts which process is in
    ``_roles.py``, which knows nothing of PyTorch. Without PyTorch it says so and ends; without
    scikit-learn, which brings the digits, it trains on synthetic blobs instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch: one core computes, one talks

import numpy as np

try:
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy
except ImportError:
    print('PyTorch is not installed: pip install "dynacomm_async[torch]"; nothing to show without')
    sys.exit(0)

from _roles import play

import dynacomm_async as dc
from dynacomm_async.adapters.torch import TorchSession

BATCH = 32


# -- the module and the data ---------------------------------------------------------------------


def make_model() -> nn.Module:
    """Return a small network for 8x8 images of digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images (N, 1, 8, 8) and labels, then those held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        numbers = np.random.default_rng(0)
        targets = numbers.integers(0, 10, 1800)
        scans = numbers.standard_normal((10, 64))[targets] + numbers.standard_normal((1800, 64))
    else:
        digits = load_digits()
        scans, targets = digits.data / 16 - 0.3, digits.target
    images = torch.tensor(scans, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(targets, dtype=torch.long)
    held_out = torch.arange(len(images)) % 5 == 4
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def pick(n: int, step: int, rank: int, workers: int) -> Tensor:
    """Return this worker's samples: a function of the step, since a step's index may repeat.

    An iterator (a ``DataLoader``) would go on instead; seed it by the step, or index as here.
    """
    generator = torch.Generator().manual_seed(step)
    return torch.randperm(n, generator=generator)[: workers * BATCH][rank::workers]


# -- a worker ------------------------------------------------------------------------------------


def work(address: str) -> str:
    """Train until the run ends; return what came of it."""
    x_train, y_train, x_test, y_test = load_data()
    torch.manual_seed(0)
    model = make_model()
    with TorchSession(address, model, sample=x_train[:BATCH]) as session:  # new
        for step in session.steps():  # new
            batch = pick(len(x_train), step.index, session.slot, session.workers)  # new
            loss = cross_entropy(model(x_train[batch]), y_train[batch])
            step.report(loss, len(batch))  # new; optional
            loss.backward()
        rank = session.slot
    model.eval()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    values = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    sha256 = dc.parameters_sha256(values)
    return f"worker {rank}: test accuracy {accuracy:.3f}, parameters sha256 {sha256[:16]}"


# -- the server ----------------------------------------------------------------------------------


def make_server(*, steps: int, **options: Any) -> dc.ParameterServer:
    """Return a server to enter with ``async with``; it needs no PyTorch, and no model.

    The worker of rank 0 brings the layers and the initial values.
    """
    return dc.ParameterServer(
        None,
        steps=steps,
        training=dc.Training(dc.SGD(0.9), dc.Cosine(0.05, steps), weight_decay=1e-4),
        **options,
    )


def main() -> None:
    """Play one role, or all."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description="Train a PyTorch module with a parameter server.",
        epilog="example: python demos/embed_pytorch.py --workers 3 --steps 300",
    )
    play(parser, make_server, lambda args: work(args.address))


if __name__ == "__main__":
    main()
