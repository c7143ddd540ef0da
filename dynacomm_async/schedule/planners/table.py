"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import Plan
from dynacomm_async.schedule.planners.bucket import plan_bucket
from dynacomm_async.schedule.planners.dynacomm import plan_dynacomm
from dynacomm_async.schedule.planners.ibatch import plan_ibatch
from dynacomm_async.schedule.planners.layerwise import plan_layerwise
from dynacomm_async.schedule.planners.sequential import plan_sequential

__all__ = ["PLANNERS", "find_planner", "make_plan"]

PLANNERS: Mapping[str, Callable[[Costs], Plan]] = MappingProxyType(
    {
        "sequential": plan_sequential,
        "layerwise": plan_layerwise,
        "ibatch": plan_ibatch,
        "bucket": plan_bucket,
        "dynacomm": plan_dynacomm,
    }
)
"""Every strategy by its name, from the plainest to the best."""


def find_planner(strategy: str) -> Callable[[Costs], Plan]:
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


def make_plan(strategy: str, costs: Costs) -> Plan:
    """Return the plan of the strategy of that name.

    Raises:
        ConfigError: there is no such strategy.
    """
    return find_planner(strategy)(costs)
