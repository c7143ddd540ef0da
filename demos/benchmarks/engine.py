"""The engine beside PyTorch: training steps of whole networks, and layers by kind.

Run it::

    python demos/benchmarks/engine.py            # five minutes, on an idle machine
    python demos/benchmarks/engine.py --quick    # whether it runs, no figures
    python demos/benchmarks/engine.py --only networks --threads 1
    python demos/benchmarks/engine.py --json

A step is forward and backward of the mean cross-entropy of one batch of 32 images (MobileNetV2:
8 images of 96x96), without the update. Both take turns in one process, a step of the one, then a
step of the other; times are medians, the ratio is ours over PyTorch's: below 1 the engine is
faster. PyTorch is used as most do, eager on contiguous (N, C, H, W); *channels last* beside it.

Each setting is a process of its own, since BLAS chooses its kernels when it is loaded: once as it
likes, and once with ``OPENBLAS_CORETYPE=Haswell``, where that makes a difference. With two threads
the engine may cut the batch into two shards, where its rule says that it pays (the table says how
many it took), and BLAS stays at one thread each; PyTorch gets two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded

import numpy as np
from _machine import describe_machine, format_machine

from dynacomm_async import models
from dynacomm_async.nn import (
    BatchNorm,
    Conv2d,
    Definition,
    Dense,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    Network,
    Tanh,
)
from dynacomm_async.nn.crew import Crew
from dynacomm_async.nn.memory import Arenas, Memory

Call = Callable[[], object]

NETWORKS = {
    "lenet": ((28, 28, 1), 32),
    "vgg_small": ((32, 32, 3), 32),
    "resnet20": ((32, 32, 3), 32),
    "mobilenet_v2": ((96, 96, 3), 8),
}
TARGETS = {
    ("lenet", 1): 1.15,
    ("vgg_small", 1): 0.75,
    ("resnet20", 1): 1.5,
    ("mobilenet_v2", 1): 2.0,
    ("vgg_small", 2): 0.9,
    ("resnet20", 2): 2.0,
}
BUDGET_S = 4.0
"""Of measuring one row."""


def take_turns(calls: Sequence[Call], quick: bool) -> list[float]:
    """Run the calls in turns; return the median time of each in seconds."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + (0 if quick else BUDGET_S)
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 400):
        for taken, call in zip(times, calls, strict=True):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


def measure_network(name: str, threads: int, quick: bool) -> dict[str, Any]:
    """Measure training steps of one network."""
    import torch
    from _torch_nets import NETS

    shape, batch = NETWORKS[name]
    generator = np.random.default_rng(0)
    classes = 1000 if name == "mobilenet_v2" else 10
    network = models.build(name, input_shape=shape, classes=classes)
    engine = network.bind(batch, network.initialise(0), threads=threads)
    images = generator.standard_normal((batch, *shape), dtype=np.float32)
    labels = generator.integers(0, classes, batch)
    inputs, targets = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)

    def theirs(layout: Any) -> Call:
        module = NETS[name]().to(memory_format=layout)
        batch_in_layout = inputs.contiguous(memory_format=layout)

        def step() -> None:
            for parameter in module.parameters():
                parameter.grad = None
            torch.nn.functional.cross_entropy(module(batch_in_layout), targets).backward()

        return step

    calls = [
        lambda: engine.step(images, labels, draw=(0, 0, 0)),
        theirs(torch.contiguous_format),
        theirs(torch.channels_last),
    ]
    ours_s, torch_s, last_s = take_turns(calls, quick)
    return {
        "what": f"{name}, {engine.shards} shard(s)",
        "ours_s": ours_s,
        "torch_s": torch_s,
        "channels_last_s": last_s,
        "target": TARGETS.get((name, threads)),
        "held_bytes": engine.memory.total,
    }


def layer_rows() -> list[tuple[str, Definition, tuple[int, ...], bool, float]]:
    """Kind, layer, input shape, whether backward counts, and the target."""
    rows: list[tuple[str, Definition, tuple[int, ...], bool, float]] = [
        ("pool forward", MaxPool(2), (32, 32, 64), False, 0.2),
        ("pool forward", MaxPool(3, 2, padding=1), (32, 32, 64), False, 0.2),
        ("batch norm forward", BatchNorm(), (32, 32, 16), False, 0.6),
        ("batch norm forward", BatchNorm(), (16, 16, 128), False, 0.6),
        ("dense", Dense(120), (400,), True, 0.85),
        ("dense", Dense(1024), (1024,), True, 0.85),
        ("dense", Dense(512), (4096,), True, 0.85),
        ("blocked convolution", Conv2d(128, 3, 2, 1), (32, 32, 64), True, 1.25),
        ("blocked convolution", Conv2d(64, 5, 1, 2), (16, 16, 64), True, 1.25),
        ("blocked convolution", Conv2d(256, 1), (16, 16, 128), True, 1.25),
        ("Winograd convolution", Conv2d(64, 3, 1, 1), (32, 32, 64), True, 0.85),
        ("Winograd convolution", Conv2d(128, 3, 1, 1), (16, 16, 128), True, 0.85),
        ("Winograd convolution", Conv2d(256, 3, 1, 1), (8, 8, 256), True, 0.85),
    ]
    return rows


def describe_layer(layer: Any, shape: tuple[int, ...]) -> str:
    """Return what stands in the table for a layer."""
    extent = "x".join(map(str, shape))
    if isinstance(layer, Dense):
        return f"{extent} to {layer.features}"
    if isinstance(layer, Conv2d):
        return f"{extent} to {layer.channels}, {layer.kernel}x{layer.kernel} / {layer.stride}"
    if isinstance(layer, MaxPool):
        return f"{extent}, {layer.size}x{layer.size} / {layer.steps[0]}"
    return extent


def our_layer(layer: Any, shape: tuple[int, ...], batch: int, backward: bool) -> Call:
    """Return a call that runs one layer of the engine, planned in the middle of a network."""
    flat = len(shape) == 1
    front = [Flatten(), Dense(shape[0])] if flat else [Conv2d(shape[2], 1)]
    back = [Dense(4)] if flat else [GlobalAvgPool(), Dense(4)]
    parts = [*front, Tanh(), layer, Tanh(), *back]
    network = Network("one", parts, (1, 1, shape[0]) if flat else shape, 4)
    zeros = [np.zeros(n, np.float32) for n in (network.parameters, network.statistics)]
    arenas = Arenas(network.initialise(0), zeros[0], zeros[1], zeros[1].copy())
    memory = Memory(network.nodes, network.input, Crew(batch).members[0], arenas)
    operators = [node.layer.plan(node, memory) for node in network.nodes]
    place = next(i for i, node in enumerate(network.nodes) if node.layer is layer)
    node, operator = network.nodes[place], operators[place]
    generator = np.random.default_rng(0)
    for array in (memory.value(node.inputs[0]), memory.gradient(node.output)):
        array[...] = generator.standard_normal(array.shape)

    def call() -> None:
        operator.forward(True)
        if backward:
            operator.backward()

    return call


def their_layer(layer: Any, shape: tuple[int, ...], batch: int, backward: bool) -> Call:
    """Return a call that runs the same layer in PyTorch."""
    import torch
    from torch import nn

    module: nn.Module
    if isinstance(layer, Dense):
        module = nn.Linear(shape[0], layer.features)
    elif isinstance(layer, Conv2d):
        module = nn.Conv2d(shape[2], layer.channels, layer.window, layer.steps, layer.border())
    elif isinstance(layer, MaxPool):
        module = nn.MaxPool2d(layer.window, layer.steps, layer.before)
    else:
        module = nn.BatchNorm2d(shape[2])
    x = torch.randn(batch, *([shape[2], *shape[:2]] if len(shape) == 3 else shape))
    x.requires_grad_(backward)
    with torch.no_grad():
        gradient = torch.randn_like(module(x))

    def call() -> None:
        if not backward:
            with torch.no_grad():
                module(x)
            return
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        module(x).backward(gradient)

    return call


def measure_layers(quick: bool) -> list[dict[str, Any]]:
    """Measure single layers on one thread."""
    found = []
    for kind, layer, shape, backward, target in layer_rows():
        calls = [make(layer, shape, 32, backward) for make in (our_layer, their_layer)]
        ours_s, torch_s = take_turns(calls, quick)
        what = f"{kind}, {describe_layer(layer, shape)}"
        found.append({"what": what, "ours_s": ours_s, "torch_s": torch_s, "target": target})
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one setting, in this process."""
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    if args.only in (None, "networks"):
        rows += [measure_network(name, args.threads, args.quick) for name in NETWORKS]
    if args.only in (None, "layers") and args.threads == 1:
        rows += measure_layers(args.quick)
    return {"machine": {**describe_machine(), "torch": torch.__version__}, "rows": rows}


def run_setting(args: argparse.Namespace, threads: int, core: str | None) -> dict[str, Any]:
    """Measure one setting in a process of its own."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
    environment.pop("OPENBLAS_CORETYPE", None)
    if core is not None:
        environment["OPENBLAS_CORETYPE"] = core
    command = [sys.executable, __file__, "--here", "--threads", str(threads)]
    command += ["--only", args.only] if args.only else []
    command += ["--quick"] if args.quick else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {"threads": threads, "core_type": core, **found}


def print_setting(found: dict[str, Any]) -> None:
    """Print the table of one setting."""
    core = found["core_type"] or "chosen by BLAS"
    print(f"\n{found['threads']} thread(s), core type {core}; milliseconds")
    print(f"  {'':50}{'ours':>8}{'PyTorch':>9}{'ratio':>7}{'target':>8}   beside channels last")
    for row in found["rows"]:
        ratio = row["ours_s"] / row["torch_s"]
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        last = row.get("channels_last_s")
        beside = "" if last is None else f"   {row['ours_s'] / last:.2f}"
        times = f"{1e3 * row['ours_s']:8.2f}{1e3 * row['torch_s']:9.2f}"
        print(f"  {row['what']:50}{times}{ratio:7.2f}{target:>8}{beside}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="Measure the NumPy engine beside PyTorch.",
        epilog="example: python demos/benchmarks/engine.py --only networks --threads 1",
    )
    parser.add_argument("--threads", type=int, choices=(1, 2), help="(default: both)")
    parser.add_argument("--only", choices=("networks", "layers"), help="(default: both)")
    parser.add_argument("--core", choices=("own", "Haswell"), help="(default: both)")
    parser.add_argument("--quick", action="store_true", help="three turns of each")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        import torch  # noqa: F401
    except ImportError:
        print('PyTorch is not installed: pip install "dynacomm_async[torch]"; nothing to measure')
        sys.exit(0)
    if args.here:
        print(json.dumps(measure(args)))
        return
    cores = {"own": [None], "Haswell": ["Haswell"]}.get(args.core, [None, "Haswell"])
    settings = [(n, core) for core in cores for n in ([args.threads] if args.threads else [1, 2])]
    found = []
    for threads, core in settings:
        found.append(run_setting(args, threads, core))
        if not args.json:
            if len(found) == 1:
                machine = found[0]["machine"]
                print(f"{format_machine(machine)}, torch {machine['torch']}")
            print_setting(found[-1])
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
