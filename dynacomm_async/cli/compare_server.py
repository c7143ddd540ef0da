"""The server process of ``dynacomm compare``: one parameter server for each strategy.

Reads one line of JSON (the specification) from standard input, reports events on standard
output. Only one of the servers is busy at any moment: the workers take turns among strategies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

from dynacomm_async.addresses import Address, is_loopback
from dynacomm_async.cli.main import run_child
from dynacomm_async.cli.output import emit
from dynacomm_async.cli.tracing import label_recorders
from dynacomm_async.cli.workload import load_workload, training_of
from dynacomm_async.server import ParameterServer
from dynacomm_async.transport import run
from dynacomm_async.worker import layer_specs

__all__ = ["main"]


def main() -> int:
    """Serve every strategy's run to its end."""
    specification = json.loads(sys.stdin.readline())
    return run_child("compare server", lambda: run(_serve(specification)))


async def _serve(specification: dict[str, Any]) -> int:
    settings, steps = specification["settings"], specification["steps"]
    workload = load_workload(settings)
    network = workload.network
    async with contextlib.AsyncExitStack() as stack:
        servers = {}
        recorders = stack.enter_context(label_recorders(specification))
        for strategy in specification["strategies"]:
            servers[strategy] = await stack.enter_async_context(
                ParameterServer(
                    layer_specs(network),
                    workers=settings["workers"],
                    steps=steps,
                    training=training_of(specification["training"], steps),
                    initial=network.initialise(settings["seed"]),
                    initial_statistics=network.initial_statistics(),
                    settings={**settings, "strategy": strategy},
                    run=f"compare-{strategy}",
                    listen=Address(specification["host"], 0),
                    insecure=not is_loopback(specification["host"]),
                    recorder=recorders.get(strategy),
                )
            )
        emit("listening", addresses={name: str(server.address) for name, server in servers.items()})
        results = await asyncio.gather(*(server.finished() for server in servers.values()))
        for strategy, result in zip(servers, results, strict=True):
            emit(
                "result",
                strategy=strategy,
                parameters_sha256=result.parameters_sha256,
                loss=result.losses,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
