"""How well a worker knows its link while it trains, under every strategy.

Run it::

    python demos/benchmarks/estimates.py            # two minutes
    python demos/benchmarks/estimates.py --quick    # half a minute: one link
    python demos/benchmarks/estimates.py --strategies sequential --model resnet20 --json

For every strategy and every link a worker trains for some steps through the link emulator, as a
session does without being asked: nothing is sent for the sake of measuring. The table shows what
its estimator makes of the transfers, after the warm-up steps (*first*) and at the end, beside what
the emulator was set to, both directions. *Within* says whether a rate is within 5 % and an
overhead within 0.2 ms or 20 %.

Look at ``sequential``: its one message a step tells a rate but no overhead, so all that it knows
of the overhead comes from the warm-up, whose steps are cut differently. What the rest of the
transport adds to a message is inside the estimates, for a plan has to reckon with it, but not in
what the emulator was set to.

What it leaves out: links whose rate changes (see ``demos/adapt.py``). A busy machine makes the
emulator late, which is seen here as a slower link.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

# Before NumPy is loaded, here and in the workers: one core computes, one sends and receives.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from _machine import describe_machine, format_machine

import dynacomm_async as dc
from dynacomm_async.link import LinkProcess, LinkSettings, parse_rate
from dynacomm_async.models import build
from dynacomm_async.transport import LoopThread, run
from dynacomm_async.worker import WARMUP_STEPS, bind_engine, layer_specs, train

BATCH = 16
TIMEOUT_S = 120.0
RATES = ("50mbit", "100mbit", "200mbit")
OVERHEADS_S = (0.002, 0.005)
RATE_ERROR = 0.05
OVERHEAD_ERROR, OVERHEAD_ERROR_S = 0.2, 0.0002


def work(pipe: Connection, address: str, model: str, strategy: str) -> None:
    """Train to the end; send the estimates after the warm-up and at the end."""
    network = build(model)
    numbers = np.random.default_rng(0)
    images = numbers.standard_normal((BATCH, *network.input_shape)).astype(np.float32)
    labels = numbers.integers(0, network.classes, BATCH)
    with (
        LoopThread() as io,
        dc.Session(address, layer_specs(network), strategy=strategy, io=io) as session,
    ):

        async def read() -> list[dict[str, float | bool]]:
            estimator = session.estimator
            return [
                {
                    "known": link.known,
                    "bytes_per_s": 1e9 / link.ns_per_byte if link.ns_per_byte else 0.0,
                    "overhead_s": link.overhead_ns / 1e9,
                }
                for link in (estimator.down, estimator.up)
            ]

        first = []
        engine = bind_engine(session, network, BATCH)
        for step in train(session, engine, lambda index: (images, labels)):
            if step.index == WARMUP_STEPS:  # the estimates that the next plan will be made from
                first = io.submit(read()).result()
        pipe.send({"first": first, "last": io.submit(read()).result()})


async def measure(
    model: str, strategy: str, rate: str, overhead_s: float, steps: int
) -> list[dict[str, Any]]:
    """Return two rows: what was estimated of the downlink and of the uplink."""
    network = build(model)
    bytes_per_s = parse_rate(rate)
    assert bytes_per_s is not None
    settings = LinkSettings(bytes_per_s, bytes_per_s, overhead_s=overhead_s)
    server = dc.ParameterServer(
        layer_specs(network),
        workers=1,
        steps=steps,
        training=dc.Training(dc.SGD(), dc.Constant(0.001)),
        initial=network.initialise(0),
        initial_statistics=network.initial_statistics(),
    )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    async with server, LinkProcess(settings, tuple(server.address)) as link:
        arguments = (theirs, str(link.address), model, strategy)
        worker = context.Process(target=work, args=arguments, daemon=True)
        worker.start()
        theirs.close()
        try:
            found = await asyncio.to_thread(receive, ours)
        finally:
            worker.kill()
            worker.join()
    return [
        {
            "strategy": strategy,
            "rate": rate,
            "overhead_s": overhead_s,
            "direction": direction,
            "first": judge(first, bytes_per_s, overhead_s),
            "last": judge(last, bytes_per_s, overhead_s),
        }
        for direction, first, last in zip(
            ("down", "up"), found["first"], found["last"], strict=True
        )
    ]


def receive(pipe: Connection) -> Any:
    """Return what the worker says."""
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"the worker said nothing within {TIMEOUT_S:g} s")
    return pipe.recv()


def judge(
    estimate: dict[str, float | bool], bytes_per_s: float, overhead_s: float
) -> dict[str, float | bool]:
    """Return the estimate with its errors, and whether they are small."""
    rate_error = estimate["bytes_per_s"] / bytes_per_s - 1
    error_s = estimate["overhead_s"] - overhead_s
    return {
        **estimate,
        "rate_error": rate_error,
        "overhead_error_s": error_s,
        "rate_within": abs(rate_error) <= RATE_ERROR,
        "overhead_within": abs(error_s) <= max(OVERHEAD_ERROR_S, OVERHEAD_ERROR * overhead_s),
    }


HEADER = (
    f"{'strategy':11} {'set to':>20} {'':5} {'first: rate':>20} {'overhead':>18} {'':6} "
    f"{'last: rate':>20} {'overhead':>18}  within"
)


def format_row(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = []
    for when in ("first", "last"):
        one = row[when]
        within = one["rate_within"] and one["overhead_within"]
        cells.append(
            f"{one['bytes_per_s'] * 8e-6:7.1f} Mbit/s {one['rate_error']:+6.1%} "
            f"{one['overhead_s'] * 1e3:6.2f} ms {one['overhead_error_s'] * 1e3:+6.2f} ms "
            f"{'yes' if within else 'NO':>6}"
        )
    link = f"{row['rate']}, {row['overhead_s'] * 1e3:g} ms"
    return f"{row['strategy']:11} {link:>20} {row['direction']:5} {cells[0]} {cells[1]}"


def print_verdict(rows: Sequence[dict[str, Any]]) -> None:
    """Say how many estimates are within their bounds, and the worst of each."""
    for when in ("first", "last"):
        found = [row[when] for row in rows]
        n_within = sum(one["rate_within"] and one["overhead_within"] for one in found)
        print(
            f"{when}: {n_within} of {len(found)} within bounds; worst rate "
            f"{max((one['rate_error'] for one in found), key=abs):+.1%}, worst overhead "
            f"{max((one['overhead_error_s'] for one in found), key=abs) * 1e3:+.2f} ms"
        )


def main() -> None:
    """Measure every strategy on every link, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description="Compare a worker's estimates of its link with what the link was set to.",
        epilog="example: python demos/benchmarks/estimates.py --strategies sequential,dynacomm",
    )
    parser.add_argument("--quick", action="store_true", help="one link only")
    parser.add_argument("--strategies", default=",".join(dc.PLANNERS), metavar="A,B")
    parser.add_argument("--model", default="lenet", help="see dynacomm models (default: lenet)")
    parser.add_argument("--steps", type=int, default=30, metavar="K", help="(default: 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.steps <= WARMUP_STEPS + 1:
        parser.error(f"--steps {args.steps}: at least {WARMUP_STEPS + 2} are needed")
    machine = describe_machine()
    if not args.json:
        print(f"{format_machine(machine)}\n{args.model}, {args.steps} steps\n{HEADER}")
    rows: list[dict[str, Any]] = []
    for rate in RATES[1:2] if args.quick else RATES:
        for overhead_s in OVERHEADS_S[:1] if args.quick else OVERHEADS_S:
            for strategy in args.strategies.split(","):
                found = run(measure(args.model, strategy, rate, overhead_s, args.steps))
                rows += found
                if not args.json:
                    print("\n".join(map(format_row, found)), flush=True)
    if args.json:
        print(json.dumps({"machine": machine, "model": args.model, "rows": rows}))
    else:
        print_verdict(rows)


if __name__ == "__main__":
    main()
