"""Telling what a process says from its last words, which may be the error that ended it.

Only the end of a process shows that a line was its last. So the newest line is held back (unless it
is indented, as the second line of a warning is: no error ends so), and from the head of a traceback
on everything: the one who reports the end of the process quotes its last line, and what is held is
dropped. Everything before can be passed on at once.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Words"]

_TRACEBACKS: Final = ("Traceback (most recent call last)", "  + Exception Group Traceback")
_MOST_HELD: Final = 1000
_MOST_CHARACTERS: Final = 65536


class Words:
    """The lines that a process prints, in pieces as they arrive.

    Attributes:
        held: the lines that may be its last words; without empty ones.
    """

    def __init__(self) -> None:
        self.held: list[str] = []
        self._last = ""
        self._rest = b""

    @property
    def last(self) -> str:
        """The last line of all; empty if there was none."""
        return self._last

    def take(self, data: bytes) -> list[str]:
        """Add a piece; nothing is the end. Return the lines that are not the last words.

        Of a line that is rewritten in place, such as a progress bar, the newest state counts.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _MOST_CHARACTERS:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
            if text:
                self._last = text
                self.held.append(text)
        return self._pass(self._begin_last_words())

    def release(self) -> list[str]:
        """Return what is held: those were not its last words."""
        return self._pass(len(self.held))

    def _begin_last_words(self) -> int:
        if len(self.held) > _MOST_HELD:
            return len(self.held) - 1
        newest = 0 if not self.held or self.held[-1].startswith(" ") else 1
        heads = (i for i, line in enumerate(self.held) if line.startswith(_TRACEBACKS))
        return next(heads, len(self.held) - newest)

    def _pass(self, n_lines: int) -> list[str]:
        passed, self.held = self.held[:n_lines], self.held[n_lines:]
        return passed
