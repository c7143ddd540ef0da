"""The best policies for both directions of a step across the step boundary, found by search.

Gradients of a step go up while parameters of the next come down, the front layers first, in
messages of a size that suits the link. Which size is a trade: a message costs its overhead, and
while it goes up nothing of it comes down. Bytes that take G each way, cut into s messages, turn
around in G + G / s + (s + 1) * overhead (:func:`dynacomm_async.schedule.timeline.lower_bound_ns`),
least for messages of sqrt(G * overhead) each. Where gradients become ready late, or the front
layers' parameters are awaited, other sizes are better. So sizes around that one, each with
several thresholds, are tried in the simulation of a step
(:mod:`dynacomm_async.schedule.crossing`), and then, from the best of these on, changes of one
setting at a time.

Where that leaves a gap to the lower bound, and messages are few, plans that name their messages are
tried as well (:mod:`dynacomm_async.schedule.explicit`). They must be clearly better: a policy
adapts to what really becomes ready when, a list does not.

DynaComm's plan is a candidate too, at its barrier and with its pulls as early as they can be, so
that the result is never worse than it in the model; the barrier goes only where that is clearly
better, for more messages depend more on a well estimated overhead. The search ends early where the
lower bound is all but reached. Everything is in integers: equal tables give equal plans everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import isqrt
from typing import NamedTuple

from dynacomm_async.ranges import CELL_NBYTES
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.crossing import Crossing, Sent
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.explicit import search_segments
from dynacomm_async.schedule.plan import AnyPlan, Plan, PolicyPlan
from dynacomm_async.schedule.planners.dynacomm import plan_dynacomm
from dynacomm_async.schedule.timeline import lower_bound_ns

__all__ = ["plan_joint"]

_SIZES = (140, 70, 100, 35, 200, 50, 300, 500, 1000)
"""Percent of the size that a simple argument suggests; the likeliest first: a good plan early
makes short work of bad ones."""

_FEW = 6
"""Messages of all bytes cut into 1, 2, ... are tried too: where overheads are large, it is few."""

_NUMBERS = ("push_cap", "push_threshold", "pull_cap", "pull_threshold")
_CHANGES = (50, 200, 70, 140, 85, 118, 95, 105)
"""Percent of itself to which a number of a setting is changed in the last search."""

_CLOSE_PER_MILLE = 1001
_NEAR_PER_MILLE = 1003
"""A plan that is this close to the bound ends the search, or does without the last one."""

_PROMISING_PERCENT = 110
_MOST_STARTS = 6
"""The last search begins at the best of what is not worse than the best by more than this."""

_CLEARLY_BETTER_PER_MILLE = 995
"""What a list of messages must reach of a policy's step, and either of DynaComm's, to be chosen."""

_MOST_NAMED = 16
"""Messages each way of the best policy with which a search for lists begins."""

_AGREEING_PER_MILLE = 1020
"""A step that is at most this much longer by the model is worth sizes, or an order, that workers
mostly agree on: where they differ, cells wait at the server for whoever sends them later."""

_MOST_MESSAGES = 128
"""In one direction. Finer ones gain less than a percent by the model, which does not count the
processor time that each message takes at both ends."""

_MOST_WORK = 8_000
"""Messages that are simulated before the search ends; that many take a tenth of a second."""


def plan_joint(costs: Costs, pause: Callable[[], object] = lambda: None) -> AnyPlan:
    """Return the best plan found, with or without a barrier between steps.

    On a half-duplex link nothing is gained by using both directions at once: DynaComm's plan.
    Some hundred simulations, most of them cut short, O(K log K) each for K messages: tens of
    milliseconds for networks of a hundred layers.

    Args:
        pause: called about once in a millisecond of work, to let other threads have their turn.
    """
    if costs.half_duplex:
        return replace(plan_dynacomm(costs), strategy="joint")
    search = _Search(costs, pause)
    search.run()
    search.name_messages(costs)
    if costs.workers > 1:
        search.agree()
    return search.choice


class _Setting(NamedTuple):
    """What is varied: policies, in bytes."""

    push_cap: int
    push_threshold: int
    pull_cap: int
    pull_threshold: int
    whole_layers: bool


class _Search:
    """The best plan so far, and the ways to look for a better one."""

    def __init__(self, costs: Costs, pause: Callable[[], object]) -> None:
        self._pause = pause
        self._crossing = Crossing(costs)
        self._bound_ns = lower_bound_ns(costs).step_ns
        self._n_layers = len(costs.layers)
        self._nbytes = nbytes = self._crossing.layout.nbytes
        up_ns = sum([layer.push_ns for layer in costs.layers])
        down_ns = sum([layer.pull_ns for layer in costs.layers])
        computing_ns = sum([layer.forward_ns + layer.backward_ns for layer in costs.layers])
        self._is_slow = up_ns >= computing_ns  # the link
        self._push_unit = _unit_nbytes(nbytes, up_ns, costs.overhead_up_ns)
        self._pull_unit = _unit_nbytes(nbytes, down_ns, costs.overhead_down_ns)
        self._overhead_nbytes = costs.overhead_up_ns * nbytes // up_ns if up_ns else 0
        self._pushed: dict[Policy, list[Sent]] = {}
        self._steps_ns: dict[_Setting, int | None] = {}
        plain = replace(plan_dynacomm(costs), strategy="joint")
        self._plain, self._plain_ns = plain, self._crossing.step_ns(plain)
        self.plan: AnyPlan = plain
        self.step_ns = self._plain_ns
        early = _pull_early(plain)
        early_ns = self._crossing.step_ns(early)
        if early_ns < self.step_ns:
            self.plan, self.step_ns = early, early_ns

    def run(self) -> None:
        """Look for a better plan until there is little to gain."""
        for setting in self._grid():
            self._try(setting)
        if self._is_within(_NEAR_PER_MILLE):
            return
        limit_ns = self.step_ns * _PROMISING_PERCENT // 100
        starts = sorted(
            (step_ns, index, setting)
            for index, (setting, step_ns) in enumerate(self._steps_ns.items())
            if step_ns is not None and step_ns <= limit_ns
        )
        for step_ns, _, setting in starts[:_MOST_STARTS]:
            self._descend(setting, step_ns)

    def name_messages(self, costs: Costs) -> None:
        """Look for messages that are clearly better if named one by one."""
        if self._is_within(_NEAR_PER_MILLE):
            return
        starts = [plan_dynacomm(costs)]
        pushed = self._crossing.push(self.plan)
        pulled = self._crossing.pull(self.plan, pushed)
        if max(len(pushed), len(pulled)) <= _MOST_NAMED:
            pull, push = self._crossing.whole_layers(pulled), self._crossing.whole_layers(pushed)
            starts.insert(0, Plan("joint", self._n_layers, pull, push, barrier=False))
        plan, step_ns = search_segments(costs, starts, self._pause)
        if 1000 * step_ns < _CLEARLY_BETTER_PER_MILLE * self.step_ns:
            self.plan, self.step_ns = plan, step_ns

    def agree(self) -> None:
        """Send as the other workers do, in order and in size, where that costs little.

        What comes down has gone up from every worker before. Workers alike, whose estimates differ
        by a few per cent, then choose the nearest of a few sizes, and their messages end at the
        same cells. Where computing takes less than a transfer they begin at the rear: in the order
        of a backward pass they have sent the same cells, whoever computes faster.
        """
        if isinstance(self.plan, PolicyPlan):
            push, pull = self.plan.push, self.plan.pull
            push = replace(push, cap_nbytes=self._round(push.cap_nbytes))
            pull = replace(pull, cap_nbytes=self._round(pull.cap_nbytes))
            self._agree_on(push, pull)
            if self._is_slow:
                push = replace(self.plan.push, rear_first=True)
                self._agree_on(push, self.plan.pull)

    def _agree_on(self, push: Policy, pull: Policy) -> None:
        """Take policies if the step is at most so much longer."""
        limit_ns = self.step_ns * _AGREEING_PER_MILLE // 1000 + 1
        pushed = self._crossing.try_push(push, limit_ns)
        step_ns = None if pushed is None else self._crossing.try_pull(pull, pushed, limit_ns)
        if step_ns is not None and self._is_clearly_better(step_ns):
            self.plan, self.step_ns = PolicyPlan("joint", self._n_layers, pull, push), step_ns

    def _round(self, cap_nbytes: int | None) -> int | None:
        if cap_nbytes is None:
            return None
        size = CELL_NBYTES
        while 5 * size < 4 * cap_nbytes:  # nearer to the next size, half as large again
            size = size * 3 // 2
        return min(size, self._nbytes)

    @property
    def choice(self) -> AnyPlan:
        """The best plan, or DynaComm's if it is about as good."""
        return self.plan if self._is_clearly_better(self.step_ns) else self._plain

    def _is_clearly_better(self, step_ns: int) -> bool:
        return 1000 * step_ns < self._plain_ns * _CLEARLY_BETTER_PER_MILLE

    def _is_within(self, per_mille: int) -> bool:
        return 1000 * self.step_ns <= per_mille * self._bound_ns

    def _grid(self) -> Iterator[_Setting]:
        nbytes = self._nbytes
        caps = [(self._push_unit * size // 100, self._pull_unit * size // 100) for size in _SIZES]
        caps += [(-(-nbytes // n), -(-nbytes // n)) for n in range(1, _FEW + 1)]
        for push_cap, pull_cap in caps:
            for whole_layers in (False, True):
                thresholds = (0, self._overhead_nbytes, push_cap // 4, push_cap // 2, push_cap)
                for threshold in thresholds:
                    yield _Setting(push_cap, threshold, pull_cap, 0, whole_layers)

    def _in_range(self, setting: _Setting) -> _Setting:
        nbytes = self._nbytes
        least = -(-nbytes // _MOST_MESSAGES)
        return _Setting(
            min(max(setting.push_cap, least), nbytes),
            min(setting.push_threshold, nbytes),
            min(max(setting.pull_cap, least), nbytes),
            min(setting.pull_threshold, nbytes),
            setting.whole_layers,
        )

    def _descend(self, setting: _Setting, step_ns: int) -> None:
        """Change one number at a time for as long as that helps."""
        before = None
        while before != setting:
            before = setting
            for name in _NUMBERS:
                for percent in _CHANGES:
                    number = getattr(setting, name) or self._push_unit // 4
                    changed = setting._replace(**{name: number * percent // 100})  # type: ignore[arg-type]  # none of them is the flag
                    found_ns = self._try(changed)
                    if found_ns is not None and found_ns < step_ns:
                        setting, step_ns = changed, found_ns

    def _try(self, setting: _Setting) -> int | None:
        """Simulate; return the step, or None where it is far from the best or work is enough."""
        setting = self._in_range(setting)
        if setting in self._steps_ns:
            return self._steps_ns[setting]
        if self._is_within(_CLOSE_PER_MILLE) or self._crossing.n_simulated >= _MOST_WORK:
            return None
        self._pause()
        push = Policy(setting.push_cap, setting.push_threshold, setting.whole_layers)
        pull = Policy(setting.pull_cap, setting.pull_threshold, setting.whole_layers)
        limit_ns = self.step_ns * _PROMISING_PERCENT // 100
        step_ns = None
        pushed = self._pushed.get(push)
        if pushed is None:
            pushed = self._crossing.try_push(push, limit_ns)
            if pushed is not None:
                self._pushed[push] = pushed
        if pushed is not None:
            step_ns = self._crossing.try_pull(pull, pushed, limit_ns)
        self._steps_ns[setting] = step_ns
        if step_ns is not None and step_ns < self.step_ns:
            self.step_ns = step_ns
            self.plan = PolicyPlan("joint", self._n_layers, pull=pull, push=push)
        return step_ns


def _pull_early(plan: Plan) -> Plan:
    """Return the plan with each pull as soon as its gradients are up, the front ones first."""
    pull = [segment for push in plan.push for segment in plan.pull if segment.first in push.layers]
    return replace(plan, pull=tuple(pull), barrier=False)


def _unit_nbytes(nbytes: int, transfer_ns: int, overhead_ns: int) -> int:
    """Return sqrt(transfer * overhead / 2), as bytes."""
    if not transfer_ns:
        return nbytes
    return max(1, isqrt(nbytes * nbytes * overhead_ns // (2 * transfer_ns)))
