from __future__ import annotations

import argparse

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.link import (
    LinkSettings,
    add_arguments,
    addresses_from,
    arguments_of,
    settings_from,
)


def _parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--listen", "127.0.0.1:0", "--to", "[::1]:7070", *options])


def test_without_options_the_link_changes_nothing() -> None:
    assert settings_from(_parse()) == LinkSettings()


def test_every_option_reaches_its_setting() -> None:
    args = _parse(
        *("--bandwidth", "100mbit", "--bandwidth-up", "20mbit", "--delay", "5ms"),
        *("--overhead", "2ms", "--half-duplex", "--shared"),
        *("--schedule", "0s:100mbit,20s:20mbit"),
    )
    assert settings_from(args) == LinkSettings(
        rate_down_bytes_per_s=12.5e6,
        rate_up_bytes_per_s=2.5e6,
        delay_s=0.005,
        overhead_s=0.002,
        half_duplex=True,
        shared=True,
        schedule=((0.0, 12.5e6, 12.5e6), (20.0, 2.5e6, 2.5e6)),
    )
    assert addresses_from(args) == (("127.0.0.1", 0), ("::1", 7070))


def test_one_bandwidth_holds_for_both_directions() -> None:
    settings = settings_from(_parse("--bandwidth", "8mbit"))
    assert settings.rate_up_bytes_per_s == settings.rate_down_bytes_per_s == 1e6


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--bandwidth", "fast"),
        ("--bandwidth-up", "0mbit"),
        ("--delay", "5"),
        ("--overhead", "-1ms"),
        ("--schedule", "soon"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: "):
        settings_from(_parse(f"{option}={value}"))


def test_a_server_without_a_port_is_refused() -> None:
    with pytest.raises(ConfigError, match="port 0"):
        addresses_from(_parse("--to", "localhost:0"))


@pytest.mark.parametrize(
    "settings",
    [
        LinkSettings(),
        LinkSettings(1e7 / 3, None, 1 / 3, 1e-7 / 3, True, True),
        LinkSettings(schedule=((0.0, 1e7 / 3, None), (1e-5 / 3, None, 0.1))),
    ],
)
def test_settings_survive_the_way_through_the_command_line_exactly(settings: LinkSettings) -> None:
    assert settings_from(_parse(*arguments_of(settings))) == settings
