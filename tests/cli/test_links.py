"""The links of a command: one for each worker, or one for all."""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import pytest

from dynacomm_async.addresses import Address
from dynacomm_async.cli import train
from dynacomm_async.cli.links import Fleet, add_fleet_arguments, fleet_from, start_links
from dynacomm_async.errors import ConfigError
from dynacomm_async.link import LinkSettings


@pytest.mark.parametrize(("shared", "n_processes"), [(False, 3), (True, 1)])
def test_a_shared_link_is_one_process_for_all_workers(shared, n_processes):
    async def start():
        async with contextlib.AsyncExitStack() as stack:
            servers = [Address("127.0.0.1", 9), Address("127.0.0.1", 10)]
            return await start_links(stack, [LinkSettings(shared=shared)] * 3, servers)

    rows = asyncio.run(start())
    assert [len(row) for row in rows] == [3, 3]
    assert [len({link.address for link in row}) for row in rows] == [n_processes] * 2
    assert not set(rows[0]) & set(rows[1])


def test_one_that_cannot_start_leaves_no_other_running(monkeypatch):
    started = []

    class Link:
        def __init__(self, settings, to, *, trace):
            self.fails = to.port == 10

        async def __aenter__(self):
            if self.fails:
                raise ConfigError("no room")
            started.append(self)
            return self

        async def stop(self):
            started.remove(self)

    monkeypatch.setattr("dynacomm_async.cli.links.LinkProcess", Link)

    async def start():
        async with contextlib.AsyncExitStack() as stack:
            servers = [Address("127.0.0.1", 9), Address("127.0.0.1", 10)]
            await start_links(stack, [LinkSettings()] * 2, servers)

    with pytest.raises(ConfigError, match="no room"):
        asyncio.run(start())
    assert started == []


@pytest.mark.parametrize(("options", "n_links"), [((), 2), (("--shared",), 1)])
def test_train_puts_as_many_links_in_between_as_it_was_told(monkeypatch, quick, options, n_links):
    counters = []

    async def start_and_keep(stack, *arguments):
        rows = await start_links(stack, *arguments)
        # Before the links are ended: the stack unwinds from its end.
        stack.push_async_callback(count, set(rows[0]))
        return rows

    async def count(links):
        counters.extend([await link.stop() for link in links])

    monkeypatch.setattr(train, "start_links", start_and_keep)
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args([*quick, "--model=mlp", "--steps=3", "--delay=1ms", *options])
    result = train.train_locally(args, "dynacomm", train.fleet_from(args))

    assert result["steps"] == 3
    assert len(counters) == n_links
    assert sum(len(each["connections"]) for each in counters) == 2
    joins = [each["up"]["kinds"]["JOIN"]["messages"] for each in counters]
    assert joins == [2 // n_links] * n_links


def fleet(*options: str) -> Fleet:
    parser = argparse.ArgumentParser()
    add_fleet_arguments(parser)
    return fleet_from(argparse.Namespace(workers=2, **vars(parser.parse_args(options))))


def test_one_value_holds_for_every_worker():
    link = LinkSettings(rate_down_bytes_per_s=12.5e6, rate_up_bytes_per_s=12.5e6)
    assert fleet("--bandwidth=100mbit", "--slowdown=3") == Fleet((link, link), (3.0, 3.0))
    assert fleet().is_local
    assert not fleet("--delay=0ms,1ms").is_local


def test_each_worker_may_have_a_link_and_a_speed_of_its_own():
    found = fleet("--bandwidth=100mbit,25mbit", "--overhead=0ms, 2ms", "--slowdown=1,2.5")
    assert [link.rate_down_bytes_per_s for link in found.links] == [12.5e6, 3.125e6]
    assert [link.rate_up_bytes_per_s for link in found.links] == [12.5e6, 3.125e6]
    assert [link.overhead_s for link in found.links] == [0.0, 0.002]
    assert found.slowdowns == (1.0, 2.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bandwidth=1mbit,2mbit,3mbit"], "--bandwidth 1mbit,2mbit,3mbit has 3 values, expected"),
        (["--bandwidth=1mbit,fast"], "--bandwidth: 'fast' is not a rate"),
        (["--delay=1ms,2ms", "--shared"], "--shared: workers who share a link cannot have"),
        (["--slowdown=0.5"], "--slowdown: '0.5' is not a number from 1"),
        (["--slowdown=nan,1"], "--slowdown: 'nan' is not a number from 1"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_by_name(options, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        fleet(*options)
