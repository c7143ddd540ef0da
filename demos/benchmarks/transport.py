"""How fast an array gets from one process into another's array, beside the usual ways to do it.

Run it::

    python demos/benchmarks/transport.py              # one to two minutes
    python demos/benchmarks/transport.py --quick      # under 30 seconds, coarser
    python demos/benchmarks/transport.py --loop stock # asyncio's own loop instead of uvloop
    python demos/benchmarks/transport.py --json

Every way gets two processes that talk over loopback TCP; all of them live side by side and take
turns, round after round. Absolute figures depend on what else the machine does; a ratio is the
median, over rounds, of neighbouring measurements, so look at those. Blocking sockets are the
practical limit. Payloads are streamed one behind the other, as a plan's segments are, and the
clock stops when the receiver's answer to the last one is back. Then come what one small segment
costs, streamed or awaited one by one, beside the round trip of blocking sockets, and how much
memory a transfer takes beyond the array itself (what the kernel holds is not counted).

Left to itself the system likes to put both ends of one connection on one core: they then take
turns, a round trip of blocking sockets is short, and the two ends' costs add up. ``--pin`` gives
receivers and senders a core each, as on two machines: there a wake-up costs more and the ends
overlap. The targets are judged the same way in both cases; look at which one it was.

What it leaves out: links with a delay or a rate, and threads, which would share an interpreter.
gloo needs ``torch`` and gRPC ``grpcio``; without them they are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from _machine import describe_machine, format_machine
from _transport_ends import PEERS, find_missing

MIB = 1 << 20
SIZES_NBYTES = (MIB, 16 * MIB, 128 * MIB)
COUNTS = {MIB: 16, 16 * MIB: 4, 128 * MIB: 1}
"""Payloads that are streamed before the answer."""

ROUNDS = {MIB: 60, 16 * MIB: 30, 128 * MIB: 20}
QUICK_ROUNDS = {MIB: 10, 16 * MIB: 5, 128 * MIB: 4}

SEGMENT_NBYTES = 64 * 4
"""The small segment: 64 floats."""

STREAMED_SEGMENTS = 200
"""Small segments in one batch; ten batches in a round. Longer ones would measure time slices."""

AWAITED_SEGMENTS = 200
PINGS = 200

LEAST_SPEED = 0.9
MOST_MEMORY = 0.05
MOST_SEGMENT_COST = 1.0

TIMEOUT_S = 120.0

Row = dict[str, Any]


class Result(NamedTuple):
    """What an end says after a command: what it returned, and the peak of its memory."""

    value: Any
    extra_nbytes: int | None


# -- in the processes of the ends ----------------------------------------------------------------


def serve_end(side: str, key: str, loop_kind: str, core: int | None, pipe: Connection) -> None:
    """Carry out commands until the pipe closes, on one core if it is given."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    peer = PEERS[key]
    end = (peer.receiver if side == "receiver" else peer.sender)(loop_kind)
    with suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            start_nbytes = reset_peak_memory()
            value = getattr(end, name)(*arguments)
            peak_nbytes = read_status("VmHWM")
            extra = None if None in (start_nbytes, peak_nbytes) else peak_nbytes - start_nbytes
            pipe.send(Result(value, extra))
    os._exit(0)  # gloo and gRPC threads would keep the process


def reset_peak_memory() -> int | None:
    """Let the peak of resident memory start anew; return what is resident now."""
    with suppress(OSError):  # not permitted everywhere: the peak then is an upper bound
        Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_status(field: str) -> int | None:
    """Return a field of this process' memory statistics in bytes, or None where there are none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


# -- in the process that measures ----------------------------------------------------------------


class Pair:
    """Receiver and sender of one way, each in its own process."""

    def __init__(self, key: str, loop_kind: str, cores: Sequence[int] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for side, core in zip(("receiver", "sender"), cores or (None, None), strict=True):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve_end, args=(side, key, loop_kind, core, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes[side] = ours
            self._processes.append(process)

    def connect(self) -> None:
        """Join the two ends."""
        self._post("receiver", "listen")
        address = self._read("receiver").value
        self._post("receiver", "accept")
        self._post("sender", "connect", address)
        self._read("sender")
        self._read("receiver")

    def prepare(self, nbytes: int) -> None:
        """Give both ends an array of this size."""
        for side in self._pipes:
            self._post(side, "prepare", nbytes)
        for side in self._pipes:
            self._read(side)

    def send(self, count: int, batches: int) -> tuple[list[float], int | None, int | None]:
        """Return the duration of each batch, and the extra memory at sender and receiver."""
        self._post("receiver", "receive", count, batches)
        self._post("sender", "send", count, batches)
        sent, received = self._read("sender"), self._read("receiver")
        return sent.value, sent.extra_nbytes, received.extra_nbytes

    def ping(self, count: int) -> list[float]:
        """Return the durations of round trips of 64 bytes."""
        self._post("receiver", "echo", count)
        self._post("sender", "ping", count)
        durations: list[float] = self._read("sender").value
        self._read("receiver")
        return durations

    def close(self) -> None:
        """End both processes."""
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()

    def _post(self, side: str, name: str, *arguments: object) -> None:
        self._pipes[side].send((name, arguments))

    def _read(self, side: str) -> Result:
        if not self._pipes[side].poll(TIMEOUT_S):
            raise TimeoutError(f"the {side} did not answer within {TIMEOUT_S:g} s")
        result: Result = self._pipes[side].recv()
        return result


def measure_payloads(
    pairs: dict[str, Pair], nbytes: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[tuple[int | None, int | None]]]]:
    """Return, for each way and round, the seconds per payload and the extra memory."""
    durations: dict[str, list[float]] = {key: [] for key in pairs}
    memory: dict[str, list[tuple[int | None, int | None]]] = {key: [] for key in pairs}
    count = COUNTS[nbytes]
    for pair in pairs.values():
        pair.prepare(nbytes)
        pair.send(count, 1)  # let windows and buffers grow
    for number in range(rounds):
        for key in take_turns(pairs, number):
            (seconds,), sender, receiver = pairs[key].send(count, 1)
            durations[key].append(seconds / count)
            memory[key].append((sender, receiver))
    return durations, memory


def measure_segments(pairs: dict[str, Pair], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return, for each way and round, seconds of a round trip and of a small segment."""
    results: dict[str, dict[str, list[float]]] = {key: defaultdict(list) for key in pairs}
    for pair in pairs.values():
        pair.prepare(SEGMENT_NBYTES)
        pair.ping(PINGS)
    for number in range(rounds):
        for key in take_turns(pairs, number):
            pair, result = pairs[key], results[key]
            result["round_trip_s"].append(statistics.median(pair.ping(PINGS)))
            if key == "ours":
                streamed, _, _ = pair.send(STREAMED_SEGMENTS, 10)
                awaited, _, _ = pair.send(1, AWAITED_SEGMENTS)
                result["pipelined_s"].append(statistics.median(streamed) / STREAMED_SEGMENTS)
                result["stop_and_wait_s"].append(statistics.median(awaited))
    return results


def take_turns(keys: Iterable[str], number: int) -> list[str]:
    """Return the order of a round: every other one runs backwards, so nobody is always first."""
    return list(keys) if number % 2 == 0 else list(keys)[::-1]


def relate(values: list[float], reference: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=True))


def measure_all(pairs: dict[str, Pair], rounds: dict[int, int], segment_rounds: int) -> Row:
    """Measure everything; return it as plain values for tables and JSON."""
    rows: dict[str, Row] = {key: {"name": PEERS[key].name} for key in pairs}
    for nbytes in SIZES_NBYTES:
        durations, memory = measure_payloads(pairs, nbytes, rounds[nbytes])
        for key, row in rows.items():
            row.setdefault("payloads", {})[str(nbytes)] = {
                "gb_per_s": nbytes / statistics.median(durations[key]) / 1e9,
                "ratio_to_blocking": relate(durations["blocking"], durations[key]),
            }
            if nbytes == max(SIZES_NBYTES):
                row["extra_memory"] = summarise_memory(memory[key], nbytes)
    segments = measure_segments(pairs, segment_rounds)
    for key, row in rows.items():
        row["round_trip_s"] = statistics.median(segments[key]["round_trip_s"])
    ours, round_trip = segments["ours"], segments["blocking"]["round_trip_s"]
    costs = {
        name: {
            "seconds": statistics.median(ours[name]),
            "ratio_to_blocking_round_trip": relate(ours[name], round_trip),
        }
        for name in ("pipelined_s", "stop_and_wait_s")
    }
    return {
        "ways": rows,
        "segment": {name.removesuffix("_s"): cost for name, cost in costs.items()},
    }


def summarise_memory(
    peaks: list[tuple[int | None, int | None]], payload_nbytes: int
) -> dict[str, float | None]:
    """Return the highest extra memory of all rounds as a fraction of the payload."""

    def find_worst(values: Iterable[int | None]) -> float | None:
        known = [value for value in values if value is not None]
        return max(0, *known) / payload_nbytes if known else None

    senders, receivers = zip(*peaks, strict=True)
    return {"sender": find_worst(senders), "receiver": find_worst(receivers)}


# -- what is printed -----------------------------------------------------------------------------


def judge(results: Row) -> dict[str, tuple[bool, str]]:
    """Return, for each target, whether it was met and a line that says so."""
    ours, segment = results["ways"]["ours"], results["segment"]["pipelined"]
    speeds = [payload["ratio_to_blocking"] for payload in ours["payloads"].values()]
    memory = [value for value in ours["extra_memory"].values() if value is not None]
    cost = segment["ratio_to_blocking_round_trip"]
    shown = ", ".join(f"{speed:.2f}" for speed in speeds)
    verdicts = {
        "speed": (
            min(speeds) >= LEAST_SPEED,
            f"{shown} x blocking sockets at 1, 16 and 128 MiB (target: {LEAST_SPEED} or more)",
        ),
        "segment": (
            cost <= MOST_SEGMENT_COST,
            f"a pipelined segment costs {cost:.2f} blocking round trips "
            f"(target: {MOST_SEGMENT_COST} or less)",
        ),
    }
    if memory:
        verdicts["memory"] = (
            max(memory) <= MOST_MEMORY,
            f"extra memory {max(memory):.1%} of the payload (target: {MOST_MEMORY:.0%} or less)",
        )
    return verdicts


def print_results(results: Row) -> None:
    """Print the tables."""
    print("\nGB/s into the receiver's array (ratio to blocking sockets)")
    heads = ["1 MiB", "16 MiB", "128 MiB"]
    print(f"{'':18}" + "".join(f"{head:>16}" for head in heads), end="")
    print(f"{'64 B round trip':>18}{'extra memory, sender/receiver':>32}")
    for row in results["ways"].values():
        cells = [
            f"{payload['gb_per_s']:.2f} ({payload['ratio_to_blocking']:.2f}x)"
            for payload in row["payloads"].values()
        ]
        memory = " / ".join(
            "?" if value is None else f"{value:.1%}" for value in row["extra_memory"].values()
        )
        print(f"{row['name']:18}" + "".join(f"{cell:>16}" for cell in cells), end="")
        print(f"{row['round_trip_s'] * 1e6:15.1f} us{memory:>32}")
    print("\none segment of 64 floats (in round trips of 64 bytes over blocking sockets)")
    for name, label in (("pipelined", "streamed"), ("stop_and_wait", "awaited one by one")):
        cost = results["segment"][name]
        ratio = cost["ratio_to_blocking_round_trip"]
        print(f"{label:18}{cost['seconds'] * 1e6:13.1f} us ({ratio:.2f}x)")
    print()
    for met, text in judge(results).values():
        print(f"{'met   ' if met else 'MISSED'} {text}")


@contextmanager
def open_pairs(
    keys: Iterable[str], loop_kind: str, cores: Sequence[int]
) -> Iterator[dict[str, Pair]]:
    """Start and connect the processes of each way; end them afterwards."""
    with ExitStack() as stack:
        pairs = {}
        for key in keys:
            pairs[key] = Pair(key, loop_kind, cores)
            stack.callback(pairs[key].close)
        for pair in pairs.values():
            pair.connect()
        yield pairs


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Compare the package's TCP channel with other ways to move an array.",
        epilog="example: python demos/benchmarks/transport.py --quick --ways ours,blocking",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 30 seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--loop",
        choices=("uvloop", "stock"),
        default="uvloop",
        help="event loop of this package and of asyncio streams (default: uvloop)",
    )
    parser.add_argument(
        "--ways",
        default=",".join(PEERS),
        help=f"which to compare, ours and blocking at least (default: {','.join(PEERS)})",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="receivers on one core, senders on another, as on two machines",
    )
    arguments = parser.parse_args()
    arguments.ways = arguments.ways.split(",")
    if unknown := set(arguments.ways) - set(PEERS):
        parser.error(f"unknown way {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if not {"ours", "blocking"} <= set(arguments.ways):
        parser.error("--ways needs ours and blocking: one is judged by the other")
    return arguments


def choose_cores() -> list[int]:
    """Return a core for receivers and one for senders, or none where that cannot be chosen."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return [cores[0], cores[1]] if len(cores) > 1 else []


def read_congestion_control() -> str:
    """Return what paces TCP here: even on loopback it decides how far a sender runs ahead."""
    with suppress(OSError):
        return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return "unknown"


def main() -> None:
    """Measure, print tables or JSON."""
    arguments = parse_arguments()
    machine = describe_machine() | {"congestion_control": read_congestion_control()}
    os.environ.pop("OPENBLAS_CORETYPE", None)  # not passed on to the processes that measure
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    missing = {key: package for key in arguments.ways if (package := find_missing(key))}
    keys = [key for key in arguments.ways if key not in missing]
    if arguments.loop == "uvloop" and find_spec("uvloop") is None:
        arguments.loop = "stock"
    cores = choose_cores() if arguments.pin else []
    if not arguments.json:
        print(
            f"{format_machine(machine)}, {arguments.loop} loop, "
            f"TCP {machine['congestion_control']}, {'pinned' if cores else 'not pinned'}"
        )
        for key, package in missing.items():
            print(f"{PEERS[key].name}: not installed: pip install {package}")
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    with open_pairs(keys, arguments.loop, cores) as pairs:
        results = measure_all(pairs, rounds, 6 if arguments.quick else 30)
    if arguments.json:
        verdicts = {name: met for name, (met, _) in judge(results).items()}
        facts = {
            "machine": machine,
            "loop": arguments.loop,
            "pinned": bool(cores),
            "not_installed": list(missing),
        }
        print(json.dumps({**facts, **results, "targets_met": verdicts}))
        return
    print_results(results)


if __name__ == "__main__":
    main()
