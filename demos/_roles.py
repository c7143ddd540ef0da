"""What the embedding demos share: who serves, who works, and whether all agree at the end.

A demo hands over two functions of its own: one that makes the server, one that is a worker. By
default this process serves, and starts the workers as processes; ``--role`` plays one part only.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable

import dynacomm_async as dc

MakeServer = Callable[..., dc.ParameterServer]
Work = Callable[[argparse.Namespace], str]


def play(parser: argparse.ArgumentParser, make_server: MakeServer, work: Work) -> None:
    """Play the role that the command line names.

    Args:
        parser: with the demo's own options.
        make_server: from ``workers``, ``steps``, ``listen``, ``insecure`` and ``on_step`` to the
            server.
        work: from the options (``address`` is the server's) to a line that ends with the hash of
            the parameters; it trains until the run ends.
    """
    add_options(parser)
    args = parser.parse_args()
    try:
        if args.role == "worker":
            print(work(args))
        elif args.role == "server":
            asyncio.run(serve(args, make_server))
        else:
            asyncio.run(do_all(args, make_server))
    except* (dc.DynaCommError, WorkerFailed) as failed:
        sys.exit(f"error: {failed.exceptions[0]}")
    except* KeyboardInterrupt:
        sys.exit(130)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every demo of this kind."""
    parser.add_argument("--role", choices=["all", "server", "worker"], default="all")
    parser.add_argument(
        "--address",
        default="127.0.0.1:7070",
        metavar="HOST:PORT",
        help="where the server listens; for the roles server and worker (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--steps", type=int, default=200, metavar="K", help="(default: 200)")
    parser.add_argument(
        "--insecure", action="store_true", help="let the server listen beyond this machine"
    )


def made(args: argparse.Namespace, make_server: MakeServer, listen: str) -> dc.ParameterServer:
    """Return the demo's server, to enter with ``async with``."""

    def on_step(record: dc.StepRecord) -> None:
        if (record.index + 1) % 50 == 0:
            print(f"step {record.index + 1}: loss {record.loss:.4f}", flush=True)

    return make_server(
        workers=args.workers,
        steps=args.steps,
        listen=listen,
        insecure=args.insecure,
        on_step=on_step,
    )


async def serve(args: argparse.Namespace, make_server: MakeServer) -> None:
    """Serve one run."""
    async with made(args, make_server, args.address) as server:
        print(f"listening on {server.address}, waiting for {args.workers} workers", flush=True)
        result = await server.finished()
    print(f"server: parameters sha256 {result.parameters_sha256[:16]}")


async def do_all(args: argparse.Namespace, make_server: MakeServer) -> None:
    """Serve a run in this process, with the workers as processes of their own."""
    async with made(args, make_server, "127.0.0.1:0") as server:
        part = ["--role", "worker", "--address", str(server.address)]
        command = [sys.executable, *sys.argv, *part]  # this demo, with the same options
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(run_worker(command)) for _ in range(args.workers)]
            result = await server.finished()
    lines = sorted(worker.result() for worker in workers)
    lines.append(f"server: parameters sha256 {result.parameters_sha256[:16]}")
    print("\n".join(lines))
    if len({line.split()[-1] for line in lines}) > 1:
        sys.exit("the parameters are NOT the same everywhere; please report this as a bug")
    print("all hold the same parameters, bit for bit")


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
