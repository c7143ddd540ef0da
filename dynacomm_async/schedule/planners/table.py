"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
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

__all__ = ["NEEDS_POLICY", "PLANNERS", "RUNNABLE", "check_runnable", "find_planner", "make_plan"]

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

NEEDS_POLICY = frozenset({"priority", "joint"})
"""The strategies whose plans may be policies: what runs them must have no barrier."""

RUNNABLE = tuple(name for name in PLANNERS if name not in NEEDS_POLICY)
"""The strategies that servers and workers can follow."""


def check_runnable(strategy: str) -> None:
    """Do nothing if servers and workers can follow this strategy.

    Raises:
        ConfigError: there is no such strategy, or it can only be planned with.
    """
    find_planner(strategy)
    if strategy not in RUNNABLE:
        raise ConfigError(
            f"strategy {strategy} can be planned but not run, expected one of {', '.join(RUNNABLE)}"
        )


def find_planner(strategy: str) -> Callable[[Costs], AnyPlan]:
    """Return the planner of that name.

    Raises:
        ConfigError: there is no such strategy.
    """
    planner = PLANNERS.get(strategy)
    if planner is None:
        close = get_close_matches(strategy, PLANNERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"there is no strategy {strategy!r}, expected one of {', '.join(PLANNERS)}{hint}"
        )
    return planner


def make_plan(strategy: str, costs: Costs) -> AnyPlan:
    """Return the plan of the strategy of that name.

    Raises:
        ConfigError: there is no such strategy.
    """
    return find_planner(strategy)(costs)
