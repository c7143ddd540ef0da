"""Named places at which a test makes a process fail; they cost one comparison when off.

``failpoint("server.after-apply")`` does nothing unless something was armed, in code with
:func:`arm`, or for a whole process by the environment before it starts::

    DYNACOMM_FAILPOINTS="server.after-apply=kill@7" dynacomm serve ...

kills the process with SIGKILL when it comes to that place for the seventh time; ``hang`` in place
of ``kill`` keeps the thread that comes there, as a disk that has stopped answering would. Several
are separated by commas. Whoever arms them counts what they hit: with ``DYNACOMM_FAILPOINTS_LOG``
set, each one that fires leaves a line with its name in that file before it does.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping

from dynacomm_async.errors import ConfigError

__all__ = ["FAILPOINTS", "arm", "arm_from", "disarm", "failpoint"]

FAILPOINTS = (
    "server.greeted",  # a rank was given, or given back, and nobody knows yet
    "server.receiving",  # the head of a push is there, and its gradients are about to land
    "server.before-push",  # they have landed, and count for nothing yet
    "server.after-push",  # they count, and nothing has been applied because of them
    "server.before-apply",  # complete cells are about to change
    "server.after-apply",  # they have changed, and nothing of it has been sent
    "server.step-ended",  # all cells are at the next version
    "server.before-save",  # a checkpoint is due
    "server.snapshot",  # it was copied, and is about to be written
    "server.writing",  # some of its files are on the disk, and others are not
    "server.before-rename",  # it is there as a whole, under a name that says that it may not be
    "server.after-rename",  # it has its own name, which the disk may not know yet
    "server.after-have",  # a member is back and is about to be told what has arrived
    "worker.before-push",  # a gradient message is about to be sent
    "worker.after-push",  # it has nearly left
    "worker.parameters",  # parameters have landed, and count for nothing yet
    "worker.lost",  # the connection is gone
    "worker.before-resume",  # a new one is there
    "worker.rolled-back",  # the server has stepped back
)
"""Every name there is."""

_action: Callable[[str], None] | None = None


def failpoint(name: str) -> None:
    """Come to a named place."""
    if _action is not None:
        _action(name)


def arm(action: Callable[[str], None]) -> None:
    """Call ``action`` with the name of every failpoint that is come to."""
    global _action
    _action = action


def disarm() -> None:
    """Let failpoints do nothing again."""
    global _action
    _action = None


def arm_from(environment: Mapping[str, str]) -> None:
    """Arm what ``DYNACOMM_FAILPOINTS`` says; nothing if it is not set.

    Raises:
        ConfigError: it says something else than ``NAME=kill@N`` or ``NAME=hang@N``.
    """
    text = environment.get("DYNACOMM_FAILPOINTS", "")
    if not text:
        return
    due: dict[str, tuple[str, int]] = {}
    for part in text.split(","):
        name, _, rest = part.partition("=")
        what, _, count = rest.partition("@")
        if name not in FAILPOINTS or what not in _FAILURES or not count.isdigit():
            raise ConfigError(
                f"DYNACOMM_FAILPOINTS: {part!r}, expected NAME=kill@N or NAME=hang@N with a NAME "
                f"of {', '.join(FAILPOINTS)}"
            )
        due[name] = (what, int(count))
    log = environment.get("DYNACOMM_FAILPOINTS_LOG")
    seen: Counter[str] = Counter()

    def fail(name: str) -> None:
        seen[name] += 1
        what, count = due.get(name, ("", 0))
        if seen[name] == count:
            if log is not None:
                with open(log, "a", encoding="utf-8") as file:  # noqa: PTH123 -- one call before the end
                    file.write(f"{name}\n")
            _FAILURES[what]()

    arm(fail)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    threading.Event().wait()


_FAILURES = {"kill": _kill, "hang": _hang}


arm_from(os.environ)
