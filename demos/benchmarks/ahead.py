"""How much sits in socket buffers, ahead of the link, when the next message is chosen?

What sits there cannot be overtaken any more: a plan that lets front layers overtake is worth only
as much as little of it waits in buffers.

What it shows
    ``joint`` trains over an emulated link while all processes record when each message was handed
    over and when it began and ceased to occupy the link. For every message but the first of a
    burst: how much of the messages chosen before it had not passed the link yet, in bytes and as a
    share of the plan's largest message. The part of the message on the link that is still to come
    counts too, so about one is what late binding allows at best without gaps.

Run it::

    python demos/benchmarks/ahead.py                  # half a minute
    python demos/benchmarks/ahead.py --model vgg_small --bandwidth 170mbit

What it leaves out: messages after an idle moment, which find nothing ahead of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence

from _machine import describe_machine, format_machine

from dynacomm_async.cli import compare
from dynacomm_async.cli.links import fleet_from
from dynacomm_async.errors import DynaCommError
from dynacomm_async.observe.joining import Crossing


def ahead_of(messages: Sequence[Crossing]) -> Iterator[float]:
    """Yield for each message the bytes that were chosen before it and had not passed the link."""
    for place, message in enumerate(messages):
        assert message.sent is not None
        chosen_ns = message.sent.start_ns
        ahead = 0.0
        for earlier in reversed(messages[:place]):
            assert earlier.carried is not None
            start_ns, end_ns = earlier.carried.start_ns, earlier.carried.end_ns
            if end_ns <= chosen_ns:
                break
            left = min(1.0, (end_ns - chosen_ns) / max(end_ns - start_ns, 1))
            ahead += left * earlier.payload_nbytes
        if ahead:
            yield ahead


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train and record; return for each direction what was ahead."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    options = ["--data", "synthetic:512:64", "--workers", "1", "--strategies", "joint"]
    for name in ("model", "batch", "steps", "slowdown", "bandwidth", "overhead", "delay"):
        options += [f"--{name}", str(getattr(args, name))]
    given = parser.parse_args(options)
    found = compare.compare(given, ["joint"], fleet_from(given), record=True)
    assert found.joined is not None
    first_step, _ = found.plans["joint"][0][-1]
    result = {}
    for direction, up, kind in (("up", True, "GRADIENTS"), ("down", False, "PARAMETERS")):
        messages = sorted(
            (
                crossing
                for crossing in found.joined.crossings
                if crossing.up == up and crossing.kind == kind and crossing.step > first_step
                if crossing.sent is not None and crossing.carried is not None
            ),
            key=lambda crossing: crossing.sent.start_ns if crossing.sent else 0,
        )
        largest = max(message.payload_nbytes for message in messages)
        ahead = sorted(ahead_of(messages)) or [0.0]
        result[direction] = {
            "messages": len(messages),
            "largest_nbytes": largest,
            "median_nbytes": statistics.median(ahead),
            "p99_nbytes": ahead[len(ahead) * 99 // 100],
            "most_nbytes": ahead[-1],
        }
    return result


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description="What sits in socket buffers ahead of the link while joint trains.",
        epilog="example: python demos/benchmarks/ahead.py --model vgg_small --bandwidth 170mbit",
    )
    for name, default in (
        ("model", "resnet20"),
        ("batch", "4"),
        ("steps", "40"),
        ("slowdown", "4"),
        ("bandwidth", "60mbit"),
        ("overhead", "1ms"),
        ("delay", "0ms"),
    ):
        parser.add_argument(f"--{name}", default=default, help=f"(default: {default})")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args()
    os.environ.pop("OPENBLAS_CORETYPE", None)
    try:
        result = measure(args)
    except DynaCommError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
        return 0
    print(format_machine(describe_machine()))
    print(f"{args.model}, {args.bandwidth}, {args.overhead} a message: ahead of the link")
    for direction, figures in result.items():
        largest = figures["largest_nbytes"]
        parts = [
            f"{name} {figures[f'{name}_nbytes'] / 1024:6.1f} KiB "
            f"({figures[f'{name}_nbytes'] / largest:.2f} messages)"
            for name in ("median", "p99", "most")
        ]
        print(
            f"{direction:<5}{figures['messages']:5.0f} messages of up to {largest / 1024:.1f} KiB: "
            + ", ".join(parts)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
