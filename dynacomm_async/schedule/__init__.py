"""Which parameters and gradients to send together, and when: cost tables, plans, the cost model
that judges them, the strategies that make them, the rule a sender follows, and the estimates that
measured durations give, and where the time of a step went. Pure: standard library only, integer
nanoseconds and bytes, no clock."""

from __future__ import annotations

from dynacomm_async.schedule.account import (
    Expectation,
    LinkObserved,
    StepAccount,
    Summary,
    WorkerReport,
    account_for,
    expect,
    summarise,
)
from dynacomm_async.schedule.costs import Costs, LayerCosts
from dynacomm_async.schedule.crossing import Crossing
from dynacomm_async.schedule.dispatch import (
    Dispatcher,
    OrderedDispatcher,
    Policy,
    PriorityDispatcher,
)
from dynacomm_async.schedule.estimator import Estimator, LayerTimes, LinkEstimator
from dynacomm_async.schedule.forecast import Forecast, bound_of_all_ns, forecast
from dynacomm_async.schedule.layout import Layout
from dynacomm_async.schedule.plan import (
    AnyPlan,
    Plan,
    PolicyPlan,
    Segment,
    cut_segments,
    read_plan,
)
from dynacomm_async.schedule.planners import (
    CROSSING,
    PLANNERS,
    crosses,
    find_planner,
    make_plan,
)
from dynacomm_async.schedule.timeline import (
    Computation,
    LowerBound,
    Timeline,
    Transfer,
    evaluate,
    lower_bound_ns,
)

__all__ = [
    "CROSSING",
    "PLANNERS",
    "AnyPlan",
    "Computation",
    "Costs",
    "Crossing",
    "Dispatcher",
    "Estimator",
    "Expectation",
    "Forecast",
    "LayerCosts",
    "LayerTimes",
    "Layout",
    "LinkEstimator",
    "LinkObserved",
    "LowerBound",
    "OrderedDispatcher",
    "Plan",
    "Policy",
    "PolicyPlan",
    "PriorityDispatcher",
    "Segment",
    "StepAccount",
    "Summary",
    "Timeline",
    "Transfer",
    "WorkerReport",
    "account_for",
    "bound_of_all_ns",
    "crosses",
    "cut_segments",
    "evaluate",
    "expect",
    "find_planner",
    "forecast",
    "lower_bound_ns",
    "make_plan",
    "read_plan",
    "summarise",
]
