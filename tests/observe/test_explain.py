"""The story of a worker's steps: complete, in units, and true to the values it is told from."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dynacomm_async.observe import (
    describe_plan,
    explain_layers,
    explain_link,
    explain_plan,
    explain_steps,
    explain_worker,
)
from dynacomm_async.schedule import Costs, LayerCosts, Plan, lower_bound_ns, make_plan
from dynacomm_async.schedule.account import (
    LinkObserved,
    WorkerReport,
    account_for,
    expect,
    summarise,
)
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.plan import PolicyPlan
from dynacomm_async.schedule.planners import PLANNERS
from dynacomm_async.schedule.replan import Replan

MS = 1_000_000
NAMES = ["conv1", "conv2", "conv3"]
OBSERVED = LinkObserved(True, 12, 34)


def make_costs(n_layers=3, **changes):
    layers = tuple(
        # 12,500 bytes in 1 ms are 100 Mbit/s; up takes twice as long.
        LayerCosts(f"conv{n}", 12_500 * n, n * MS, 5 * MS, 7 * MS, 2 * n * MS)
        for n in range(1, n_layers + 1)
    )
    settings = {
        "overhead_up_ns": 3 * MS,
        "overhead_down_ns": 2 * MS,
        "latency_up_ns": 11 * MS,
        "latency_down_ns": 10 * MS,
        "server_ns": MS // 2,
        "workers": 2,
    }
    return Costs(layers, **(settings | changes))


def make_report(costs=None, *, plan=None, step_ns=100 * MS, link=OBSERVED, **times):
    costs = costs or make_costs()
    plan = plan or make_plan("dynacomm", costs)
    times = {"compute_ns": 36 * MS, "stalled_ns": 60 * MS, "last_slot": 1} | times
    expectation = expect(plan, costs)
    accounts = [
        account_for(index, step_ns=step_ns, settled=index > 0, expectation=expectation, **times)
        for index in range(10)
    ]
    return WorkerReport(0, 2, expectation, link, summarise(accounts), ())


def flat(text):
    return " ".join(text.split())


def test_the_link_has_rate_overhead_latency_and_observations_each_way():
    text = flat(explain_link(make_costs(), OBSERVED))

    assert "down (parameters) 100 Mbit/s 2.00 ms 10.00 ms 12 times" in text
    assert "up (gradients) 50 Mbit/s 3.00 ms 11.00 ms 34 times" in text
    assert "server takes 0.50 ms" in text
    assert "GUESS" not in text
    assert "shared" not in text


def test_a_guessed_link_and_a_shared_one_say_so():
    text = explain_link(make_costs(shared_link=True), LinkObserved(False, 3, 4))

    assert "These are GUESSES" in text
    assert "shared by 2 workers" in text


def test_a_fast_link_is_not_told_in_powers_of_ten():
    layers = (LayerCosts("a", 10**9, 500 * MS, 1, 1, 10 * MS),)
    text = explain_link(Costs(layers, overhead_up_ns=0, overhead_down_ns=0))

    assert " 16,000 Mbit/s " in text
    assert " 800,000 Mbit/s " in text


def test_a_link_that_takes_no_time_has_no_rate():
    layers = (LayerCosts("a", 10, 0, 1, 1, 0),)
    text = explain_link(Costs(layers, overhead_up_ns=0, overhead_down_ns=0))

    assert text.count("beyond measure") == 2


def test_every_layer_has_its_size_and_four_times_and_there_is_a_sum():
    text = flat(explain_layers(make_costs()))

    assert "conv2 24.4 KiB 2.00 ms 5.00 ms 7.00 ms 4.00 ms" in text
    assert "all 3 layers 73.2 KiB 6.00 ms 15.00 ms 21.00 ms 12.00 ms" in text


def test_a_deep_net_shows_its_costliest_layers_in_order_and_the_rest_together():
    costs = make_costs(60)
    rows = explain_layers(costs).splitlines()
    shown = [row.split()[0] for row in rows if row.startswith("conv")]

    assert shown == [f"conv{n}" for n in range(37, 61)]
    rest = next(flat(row) for row in rows if "smaller" in row)
    total = sum(range(1, 37))
    assert rest == (
        f"36 smaller ones {total * 12_500 / 2**20:.2f} MiB {total}.00 ms 180.00 ms 252.00 ms "
        f"{2 * total:,}.00 ms"
    )


def test_messages_are_listed_with_layers_size_and_the_times_of_the_timeline():
    costs = make_costs()
    expectation = expect(Plan.from_cuts("mine", 3, [1], [2]), costs)
    text = flat(explain_plan(expectation))

    assert "Plan in use: mine, 2 pulls and 2 pushes a step" in text
    assert "pull 1 conv1 12.2 KiB 0.00 ms 3.00 ms 13.00 ms" in text
    assert "pull 2 conv2 to conv3 (2 layers) 61.0 KiB 3.00 ms 10.00 ms 20.00 ms" in text
    # The forward ends at 20 + 5 + 5 = 30 ms, conv3's backward at 37, conv1's at 51.
    assert "push 1 conv3 36.6 KiB 37.00 ms 46.00 ms 57.00 ms" in text
    assert "push 2 conv2 to conv1 (2 layers) 36.6 KiB 51.00 ms 60.00 ms 71.00 ms" in text
    assert "forward pass ends at 30.00 ms, the backward pass at 51.00 ms" in text


def test_of_many_messages_the_middle_is_left_out_and_counted():
    costs = make_costs(40)
    rows = explain_plan(expect(make_plan("layerwise", costs), costs)).splitlines()

    for direction in ("pull", "push"):
        numbers = [int(row.split()[1]) for row in rows if re.match(rf"{direction} +\d", row)]
        assert numbers == [1, 2, 3, 4, 5, 6, 36, 37, 38, 39, 40]
    assert sum("... 29 more" in row for row in rows) == 2


def test_measured_predicted_bound_and_parts_are_told_with_their_distance():
    costs = make_costs()
    plan = Plan.from_cuts("mine", 3, [1], [2])
    report = make_report(costs, plan=plan, waited_ns=20 * MS, server_ns=4 * MS)
    text = flat(explain_worker(report))
    bound_ns = lower_bound_ns(costs).step_ns

    assert "Measured step 100.00 ms (median; half of the steps took 100.00 ms to" in text
    assert "over 9 steps, 1 to 9" in text
    # 60 ms and the last push's latency and the server's time: 71.5 ms.
    assert "Predicted step 71.50 ms, 28.5% less than measured" in text
    assert "with 20.00 ms of waiting for other workers 91.50 ms, 8.5% less" in text
    assert f"Lower bound {bound_ns / MS:.2f} ms, the measured step is" in text
    assert f"{100 * MS / bound_ns - 1:.0%} ({100 - bound_ns / MS:.2f} ms) above it" in text
    assert "computing the layers 36.00 ms 36%" in text
    assert "waiting for the link 36.00 ms 36% exposed communication" in text
    assert "waiting for other workers 20.00 ms 20% worker 1 was last in 9 of 9 steps" in text
    assert "waiting for the server 4.00 ms 4%" in text
    assert "other work of this worker 4.00 ms 4%" in text
    assert "a typical step 100.00 ms 100%" in text


def test_the_hidden_share_is_told_in_milliseconds_too():
    # Two pulls of 3 + 7 ms, two pushes of 9 + 9: the links are busy for 28 ms.
    plan = Plan.from_cuts("mine", 3, [1], [2])
    some = flat(explain_worker(make_report(plan=plan, step_ns=50 * MS, stalled_ns=10 * MS)))
    assert "Hidden share 50%: messages occupy the links 28.00 ms a step" in some
    assert "14.00 ms of that cost no time, for the step is 14.00 ms longer than its comp" in some

    none = flat(explain_worker(make_report(plan=plan, step_ns=78 * MS, stalled_ns=10 * MS)))
    assert "Hidden share -50%: messages occupy the links 28.00 ms" in none
    assert "latency and other pauses cost 14.00 ms more than overlap saves, for the step is" in none


def test_the_others_stories_leave_out_what_is_alike():
    report = make_report()
    whole, brief = explain_worker(report), explain_worker(report, brief=True)

    assert len(set(brief.splitlines()) - set(whole.splitlines())) == 1  # the plan, in one line
    assert "in forward order" not in brief
    assert "Measured step" in brief
    assert describe_plan(report.expectation.plan, NAMES) in brief


def test_a_prediction_that_could_not_be_made_in_time_says_so():
    report = make_report(waited_ns=20 * MS)
    summary = replace(report.summary, predicted_ns=None, busy_ns=None, bound=None)
    text = flat(explain_worker(replace(report, summary=summary)))
    predicted_ns = report.expectation.timeline.step_ns

    assert f"Predicted step {predicted_ns / MS:.2f} ms," in text
    assert "(made afterwards, by the costs above)" in text
    assert f"with 20.00 ms of waiting for other workers {predicted_ns / MS + 20:.2f} ms" in text
    assert "Hidden share" not in text


def test_a_worker_that_was_last_itself_says_so():
    text = explain_worker(replace(make_report(last_slot=1), slot=1))
    assert "this one was last in 9 of 9 steps" in text


def test_what_is_not_known_yet_is_not_told():
    report = make_report()
    unmeasured = flat(explain_worker(replace(report, summary=None)))
    assert "Predicted step" in unmeasured
    assert "Measured step" not in unmeasured
    assert "Hidden share" not in unmeasured

    nothing = explain_worker(replace(report, expectation=None, summary=None))
    assert "nothing to explain" in nothing


def test_a_step_below_its_bound_puts_the_costs_in_doubt():
    report = make_report(step_ns=37 * MS, stalled_ns=MS)
    text = explain_steps(report.summary, report.expectation, slot=0)

    assert "more than the measured step: the costs above are not right" in flat(text)


def test_changes_of_plan_are_told_with_reason_and_promise():
    report = make_report()
    plan = report.expectation.plan
    assert explain_worker(report).endswith("Changes of plan: none")

    replans = tuple(
        Replan(step, f"rate {step} -> 9 Mbit/s", plan, plan, 2 * MS, MS) for step in range(3, 20)
    )
    few = flat(explain_worker(replace(report, replans=replans[:2])))
    assert "Changes of plan: 2 from step 3 on (rate 3 -> 9 Mbit/s): old plan: d" in few
    assert f"old plan: {describe_plan(plan, NAMES)}, predicted step 2.00 ms" in few
    assert f"new plan: {describe_plan(plan, NAMES)}, predicted step 1.00 ms (50% less)" in few

    many = explain_worker(replace(report, replans=replans))
    assert "Changes of plan: 17, the last 12:" in many
    assert "from step 8 on" in many
    assert "from step 7 on" not in many


def test_a_plan_of_few_messages_tells_the_layers_of_each():
    plan = Plan.from_cuts("mine", 3, [1], [2])
    assert describe_plan(plan, NAMES) == (
        "mine, 2 pulls (conv1, conv2..conv3) and 2 pushes (conv3, conv2..conv1) a step"
    )
    many = Plan.from_cuts("mine", 60, range(1, 60), [])
    names = [f"layer{n}" for n in range(60)]
    assert describe_plan(many, names) == ("mine, 60 pulls and 1 push (layer59..layer0) a step")


def test_a_rule_is_told_where_a_plan_has_no_fixed_messages():
    plan = PolicyPlan("joint", 3, Policy(None, 0, True), Policy(20_000, 8_192))

    assert describe_plan(plan) == (
        "joint, front layers first and without a barrier between steps: pushes of up to 19.5 KiB "
        "once 8.0 KiB are ready, cut inside layers too, pulls of any size, whole layers"
    )
    rows = explain_plan(expect(plan, make_costs())).splitlines()
    messages = [row for row in rows if re.match(r"(pull|push) +\d", row)]
    assert messages[0].startswith("push 1")
    assert messages[-1].startswith("pull")
    assert any("part of conv3" in row for row in messages)
    assert "counted from the begin of the backward pass" in rows[-2]


NUMBER = re.compile(r"(?<![\w.])-?\d[\d,.]*")
BEFORE = re.compile(r"(Worker|worker|step|steps|pull|push|conv|rank|last|to|of|all|over) *$")
AFTER = re.compile(
    r"( ms| ?%| B\b| [KM]iB| Mbit/s| times| steps?| layers?| pulls?| pushe?s?| more| smaller"
    r"| workers| to | after| of )"
)


@pytest.mark.parametrize("strategy", PLANNERS)
@pytest.mark.parametrize("n_layers", [1, 3, 60])
def test_every_number_has_a_unit_or_a_name(strategy, n_layers):
    costs = make_costs(n_layers)
    text = explain_worker(
        make_report(
            costs, plan=make_plan(strategy, costs), step_ns=10**12, compute_ns=0, waited_ns=9 * MS
        )
    )
    for line in text.splitlines():
        assert len(line) <= 100
        for found in NUMBER.finditer(line):
            before, after = line[: found.start()], line[found.end() :]
            assert BEFORE.search(before) or AFTER.match(after), (found.group(), line)
