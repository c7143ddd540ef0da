"""What a process says, and its last words."""

from __future__ import annotations

import pytest

from dynacomm_async.cli.lastwords import Words

TRACEBACK = "Traceback (most recent call last):\n  File 'x', line 1\nKeyError: 7\n"


def say_all(text, size):
    """(lines passed on, lines held) for a text that arrives in pieces of a size."""
    words, data, passed = Words(), text.encode(), []
    for start in range(0, len(data), size):
        passed += words.take(data[start : start + size])
    passed += words.take(b"")
    return passed, words.held, words.last


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "passed", "held"),
    [
        ("", [], []),
        ("one", [], ["one"]),
        ("one\ntwo\n\n", ["one"], ["two"]),
        ("x.py:1: UserWarning: hm\n  code()\n", ["x.py:1: UserWarning: hm", "  code()"], []),
        (f"one\n{TRACEBACK}", ["one"], TRACEBACK.splitlines()),
        (
            f"{TRACEBACK}\nDuring\n\n{TRACEBACK}", [],
            [*TRACEBACK.splitlines(), "During", *TRACEBACK.splitlines()]),
        ("\r 1%\r 2%\r99%\ndone\n", ["99%"], ["done"]),
        ("gr\u00fcn\n\u2713", ["gr\u00fcn"], ["\u2713"]),
    ],
)  # fmt: skip
def test_the_newest_line_or_traceback_is_held_back_at_any_split(text, passed, held, size):
    last = [*passed, *held][-1] if text else ""
    assert say_all(text, size) == (passed, held, last)


def test_what_was_not_the_end_is_released():
    words = Words()
    assert words.take(TRACEBACK.encode()) == []
    assert words.release() == TRACEBACK.splitlines()
    assert words.take(b"one\n") == []
    assert words.held == ["one"]
    assert words.last == "one"


def test_a_line_without_end_is_passed_on_in_parts():
    words, passed = Words(), []
    for _ in range(10):
        passed += words.take(b"x" * 20_000)
    passed += words.take(b"")
    assert "".join([*passed, *words.held]) == "x" * 200_000
    assert max(map(len, passed)) < 100_000


def test_lines_without_end_after_a_traceback_are_not_kept_for_ever():
    words = Words()
    passed = words.take(TRACEBACK.encode())
    for number in range(5000):
        passed += words.take(f"{number}\n".encode())
        assert len(words.held) <= 1000
    assert passed == [*TRACEBACK.splitlines(), *map(str, range(4999))]
