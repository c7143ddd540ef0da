"""The strategies by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType

from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import AnyPlan
from dynacomm_async.schedule.planners.bucket import plan_bucket
from dynacomm_async.schedule.planners.dynacomm import plan_dynacomm
from dynacomm_async.schedule.planners.ibatch import plan_ibatch
from dynacomm_async.schedule.planners.joint import plan_joint
from dynacomm_async.schedule.planners.layerwise import plan_layerwise
from dynacomm_async.schedule.planners.priority import plan_priority
from dynacomm_async.schedule.planners.sequential import plan_sequential

__all__ = ["CROSSING", "PLANNERS", "crosses", "find_planner", "make_plan"]

PLANNERS: Mapping[str, Callable[[Costs], AnyPlan]] = MappingProxyType(
    {
        "sequential": plan_sequential,
        "layerwise": plan_layerwise,
        "ibatch": plan_ibatch,
        "bucket": plan_bucket,
        "dynacomm": plan_dynacomm,
        "priority": plan_priority,
        "joint": plan_joint,
    }
)
"""Every strategy by its name; those with a barrier between steps first, from the plainest on."""

CROSSING = frozenset({"priority", "joint"})
"""The strategies whose plans may cross the boundary between steps, for want of a barrier."""


def find_planner(strategy: str) -> Callable[[Costs], AnyPlan]:
    """Return the planner of that name; ``priority:256k`` is priority with slices of 256 KiB.

    Raises:
        ConfigError: there is no such strategy, or no such size.
    """
    name, colon, size = strategy.partition(":")
    if colon and name == "priority":
        return partial(plan_priority, slice_nbytes=_read_size(strategy, size))
    planner = PLANNERS.get(strategy)
    if planner is None:
        close = get_close_matches(strategy, PLANNERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"there is no strategy {strategy!r}, expected one of {', '.join(PLANNERS)}{hint}"
        )
    return planner


def crosses(strategy: str) -> bool:
    """Return whether the plans of the strategy of that name may cross the step boundary."""
    return strategy.partition(":")[0] in CROSSING


def _read_size(strategy: str, text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,11})([km]?)", text.lower())
    if match is None:
        raise ConfigError(
            f"strategy {strategy!r} has no size, expected bytes, KiB or MiB such as "
            "priority:65536, priority:256k or priority:4m"
        )
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2]]


def make_plan(strategy: str, costs: Costs) -> AnyPlan:
    """Return the plan of the strategy of that name.

    Raises:
        ConfigError: there is no such strategy.
    """
    return find_planner(strategy)(costs)
