"""Which plan is followed when: warm-up, the strategy, and no change without a gain."""

from __future__ import annotations

import logging
import random
from fractions import Fraction
from types import SimpleNamespace

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.models import build, costs_of
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import Costs, LayerCosts, Plan, evaluate
from dynacomm_async.schedule.planners import PLANNERS
from dynacomm_async.schedule.robust import LARGEST_ERROR, plan_robust
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.worker.planning import (
    WARMUP_STEPS,
    AdaptivePlans,
    FixedPlan,
    subscription,
    uplink,
)


class Told:
    """An estimator that is told what it has measured."""

    def __init__(self, costs=None, rate_error=0.0):
        self.now = costs
        self.up = self.down = SimpleNamespace(rate_error=rate_error)

    def costs(self):
        return self.now


def think_and_plan(plans, step):
    plans.refresh()
    return plans.plan(step)


def draw_costs(numbers, n_layers=6):
    def draw():
        return numbers.randint(0, 100)

    layers = tuple(
        LayerCosts(f"layer{index}", 1, draw(), draw(), draw(), draw()) for index in range(n_layers)
    )
    overhead = numbers.choice([0, 5, 60])
    return Costs(layers, overhead_up_ns=overhead, overhead_down_ns=overhead)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 7, 22])
def test_warm_up_steps_cover_all_layers_and_cut_them_differently_where_that_can_be(n_layers):
    plans = AdaptivePlans("dynacomm", Told(), n_layers)
    chosen = [plans.plan(step) for step in range(WARMUP_STEPS)]

    assert {plan.n_layers for plan in chosen} == {n_layers}
    for plan in chosen:
        covered = [layer for segment in plan.pull for layer in segment.layers]
        assert covered == list(range(n_layers))
        assert plan.push == plan.pull[::-1]
    n_messages = [len(plan.pull) for plan in chosen]
    assert n_messages == [n_layers, (n_layers + 1) // 2, n_layers]


@pytest.mark.parametrize("strategy", PLANNERS)
def test_after_the_warm_up_the_strategys_own_plan_is_followed(strategy):
    costs = draw_costs(random.Random(1))
    plans = AdaptivePlans(strategy, Told(costs), 6, robust=False)
    for step in range(WARMUP_STEPS):
        plans.plan(step)

    assert think_and_plan(plans, WARMUP_STEPS) == PLANNERS[strategy](costs)


def test_nothing_measured_yet_means_layer_by_layer_until_something_is():
    told = Told()
    plans = AdaptivePlans("sequential", told, 6)
    for step in range(WARMUP_STEPS):
        plans.plan(step)
    fallback = think_and_plan(plans, WARMUP_STEPS)
    told.now = draw_costs(random.Random(2))

    assert len(fallback.pull) == len(fallback.push) == 6
    assert think_and_plan(plans, WARMUP_STEPS + 1) == PLANNERS["sequential"](told.now)


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_is_replaced_exactly_when_the_new_one_promises_two_percent_less(seed):
    numbers = random.Random(seed)
    base, told = draw_costs(numbers), Told()
    plans = AdaptivePlans("dynacomm", told, 6, robust=False)
    current, changes = None, 0
    for step in range(WARMUP_STEPS, WARMUP_STEPS + 30):
        told.now = base if numbers.random() < 0.3 else draw_costs(numbers)
        fresh = PLANNERS["dynacomm"](told.now)
        if current is None:
            current = fresh
        elif fresh != current:
            gain = Fraction(evaluate(fresh, told.now).step_ns, evaluate(current, told.now).step_ns)
            if gain <= Fraction(98, 100):
                current, changes = fresh, changes + 1
        assert think_and_plan(plans, step) == current
    assert changes > 0


@pytest.mark.parametrize(("gain_ns", "replaced"), [(19, False), (20, True), (21, True)])
def test_two_percent_is_just_enough(gain_ns, replaced):
    whole = Plan.from_cuts("dynacomm", 2, [], [])
    told = Told(_step_costs(1000, 0))
    plans = AdaptivePlans("dynacomm", told, 2, robust=False)
    assert think_and_plan(plans, WARMUP_STEPS) == whole
    told.now = _step_costs(1000, gain_ns)
    assert evaluate(whole, told.now).step_ns == 1000
    fresh = PLANNERS["dynacomm"](told.now)
    assert evaluate(fresh, told.now).step_ns == 1000 - gain_ns

    assert (think_and_plan(plans, WARMUP_STEPS + 1) == fresh != whole) == replaced


def _step_costs(whole_ns, gain_ns):
    """Two layers: pushed as one they take ``whole_ns``, pushed apart ``gain_ns`` less."""
    back = LayerCosts("b", 1, 0, 0, 0, gain_ns)
    front = LayerCosts("a", 1, 0, 0, 100, whole_ns - 100 - gain_ns)
    return Costs((front, back), overhead_up_ns=0, overhead_down_ns=0)


def test_changes_tell_from_which_step_on_each_plan_was_followed():
    told = Told(_step_costs(1000, 0))
    plans = AdaptivePlans("dynacomm", told, 2, robust=False)
    followed = {}
    for step in range(10):
        if step == 6:
            told.now = _step_costs(1000, 100)
        followed[step] = think_and_plan(plans, step)

    assert [step for step, _ in plans.changes] == [
        step for step in followed if step == 0 or followed[step] != followed[step - 1]
    ]
    assert plans.changes[-1] == (6, followed[6])
    for step, plan in followed.items():
        assert plans.plan_of(step) == plan


def test_a_fixed_plan_is_followed_at_every_step():
    plan = Plan.from_cuts("mine", 5, [2], [1, 4])
    plans = FixedPlan(plan)

    assert {plans.plan(step) for step in range(5)} == {plan}
    assert plans.changes == [(0, plan)]


def test_a_plan_fixed_later_holds_from_the_next_choice_on_and_warm_up_until_then():
    plan = Plan.from_cuts("mine", 5, [2], [1, 4])
    plans = FixedPlan(n_layers=5)
    before = [plans.plan(step) for step in range(2)]
    plans.fixed = plan

    assert plan not in before
    assert [before[0].n_layers, len(before[0].pull), len(before[1].pull)] == [5, 5, 3]
    assert plans.plan(2) == plans.plan(3) == plan
    assert [plans.plan_of(step) for step in range(4)] == [*before, plan, plan]


def test_an_unknown_strategy_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"no strategy 'dynacom'.*did you mean dynacomm"):
        AdaptivePlans("dynacom", Told(), 3)


def test_a_plan_becomes_one_message_of_cells_per_segment_in_the_order_sent():
    grid = Grid([LayerSpec("a", 5000), LayerSpec("b", 10), LayerSpec("c", 9000, statistics=3)])
    plan = Plan.from_cuts("mine", 3, [2], [1])

    asked = subscription(plan, 7, grid)
    assert asked.version == 7
    assert asked.barrier
    assert asked.messages == ((Range(0, 3),), (Range(3, 3),))
    pushed = uplink(plan, grid)
    pushed.ready(0, 6)
    assert [pushed.next(), pushed.next()] == [(Range(2, 4),), (Range(0, 2),)]
    assert pushed.done


def paper_costs(bytes_per_s):
    return costs_of(
        build("googlenet"),
        batch=16,
        flops_per_s=1e12,
        down_bytes_per_s=bytes_per_s,
        overhead_ns=1_000_000,
    )


def test_dynacomm_reckons_with_the_errors_of_the_rates_unless_told_not_to():
    costs = paper_costs(125e6)
    told = Told(costs, rate_error=0.2)
    robust, nominal = (
        think_and_plan(AdaptivePlans("dynacomm", told, 58, robust=choice), WARMUP_STEPS)
        for choice in (True, False)
    )

    assert robust == plan_robust(costs, LARGEST_ERROR, LARGEST_ERROR)
    assert nominal == PLANNERS["dynacomm"](costs) != robust
    by_default = AdaptivePlans("dynacomm", told, 58)
    assert think_and_plan(by_default, WARMUP_STEPS) == robust


def test_every_change_of_plan_is_logged_with_its_reason_and_what_it_promises(caplog):
    caplog.set_level(logging.INFO, logger="dynacomm_async.worker")
    fast, slow = paper_costs(1.25e9), paper_costs(125e6)
    told = Told(fast)
    plans = AdaptivePlans("dynacomm", told, 58)
    followed = []
    for step in range(12):
        if step == 8:
            told.now = slow
        followed.append(plans.plan(step))
        plans.refresh()

    first, second = plans.log
    assert (first.step, second.step) == (WARMUP_STEPS, 9)
    assert first.reason.startswith("first estimate: down 10000 Mbit/s and 1.00 ms a message")
    assert second.reason == "downlink rate 10000 -> 1000 Mbit/s, uplink rate 10000 -> 1000 Mbit/s"
    for entry in plans.log:
        assert (entry.before, entry.after) == (followed[entry.step - 1], followed[entry.step])
        assert entry.after_ns == evaluate(entry.after, fast if entry is first else slow).step_ns
        assert entry.before_ns == evaluate(entry.before, fast if entry is first else slow).step_ns
    assert second.after_ns < 0.98 * second.before_ns
    assert caplog.messages == [str(first), str(second)]


def test_the_log_of_a_link_that_never_rests_is_bounded():
    tables = [paper_costs(1.25e9), paper_costs(125e6)]
    told = Told(tables[0])
    plans = AdaptivePlans("dynacomm", told, 58)
    for step in range(400):
        told.now = tables[step % 2]
        think_and_plan(plans, step)

    assert len(plans.log) == plans.log.maxlen == 256
    assert plans.log[-1].step == 399


def test_a_plan_made_beforehand_has_nothing_to_log():
    plans = FixedPlan(Plan.from_cuts("mine", 5, [2], [1, 4]))
    for step in range(5):
        think_and_plan(plans, step)
    assert not plans.log


def test_gradients_of_a_warm_up_step_wait_for_each_other_and_others_do_not():
    grid = Grid([LayerSpec("a", 5000), LayerSpec("b", 10)])
    plans = AdaptivePlans("layerwise", Told(), 2)
    warmup, layerwise = plans.plan(0), plans.plan(WARMUP_STEPS)
    back = grid.layer_cells(1)

    for plan, leaves in ((warmup, False), (layerwise, True)):
        dispatcher = uplink(plan, grid)
        dispatcher.ready(*back)
        assert (dispatcher.next() is not None) == leaves
        dispatcher.ready(*grid.layer_cells(0))
        assert dispatcher.next() is not None
