"""The emulated links between a command's servers and its workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from dynacomm_async.addresses import Address
from dynacomm_async.link.process import LinkProcess
from dynacomm_async.link.settings import LinkSettings

__all__ = ["start_links"]


async def start_links(
    stack: contextlib.AsyncExitStack,
    link: LinkSettings,
    servers: Sequence[Address],
    n_workers: int,
) -> list[list[LinkProcess]]:
    """Start a link process for each server and worker, or for each server where it is shared.

    Args:
        stack: ends them when it is left.

    Returns:
        For each server one link for each worker; the same one where it is shared.

    Raises:
        ConfigError: a link did not start; none is left half started.
    """
    n_links = 1 if link.shared else n_workers
    rows = [[LinkProcess(link, server) for _ in range(n_links)] for server in servers]
    # All at once, for there may be many; and none is left half started when one fails.
    starts = [process.__aenter__() for row in rows for process in row]
    results = await asyncio.gather(*starts, return_exceptions=True)
    stack.push_async_callback(_stop, [p for p in results if isinstance(p, LinkProcess)])
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [(row * n_workers)[:n_workers] for row in rows]


async def _stop(links: Sequence[LinkProcess]) -> None:
    await asyncio.gather(*(process.stop() for process in links))
