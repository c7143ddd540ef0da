"""The strategies that turn a cost table into a plan, one module each, and the table of them."""

from __future__ import annotations

from dynacomm_async.schedule.planners.bucket import plan_bucket
from dynacomm_async.schedule.planners.dynacomm import plan_dynacomm
from dynacomm_async.schedule.planners.ibatch import plan_ibatch
from dynacomm_async.schedule.planners.joint import plan_joint
from dynacomm_async.schedule.planners.layerwise import plan_layerwise
from dynacomm_async.schedule.planners.priority import plan_priority
from dynacomm_async.schedule.planners.sequential import plan_sequential
from dynacomm_async.schedule.planners.table import (
    CROSSING,
    PLANNERS,
    crosses,
    find_planner,
    make_plan,
)

__all__ = [
    "CROSSING",
    "PLANNERS",
    "crosses",
    "find_planner",
    "make_plan",
    "plan_bucket",
    "plan_dynacomm",
    "plan_ibatch",
    "plan_joint",
    "plan_layerwise",
    "plan_priority",
    "plan_sequential",
]
