"""How much of the communication hides behind computing, with 16 segments each way.

Run it::

    python demos/benchmarks/overlap.py            # two to three minutes
    python demos/benchmarks/overlap.py --quick    # under 30 seconds, one model a rate
    python demos/benchmarks/overlap.py --rates 50mbit --json

A server, the link emulator and a worker run as three processes. The worker's model is artificial:
16 layers, each its own segment, which are "computed" by as many real matrix products as fit in
the processor time that the layer is to take. (Not by a number of them: a virtual processor's
speed changes by a third from one second to the next.) Forward and backward take equally long, and
so do pull and push. Four kinds of steps take turns in one session:

- *communication*: no computing at all, so the step is what the network costs;
- *computation*: the matrix products alone, while nothing is on the link;
- *step*: both, as a session is meant to be used: it computes on the caller's thread;
- *on the loop*: both, but computed on the event loop that also sends and receives, as code that
  awaits and computes in turns would do it without a thread for its I/O.

Look at *ratio*: the step over the longer of communication and computation, which no schedule with
a barrier between steps can beat. Beside it stands what the library's own cost model says is
possible for this plan, since a pipeline has to be filled: of 16 equal layers the first must have
arrived before anything can be computed. In the network-like model, as in real CNNs, parameters
grow and work shrinks with depth, and there is next to nothing to fill. *Products* says how many
matrix products a step had done, in comparison with computation alone: less than 1 where
communication slows down the arithmetic itself, through caches and memory.

All figures are medians, those of ratios over rounds, each of which compares neighbours in time.
Server and link, which elsewhere are other machines, are kept off the first cores. Computing keeps
one core busy and carrying bytes a good part of another: with less than two idle cores this
measures the machine, not the library.

What it leaves out: several workers, delay and per-message overhead (``dynacomm compare`` has
them), and real layers, whose matrix products come in more shapes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from _machine import describe_machine, format_machine

import dynacomm_async as dc
from dynacomm_async.link import LinkProcess, LinkSettings, format_rate, parse_rate
from dynacomm_async.transport import run
from dynacomm_async.worker import FixedPlan

N_LAYERS = 16
PHASE_S = 0.1
"""The longer of transfer and computing in one direction."""

MOST_RATIO = 1.05

MOST_DISTURBED = 1.02
"""Computing alone may take this much longer than its processor time, else others were computing."""

TIMEOUT_S = 120.0
SIDE = 192
"""Rows and columns of the matrices: a product takes some hundred microseconds, as a block of a
convolution does. Between two products the thread gives the interpreter's lock back and takes it
again; with shorter ones it would meet the thread that sends and receives there more often."""


@dataclass(frozen=True, slots=True)
class Workload:
    """An artificial model.

    Attributes:
        name: for the table.
        shape: share of the bytes of each layer; the work is shared out the other way round.
        communication: how long a transfer takes, in ``PHASE_S``.
        computation: how long computing a phase takes, in ``PHASE_S``.
    """

    name: str
    shape: tuple[float, ...]
    communication: float
    computation: float

    def counts(self, bytes_per_s: float) -> dict[str, int]:
        """Return the layer table: a name and a number of float32 for each layer."""
        floats = self.communication * PHASE_S * bytes_per_s / 4
        return {f"layer{i}": max(1, round(floats * share)) for i, share in enumerate(self.shape)}

    def work_s(self) -> list[float]:
        """Return how long each layer is to compute in one phase."""
        return [self.computation * PHASE_S * share for share in reversed(self.shape)]


EQUAL = (1 / N_LAYERS,) * N_LAYERS
GROWING = tuple((2 * layer + 1) / N_LAYERS**2 for layer in range(N_LAYERS))
WORKLOADS = (
    Workload("network-like", GROWING, 1.0, 1.0),
    Workload("network-like", GROWING, 1.0, 0.7),
    Workload("network-like", GROWING, 0.7, 1.0),
    Workload("equal layers", EQUAL, 1.0, 0.5),
    Workload("equal layers", EQUAL, 0.5, 1.0),
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often and how long each kind of step has its turn.

    The first step of a block does not count, since it finds parameters that came while others had
    their turn, nor does the last, which ends in the next block.
    """

    rounds: int
    block: int = 5
    loop_block: int = 3
    computations: int = 3

    @property
    def steps(self) -> int:
        """Steps of the whole session: a first one, then three blocks and a computation a round."""
        return 1 + self.rounds * (2 * self.block + self.loop_block + 1)


# -- the server's process ------------------------------------------------------------------------


def serve(pipe: Connection, counts: dict[str, int], steps: int) -> None:
    """Run a parameter server; say where it listens."""

    async def main() -> None:
        initial = np.zeros(sum(counts.values()), np.float32)
        async with dc.ParameterServer(counts, workers=1, steps=steps, initial=initial) as server:
            pipe.send((server.address.host, server.address.port))
            await server.finished()

    run(main())


# -- the worker's process ------------------------------------------------------------------------


class Work:
    """Matrix products instead of layers, as many as fit in a given processor time.

    Args:
        session: whose arenas are read and written, as layers would.
        work_s: how long each layer is to take in each of the two phases.

    Attributes:
        products: how many were computed so far.
    """

    def __init__(self, session: dc.Session, work_s: Sequence[float]) -> None:
        numbers = np.random.default_rng(0)
        self._a, self._b = numbers.standard_normal((2, SIDE, SIDE), dtype=np.float32)
        self._out = np.empty((SIDE, SIDE), np.float32)
        self._session = session
        self._slices = [session.slice_of(layer) for layer in range(N_LAYERS)]
        self._work_s = work_s
        self.products = 0

    def forward(self, layer: int) -> None:
        """Compute a layer's share of the forward pass."""
        self._multiply(time.thread_time() + self._work_s[layer])

    def backward(self, layer: int) -> None:
        """Compute a layer's share of the backward pass, and its gradient."""
        until_s = time.thread_time() + self._work_s[layer]
        place = self._slices[layer]
        np.multiply(
            self._session.parameters[place], np.float32(1e-3), out=self._session.gradients[place]
        )
        self._multiply(until_s)

    def everything(self) -> None:
        """Compute both passes."""
        for layer in range(N_LAYERS):
            self.forward(layer)
        for layer in reversed(range(N_LAYERS)):
            self.backward(layer)

    def _multiply(self, until_s: float) -> None:
        while time.thread_time() < until_s:
            np.matmul(self._a, self._b, out=self._out)
            self.products += 1


def communicate(step: dc.Step) -> None:
    """A step without computing."""
    for layer in range(N_LAYERS):
        step.wait(layer)
    for layer in reversed(range(N_LAYERS)):
        step.gradient_ready(layer)


def train(step: dc.Step, work: Work) -> None:
    """A step as it is meant to be."""
    for layer in range(N_LAYERS):
        step.wait(layer)
        work.forward(layer)
    step.forward_done()
    for layer in reversed(range(N_LAYERS)):
        work.backward(layer)
        step.gradient_ready(layer)


async def train_on_loop(step: dc.AsyncStep, work: Work) -> None:
    """The same, computed on the event loop; it gives way wherever a coroutine naturally would."""
    for layer in range(N_LAYERS):
        await step.parameters(layer)
        work.forward(layer)
        await asyncio.sleep(0)
    step.forward_done()
    for layer in reversed(range(N_LAYERS)):
        work.backward(layer)
        step.gradient_ready(layer)
        await asyncio.sleep(0)


@dataclass(slots=True)
class Round:
    """Median durations in seconds of each kind of step in one round.

    ``products``: matrix products of a step in comparison with those of computation alone.
    """

    communication: float
    computation: float
    step: float
    on_loop: float
    products: float


def work(
    pipe: Connection, address: str, work_s: list[float], schedule: Schedule, cores: set[int]
) -> None:
    """Train in turns on any of the cores; send what was measured."""
    stay_on(cores)
    whole = range(N_LAYERS)
    plan = dc.Plan(
        "16 segments",
        N_LAYERS,
        tuple(dc.Segment(layer, layer) for layer in whole),
        tuple(dc.Segment(layer, layer) for layer in reversed(whole)),
    )
    with (
        dc.LoopThread() as io,
        dc.Session(address, plans=lambda grid, estimator: FixedPlan(plan), io=io) as session,
    ):
        layers = Work(session, work_s)
        pipe.send(list(measure(session, io, layers, schedule)))


def measure(
    session: dc.Session, io: dc.LoopThread, layers: Work, schedule: Schedule
) -> Iterator[Round]:
    """Run the whole session; yield each round."""
    steps = session.steps()

    def run_block(n_steps: int, run_step: Callable[[dc.Step], object]) -> float:
        started_ns = []
        for step in islice(steps, n_steps):
            started_ns.append(step.started_ns)
            run_step(step)
        # One step begins where the one before ends.
        periods = [after - before for before, after in pairwise(started_ns[1:])]
        return statistics.median(periods) / 1e9

    def run_on_loop(step: dc.Step) -> None:
        io.submit(train_on_loop(dc.AsyncStep(step), layers)).result()

    communicate(next(steps))
    for _ in range(schedule.rounds):
        communication = run_block(schedule.block, communicate)
        start = layers.products
        computation = compute_alone(next(steps), layers, schedule.computations)
        alone = (layers.products - start) / schedule.computations
        start = layers.products
        step = run_block(schedule.block, lambda step: train(step, layers))
        together = (layers.products - start) / schedule.block
        on_loop = run_block(schedule.loop_block, run_on_loop)
        yield Round(communication, computation, step, on_loop, together / alone)
    for _ in steps:
        raise AssertionError("the run went on after its last step")


def compute_alone(step: dc.Step, layers: Work, times: int) -> float:
    """Return how long computing takes while nothing is sent or received."""
    for layer in range(N_LAYERS):
        step.wait(layer)
    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        layers.everything()
        durations.append(time.perf_counter() - begin)
    for layer in reversed(range(N_LAYERS)):
        step.gradient_ready(layer)
    return statistics.median(durations)


# -- in the process that judges ------------------------------------------------------------------


def stay_on(cores: set[int]) -> None:
    """Keep this process, and those that it starts, on some cores, where that can be done."""
    if cores:
        os.sched_setaffinity(0, cores)


def available_cores() -> set[int]:
    """Return the cores that this process may use, or none where that cannot be told."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def measure_workload(
    workload: Workload, bytes_per_s: float, schedule: Schedule, cores: set[int]
) -> list[Round]:
    """Run server, link and worker, the latter on any of the cores; return all rounds."""
    counts = workload.counts(bytes_per_s)
    settings = LinkSettings(rate_down_bytes_per_s=bytes_per_s, rate_up_bytes_per_s=bytes_per_s)
    processes: list[BaseProcess] = []

    async def main() -> list[Round]:
        server = start(processes, serve, counts, schedule.steps)
        async with LinkProcess(settings, await asyncio.to_thread(receive, server)) as link:
            host, port = link.address
            address = f"{host}:{port}"
            worker = start(processes, work, address, workload.work_s(), schedule, cores)
            rounds: list[Round] = await asyncio.to_thread(receive, worker)
        return rounds

    try:
        return asyncio.run(main())
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def start(processes: list[BaseProcess], target: Any, *arguments: object) -> Connection:
    """Start a process that can be received from."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    processes.append(process)
    return ours


def receive(pipe: Connection) -> Any:
    """Return what a process says."""
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"a process said nothing within {TIMEOUT_S:g} s")
    return pipe.recv()


def judge(workload: Workload, bytes_per_s: float, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return a row of the table: medians, and ratios to what they are to be compared with."""
    communication_s = statistics.median(one.communication for one in rounds)
    computation_s = statistics.median(one.computation for one in rounds)
    step_s = statistics.median(one.step for one in rounds)
    theory_s = 2 * 4 * sum(workload.counts(bytes_per_s).values()) / bytes_per_s
    predicted_s = predict_s(workload, bytes_per_s, communication_s - theory_s, computation_s)
    ratio = statistics.median(one.step / max(one.communication, one.computation) for one in rounds)
    on_loop_ratio = statistics.median(
        one.on_loop / max(one.communication, one.computation) for one in rounds
    )
    return {
        "model": workload.name,
        "rate": format_rate(bytes_per_s),
        "communication_s": communication_s,
        "communication_theory_s": theory_s,
        "computation_s": computation_s,
        "step_s": step_s,
        "on_loop_s": statistics.median(one.on_loop for one in rounds),
        "predicted_s": predicted_s,
        "ratio": ratio,
        "ratios": [one.step / max(one.communication, one.computation) for one in rounds],
        "predicted_ratio": predicted_s / max(communication_s, computation_s),
        "ratio_to_predicted": step_s / predicted_s,
        "on_loop_ratio": on_loop_ratio,
        "products": statistics.median(one.products for one in rounds),
        "disturbed": max(one.computation for one in rounds) / (2 * sum(workload.work_s())),
    }


def predict_s(
    workload: Workload, bytes_per_s: float, extra_s: float, computation_s: float
) -> float:
    """Return the cost model's step for what was measured of each part.

    What communication took beyond its bytes (turning round, applying the last gradients) occupies
    no link: it comes once a step.
    """
    counts = workload.counts(bytes_per_s)
    layers = []
    for (name, count), share in zip(counts.items(), reversed(workload.shape), strict=True):
        transfer_ns = round(4 * count / bytes_per_s * 1e9)
        compute_ns = round(computation_s * share / 2 * 1e9)
        layers.append(
            dc.LayerCosts(name, 4 * count, transfer_ns, compute_ns, compute_ns, transfer_ns)
        )
    costs = dc.Costs(tuple(layers), 0, 0, server_ns=max(0, round(extra_s * 1e9)))
    return dc.evaluate(dc.make_plan("layerwise", costs), costs).step_ns / 1e9


HEADER = (
    f"{'model':14} {'rate':>8} {'communication (theory)':>24} {'computation':>12} {'step':>9} "
    f"{'ratio':>6} {'model says':>11} {'products':>9} {'on the loop':>12}"
)


def format_row(row: dict[str, Any]) -> str:
    """Return a row of the table: milliseconds and ratios."""
    communication = (
        f"{row['communication_s'] * 1e3:.1f} ms ({row['communication_theory_s'] * 1e3:.1f})"
    )
    return (
        f"{row['model']:14} {row['rate']:>8} {communication:>24} "
        f"{row['computation_s'] * 1e3:>9.1f} ms {row['step_s'] * 1e3:>6.1f} ms "
        f"{row['ratio']:>6.3f} {row['predicted_ratio']:>11.3f} "
        f"{row['products']:>9.2f} {row['on_loop_ratio']:>12.3f}"
    )


def parse_rates(text: str) -> list[float]:
    """Return the rates in ``"200mbit,1gbit"`` in bytes per second."""
    rates = [parse_rate(word) for word in text.split(",")]
    if None in rates:
        raise argparse.ArgumentTypeError("a rate must have a limit, such as 200mbit")
    return [rate for rate in rates if rate is not None]


def main() -> None:
    """Measure every model at every rate."""
    parser = argparse.ArgumentParser(
        description="Measure how much communication hides behind computing.",
        epilog="example: python demos/benchmarks/overlap.py --quick --rates 100mbit",
    )
    parser.add_argument("--quick", action="store_true", help="one model, fewer rounds")
    parser.add_argument("--rounds", type=int, metavar="N", help="(default: 3; with --quick 2)")
    parser.add_argument(
        "--rates",
        type=parse_rates,
        default="200mbit,1gbit",
        metavar="A,B",
        help="of the link, each way (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    # For the children: one BLAS thread beside the one that sends and receives, and the kernels
    # that suit the processor.
    os.environ.pop("OPENBLAS_CORETYPE", None)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    machine = describe_machine()
    if not args.json:
        print(f"{format_machine(machine)}, 1 BLAS thread\n{HEADER}")
    cores = available_cores()
    stay_on(set(sorted(cores)[-1:]))
    schedule = Schedule(args.rounds or (2 if args.quick else 3))
    rows: list[dict[str, Any]] = []
    for bytes_per_s in args.rates:
        for workload in WORKLOADS[:1] if args.quick else WORKLOADS:
            rounds = measure_workload(workload, bytes_per_s, schedule, cores)
            rows.append(judge(workload, bytes_per_s, rounds))
            if not args.json:
                print(format_row(rows[-1]), flush=True)
    if args.json:
        print(json.dumps({"machine": machine, "blas_threads": 1, "rows": rows}))
        return
    worst = max(row["ratio"] for row in rows)
    verdict = "reached" if worst <= MOST_RATIO else "missed"
    print(f"worst ratio {worst:.3f}, target {MOST_RATIO}: {verdict}")
    disturbed = max(row["disturbed"] for row in rows)
    if disturbed > MOST_DISTURBED:
        print(
            f"but the machine was not idle: computing alone took up to {disturbed:.2f} times its "
            "processor time, so these figures say little of the library"
        )


if __name__ == "__main__":
    main()
