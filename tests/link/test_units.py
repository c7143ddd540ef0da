from __future__ import annotations

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.link import (
    format_duration,
    format_rate,
    parse_duration,
    parse_rate,
    parse_schedule,
)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("8bit", 1.0),
        ("1kbit", 125.0),
        ("100mbit", 12.5e6),
        ("1.5gbit", 187.5e6),
        (" 100Mbit ", 12.5e6),
        ("100 mbit", 12.5e6),
        ("unlimited", None),
    ],
)
def test_a_rate_is_read_as_decimal_bits_and_returned_as_bytes(
    text: str, bytes_per_s: float | None
) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    "text", ["", "100", "mbit", "-1mbit", "0mbit", "nanmbit", "1mb", "100mbit/s", "1e999mbit"]
)
def test_what_is_not_a_rate_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 100mbit") as refusal:
        parse_rate(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5ms", 5e-3), ("250us", 250e-6), ("1.5s", 1.5), ("0ms", 0.0), ("0", 0.0)]
)
def test_a_duration_is_read_as_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "ms", "-5ms", "5min", "infs", "5 m s"])
def test_what_is_not_a_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 5ms") as refusal:
        parse_duration(text)
    assert repr(text) in str(refusal.value)


def test_a_schedule_gives_both_directions_one_rate_unless_they_are_set_apart() -> None:
    assert parse_schedule("0s:100mbit,20s:20mbit/unlimited") == (
        (0.0, 12.5e6, 12.5e6),
        (20.0, 2.5e6, None),
    )


@pytest.mark.parametrize("text", ["", "0s", "0s:", ":1mbit", "0s:1mbit,,", "5:1mbit", "0s:1mbit/"])
def test_what_is_not_a_schedule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_schedule(text)


def test_a_schedule_that_goes_back_in_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="times must increase"):
        parse_schedule("5s:1mbit,5s:2mbit")


@pytest.mark.parametrize("text", ["1bit", "999kbit", "100mbit", "1.5gbit", "unlimited"])
def test_a_formatted_rate_reads_back_as_itself(text: str) -> None:
    assert format_rate(parse_rate(text)) == text


@pytest.mark.parametrize("text", ["0s", "250us", "5ms", "1.5s", "90s"])
def test_a_formatted_duration_reads_back_as_itself(text: str) -> None:
    assert format_duration(parse_duration(text)) == text
