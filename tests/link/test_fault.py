"""Faults as text."""

from __future__ import annotations

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.link import Fault, parse_fault

FAULTS = {
    "reset:up@bytes=100000": Fault("reset", "up", at_nbytes=100000),
    "reset@bytes=10,every=20,connection=3": Fault("reset", at_nbytes=10, every=20, connection=3),
    "stall:both@time=2s,for=3s": Fault("stall", at_s=2.0, for_s=3.0),
    "cut:down@time=0.1ms,every=250us": Fault("cut", "down", at_s=1e-4, every=2.5e-4),
    "slice:down,size=7": Fault("slice", "down", size=7),
    "slice,size=random,seed=5": Fault("slice", size=0, seed=5),
    "slow-close:up,for=1s": Fault("slow-close", "up", for_s=1.0),
    "down@time=5s,for=2s,every=30s": Fault("down", at_s=5.0, for_s=2.0, every=30.0),
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_what_its_text_says_and_its_text_says_exactly_what_it_is(text: str) -> None:
    assert parse_fault(text) == FAULTS[text]
    assert parse_fault(str(FAULTS[text])) == FAULTS[text]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not of the form"),
        ("explode:up@bytes=1", "'explode', known are reset, cut, stall, slice, slow-close, down"),
        ("rest:up@bytes=1", r"unknown fault 'rest' \(did you mean reset\?\), known are reset, cut"),
        ("slow_close,for=1s", "not of the form"),
        ("reset:sideways@bytes=1", "unknown direction 'sideways', known are up, down, both"),
        ("reset@byte=1", r"unknown name 'byte' \(did you mean bytes\?\), known are bytes, time"),
        ("reset:up", "say when"),
        ("reset@bytes=1,time=1s", "give one"),
        ("reset@bytes=0", "above 0"),
        ("reset@bytes=many", "not a whole number"),
        ("reset@bytes=1,bytes=2", "twice"),
        ("reset@bytes=1,for=1s", "has no for"),
        ("reset@bytes=1,every=1s", "not a whole number"),
        ("stall@bytes=1", "needs for"),
        ("stall@time=soon,for=1s", "not a duration"),
        ("slice:up", "needs size"),
        ("slice:up,size=0", "at least 1"),
        ("slice,size=3,every=5s", "needs bytes"),
        ("slice,size=3,shape=5", "unknown name 'shape'"),
        ("down@time=1s,for=1s,connection=1", "all connections"),
    ],
)
def test_what_is_no_fault_gets_one_line_that_says_why_with_an_example(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        parse_fault(text)
    assert "reset:up@bytes=100000" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fault_that_is_fired_by_hand_has_no_trigger() -> None:
    assert parse_fault("reset", on_demand=True) == Fault("reset")
    with pytest.raises(ConfigError, match="leave bytes= and time= out"):
        parse_fault("reset@time=1s", on_demand=True)
