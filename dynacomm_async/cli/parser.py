"""The parser of a command's options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Reports an error in one line that says what to do; options cannot be abbreviated."""

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the options; exit with code 2 where one is not known."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggest(unknown)}")
        return found

    def _suggest(self, unknown: Sequence[str]) -> str:
        """Say which options were probably meant by those that are none."""
        flags = [text.partition("=")[0] for text in unknown if text.startswith("--")]
        close = [get_close_matches(flag, self._option_string_actions, n=1) for flag in flags]
        meant = " and ".join(match for matches in close for match in matches)
        return f"; did you mean {meant}?" if meant else ""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")
