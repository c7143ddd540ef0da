"""How steps are made of contributions, and what goes with what. Pure.

====================  ============================================  ==============================
mode                  a cell changes                                 strategies
====================  ============================================  ==============================
synchronous           when all members have pushed it                all
synchronous, waiting  when all members have pushed everything        those with a barrier
quorum k              when k members have pushed everything          those with a barrier
stale, bound 0        whenever a member has pushed it                those with a barrier
stale, bound >= 1     whenever a member has pushed it                all
asynchronous          whenever a member has pushed it                all
====================  ============================================  ==============================

*joint* and *priority* plan to cross the boundary between steps: parameters of the next step come
down while gradients of this one still go up. Where the server may not send any before the step is
over, such a plan waits for what cannot come and is worse than one with a barrier, so it is refused.
Without a common step each member's own pushes release its own parameters; then it may cross.

Only the synchronous mode with a full roster promises the same bits for every strategy and every
order of arrival.

A quorum's steps are made of what comes first, so a member that is always last contributes nothing.
Under staleness every contribution is an update of its own, at the full rate, where synchronous
training makes one of their mean: N workers move about N times as far in a step, and a rate divided
by N is where to begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule.planners.table import CROSSING, PLANNERS, find_planner

__all__ = ["ON_LEAVE", "Mode", "check_mode"]

ON_LEAVE = ("end", "shrink", "wait")
"""What becomes of training when a member is gone for good: it ends; it goes on with those who are
left, and newcomers may join; or the same, but the member's step can be computed anew by a newcomer
for as long as its place is kept, and the place of one that left in order is kept too."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How a run deals with members that are slow or gone.

    Attributes:
        on_leave: one of :data:`ON_LEAVE`; None: ``end`` in synchronous training, else ``shrink``.
        quorum: how many whole contributions make a step; None: every member's.
        staleness: how many steps a member may be ahead of the slowest, ``math.inf`` for
            asynchronous training; None: nobody is, training is synchronous.

    Raises:
        ConfigError: values that cannot be, or do not go together.
    """

    on_leave: str | None = None
    quorum: int | None = None
    staleness: float | None = None

    def __post_init__(self) -> None:
        if self.on_leave not in (None, *ON_LEAVE):
            raise ConfigError(f"on_leave is {self.on_leave!r}, expected {', '.join(ON_LEAVE)}")
        if self.quorum is not None and self.quorum < 1:
            raise ConfigError(f"a quorum of {self.quorum}, expected at least 1")
        if self.staleness is not None and (
            not self.staleness >= 0 or self.staleness not in (math.inf, self.staleness // 1)
        ):
            raise ConfigError(
                f"staleness is {self.staleness}, expected a whole number of steps from 0, or "
                "infinity for asynchronous training"
            )
        if self.quorum is not None and self.staleness is not None:
            raise ConfigError(
                "a quorum makes common steps, and with staleness there are none: choose one of them"
            )
        if self.quorum is not None and self.on_leave == "wait":
            raise ConfigError(
                "a quorum goes on without those who are missing: choose on_leave 'shrink', under "
                "which a newcomer takes part at once, or 'end'"
            )

    @property
    def leaving(self) -> str:
        """What a leaving does: one of :data:`ON_LEAVE`."""
        loose = self.quorum is not None or self.staleness is not None
        return self.on_leave or ("shrink" if loose else "end")

    @property
    def barrier(self) -> bool:
        """Whether no parameter changes before the step is complete."""
        return self.quorum is not None or (self.staleness is None and self.leaving == "wait")

    @property
    def is_elastic(self) -> bool:
        """Whether the data are divided anew when members come and go."""
        return self.quorum is None and self.staleness is None and self.leaving != "end"

    @property
    def may_cross(self) -> bool:
        """Whether parameters of the next step can come down before a step is over."""
        return not self.barrier and self.staleness != 0


def check_mode(mode: Mode, strategy: str, *, workers: int) -> None:
    """Make sure that a strategy holds in a mode.

    Raises:
        ConfigError: it does not, there is no such strategy, or the quorum cannot be reached.
    """
    find_planner(strategy)
    if mode.quorum is not None and mode.quorum > workers:
        raise ConfigError(f"a quorum of {mode.quorum} among {workers} workers cannot be reached")
    if strategy not in CROSSING:
        return
    why = None
    if mode.quorum is not None:
        why = "a quorum decides over a step as a whole"
    elif mode.staleness == 0:
        why = "staleness 0 holds a step back until all have finished the one before"
    elif mode.barrier:
        why = "a replacement that is waited for needs every parameter of its step unchanged"
    if why is not None:
        others = ", ".join(name for name in PLANNERS if name not in CROSSING)
        raise ConfigError(
            f"{strategy} sends parameters before a step is over, but {why}: expected one of "
            f"{others}"
        )
