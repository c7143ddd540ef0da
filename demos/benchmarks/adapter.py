"""What the PyTorch adapter costs beside the same step in plain PyTorch.

Run it::

    python demos/benchmarks/adapter.py            # two minutes, on an idle machine
    python demos/benchmarks/adapter.py --quick    # a narrow network: whether it runs, no figures
    python demos/benchmarks/adapter.py --json

ResNet-18 for 32x32 images, one worker, the server as a process of its own, loopback between them.
The worker's process takes turns: some steps through the adapter, then as many of plain PyTorch on a
copy of the module (zero_grad, forward, backward, SGD with momentum). PyTorch computes on one
thread.

*computing thread* is the processor time of the thread that computes: hooks and copies of gradients
but no optimizer, since the server has it; so it may come out below plain PyTorch. It is also
compared with plain PyTorch without its optimizer. *I/O thread* is the processor time of the thread
that sends and receives, beside it, and *server* that of the server's process. *clock* is the time
from one step to the next, waits for the server included. On two cores PyTorch has one; I/O thread
and server share the other, so it must be free.

*hooks*, *waiting*, *copying* say where the adapter's time goes on the computing thread: in hooks
and between steps; for parameters on their way; for copies of gradients and statistics. They are
means over all steps, by ``session.times``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy and PyTorch are loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")

from _machine import describe_machine, format_machine

import dynacomm_async as dc
from dynacomm_async.transport import LoopThread, run

BLOCK = 4
"""Steps of one kind in a row; the first of a block is not counted."""


def serve(steps: int, connection: Connection) -> None:
    """Be the server, a process of its own."""

    async def main() -> None:
        training = dc.Training(dc.SGD(0.9), dc.Constant(0.01))
        async with dc.ParameterServer(None, workers=1, steps=steps, training=training) as server:
            began_s = time.process_time()
            connection.send(server.address)
            await server.finished()
            connection.send(time.process_time() - began_s)

    run(main())


class Plain:
    """The same module by itself."""

    def __init__(self, model: Any, images: Any, labels: Any) -> None:
        import torch

        self._model, self._images, self._labels = model, images, labels
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(self) -> dict[str, float]:
        """Take a step; return seconds by what was measured."""
        from torch.nn.functional import cross_entropy

        began, began_cpu = time.perf_counter(), time.thread_time()
        self._optimizer.zero_grad()
        cross_entropy(self._model(self._images), self._labels).backward()
        computed_cpu = time.thread_time()
        self._optimizer.step()
        return {
            "clock_s": time.perf_counter() - began,
            "thread_s": time.thread_time() - began_cpu,
            "without_optimizer_s": computed_cpu - began_cpu,
        }


async def cpu_of_this_thread() -> float:
    """Return the processor time of the thread whose event loop runs this, in seconds."""
    return time.thread_time()


def measure(address: dc.Address, batch: int, width: int) -> dict[str, float]:
    """Train through the adapter and beside it; return medians in seconds a step."""
    import torch
    from _torch_models import resnet18
    from torch.nn.functional import cross_entropy

    from dynacomm_async.adapters.torch import TorchSession

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    model = resnet18(width)
    plain = Plain(resnet18(width), images, labels)
    rows: list[dict[str, float]] = []
    plain_rows: list[dict[str, float]] = []
    with LoopThread() as io, TorchSession(address, model, images, io=io) as session:
        io_began = io.submit(cpu_of_this_thread()).result()
        mark = mark_cpu = 0.0
        for step in session.steps():
            place = step.index % BLOCK
            if step.index and place != 1:  # a step of this block, not its first, has ended
                clock_s, thread_s = time.perf_counter() - mark, time.thread_time() - mark_cpu
                rows.append({"clock_s": clock_s, "thread_s": thread_s})
            if place == 0:
                plain_rows += [plain.step() for _ in range(BLOCK)][1:]
            mark, mark_cpu = time.perf_counter(), time.thread_time()
            loss = cross_entropy(model(images), labels)
            step.report(loss, batch)
            loss.backward()
        io_s = io.submit(cpu_of_this_thread()).result() - io_began
        steps = session.session.welcome.steps
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    for name in plain_rows[0]:
        found[f"plain_{name}"] = statistics.median(row[name] for row in plain_rows)
    times = session.times
    parts = {"hooks": times.hooks_ns, "waiting": times.waiting_ns, "copying": times.copying_ns}
    found |= {f"{name}_s": part_ns / 1e9 / steps for name, part_ns in parts.items()}
    return {**found, "io_s": io_s / steps, "steps": steps}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="Measure what the PyTorch adapter costs beside plain PyTorch.",
        epilog="example: python demos/benchmarks/adapter.py --batch 32",
    )
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="(default: 32)")
    parser.add_argument("--steps", type=int, default=32, metavar="K", help="(default: 32)")
    parser.add_argument("--quick", action="store_true", help="a narrow network and few steps")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print('PyTorch is not installed: pip install "dynacomm_async[torch]"; nothing to measure')
        sys.exit(0)
    steps, batch, width = (12, 4, 8) if args.quick else (args.steps, args.batch, 64)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(steps, theirs))
    server.start()
    try:
        found = measure(ours.recv(), batch, width)
        found["server_s"] = ours.recv() / steps
    finally:
        server.join(10)
        server.kill()
        server.join()
    machine = {**describe_machine(), "torch": torch.__version__}
    if args.json:
        print(json.dumps({"machine": machine, "batch": batch, "width": width, **found}))
        return
    print(f"{format_machine(machine)}, torch {torch.__version__}\n")
    print(f"ResNet-18, width {width}, batch {batch}, one worker; medians of {steps} steps, seconds")
    print_row("plain PyTorch, computing thread", found["plain_thread_s"])
    print_row("  of which without its optimizer", found["plain_without_optimizer_s"])
    print_row("adapter, computing thread", found["thread_s"], found["plain_thread_s"])
    print_row(
        "  beside plain without optimizer", found["thread_s"], found["plain_without_optimizer_s"]
    )
    print_row("adapter, both threads", found["thread_s"] + found["io_s"], found["plain_thread_s"])
    print_row("  of which I/O thread", found["io_s"])
    print_row("server's process", found["server_s"])
    print_row("plain PyTorch, clock", found["plain_clock_s"])
    print_row("adapter, clock", found["clock_s"], found["plain_clock_s"])
    for part in ("hooks", "waiting", "copying"):
        share = 100 * found[f"{part}_s"] / found["plain_clock_s"]
        print(f"  {'  of which ' + part:34}{found[f'{part}_s']:9.4f}{share:+7.1f} %")


def print_row(name: str, value: float, beside: float | None = None) -> None:
    """Print a figure, and what it is more than another in percent."""
    more = "" if beside is None else f"{100 * (value / beside - 1):+7.1f} %"
    print(f"  {name:34}{value:9.4f}{more}")


if __name__ == "__main__":
    main()
