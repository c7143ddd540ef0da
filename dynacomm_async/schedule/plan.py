"""What a step sends and when: a list of messages each way, or a policy each way.

A :class:`Plan` names its messages, runs of layers, in the order they leave. Between the last push
of a step and the first pull of the next there is a barrier, unless the plan lets its pulls begin
as soon as what they carry is there. A :class:`PolicyPlan` names no messages: what leaves next is
decided when the link is free, from what is ready then, and nothing waits for a barrier.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypeAlias

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.dispatch import Policy

__all__ = ["AnyPlan", "Plan", "PolicyPlan", "Segment", "cut_segments", "is_crossing", "read_plan"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers ``first`` to ``last``, both included, sent as one message.

    Layers count from 0 in forward order, whatever the direction of the message.

    Raises:
        PlanError: not two ints with 0 <= first <= last.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        first, last = self.first, self.last
        if type(first) is not int or type(last) is not int or not 0 <= first <= last:
            raise PlanError(
                f"a segment goes from layer {first!r} to {last!r}, "
                "expected two ints with 0 <= first <= last"
            )

    @property
    def layers(self) -> range:
        """The layers of the segment in forward order."""
        return range(self.first, self.last + 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """The messages of one step.

    Attributes:
        strategy: the name of the planner that made it.
        n_layers: how many layers the model has.
        pull: segments in the order they are sent down; they cover layers 0 to L-1, ascending
            where there is a barrier, else in any order.
        push: segments in the order they are sent up; they cover layers L-1 to 0, descending
            where there is a barrier, else in any order.
        barrier: whether the first pull waits for the last push; else each pull leaves, in its
            turn, as soon as the server has all that it carries.

    Raises:
        PlanError: the segments of a direction leave out or repeat a layer, or are out of order.
    """

    strategy: str
    n_layers: int
    pull: tuple[Segment, ...]
    push: tuple[Segment, ...]
    barrier: bool = True

    def __post_init__(self) -> None:
        _check_head(self.strategy, self.n_layers)
        if not isinstance(self.barrier, bool):
            raise PlanError(f"a plan's barrier is {self.barrier!r}, expected True or False")
        if self.barrier:
            _check_cover(self.pull, self.n_layers, "pull")
            _check_cover(self.push[::-1], self.n_layers, "push (read from its end)")
        else:
            for segments, what in ((self.pull, "pull"), (self.push, "push")):
                ascending = sorted(segments, key=lambda segment: segment.first)
                _check_cover(ascending, self.n_layers, f"{what} (in the order of layers)")

    @classmethod
    def from_cuts(
        cls, strategy: str, n_layers: int, pull_cuts: Iterable[int], push_cuts: Iterable[int]
    ) -> Plan:
        """Build a plan from where its segments begin; see :func:`cut_segments`.

        Both lists of cuts are in forward order; the push segments are sent from the last.
        """
        return cls(
            strategy,
            n_layers,
            cut_segments(n_layers, pull_cuts),
            cut_segments(n_layers, push_cuts)[::-1],
        )

    @classmethod
    def from_json(cls, mapping: object) -> Plan:
        """Build a plan from what :meth:`to_json` gave; other keys are ignored.

        Raises:
            PlanError: a missing or misshapen key, or segments that are no plan.
        """
        if not isinstance(mapping, Mapping):
            raise PlanError(f"a plan is {reprlib.repr(mapping)}, expected an object")
        strategy = mapping.get("strategy")
        if not isinstance(strategy, str):
            raise PlanError(f"a plan's strategy is {reprlib.repr(strategy)}, expected a name")
        pull = _read_segments(mapping.get("pull"), "pull")
        push = _read_segments(mapping.get("push"), "push")
        barrier = mapping.get("barrier", True)
        return cls(strategy, max(segment.last for segment in pull) + 1, pull, push, barrier)

    def to_json(self) -> dict[str, object]:
        """Return ``strategy``, ``pull`` and ``push``: [first, last] pairs in the order sent.

        A plan without a barrier has ``barrier``: false beside them.
        """
        plan: dict[str, object] = {
            "strategy": self.strategy,
            "pull": [[segment.first, segment.last] for segment in self.pull],
            "push": [[segment.first, segment.last] for segment in self.push],
        }
        return plan if self.barrier else {**plan, "barrier": False}


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    """The rules by which a step's messages are made up while it runs; there is no barrier.

    Attributes:
        strategy: the name of the planner that made it.
        n_layers: how many layers the model has.
        pull: the downlink's policy, at the server.
        push: the uplink's policy, at the worker.

    Raises:
        PlanError: no name, no layers, something else than policies, or a downlink that is to begin
            with the rear layers: parameters are awaited from the front.
    """

    strategy: str
    n_layers: int
    pull: Policy
    push: Policy

    def __post_init__(self) -> None:
        _check_head(self.strategy, self.n_layers)
        for policy in (self.pull, self.push):
            if not isinstance(policy, Policy):
                raise PlanError(f"a policy is {reprlib.repr(policy)}, expected a Policy")
        if self.pull.rear_first:
            raise PlanError("a downlink's policy is rear_first, expected one for the uplink only")

    @classmethod
    def from_json(cls, mapping: object) -> PolicyPlan:
        """Build a plan from what :meth:`to_json` gave; other keys are ignored.

        Raises:
            PlanError: a missing or misshapen key.
        """
        if not isinstance(mapping, Mapping):
            raise PlanError(f"a plan is {reprlib.repr(mapping)}, expected an object")
        return cls(
            mapping.get("strategy"),  # type: ignore[arg-type]  # checked when made
            mapping.get("layers"),  # type: ignore[arg-type]
            _read_policy(mapping.get("pull"), "pull"),
            _read_policy(mapping.get("push"), "push"),
        )

    def to_json(self) -> dict[str, object]:
        """Return ``strategy``, ``layers`` (their number), ``pull`` and ``push``: policies."""
        return {
            "strategy": self.strategy,
            "layers": self.n_layers,
            "pull": asdict(self.pull),
            "push": asdict(self.push),
        }


AnyPlan: TypeAlias = Plan | PolicyPlan
"""What a planner may return."""


def is_crossing(plan: AnyPlan) -> bool:
    """Return whether pulls may begin before the last push of the step before has ended."""
    return isinstance(plan, PolicyPlan) or not plan.barrier


def read_plan(mapping: object) -> AnyPlan:
    """Build a plan of either kind from its ``to_json``.

    Raises:
        PlanError: neither.
    """
    if isinstance(mapping, Mapping) and isinstance(mapping.get("pull"), Mapping):
        return PolicyPlan.from_json(mapping)
    return Plan.from_json(mapping)


def cut_segments(n_layers: int, cuts: Iterable[int]) -> tuple[Segment, ...]:
    """Return the segments of ``n_layers`` layers, in forward order, that begin at 0 and each cut.

    Raises:
        PlanError: the cuts do not ascend strictly, or leave 1 to n_layers - 1.
    """
    segments = []
    first = 0
    for cut in (*cuts, n_layers):
        if not first < cut <= n_layers:
            raise PlanError(
                f"a segment of {n_layers} layers begins at {first} and the next at {cut}, "
                "expected ascending cuts inside the model"
            )
        segments.append(Segment(first, cut - 1))
        first = cut
    return tuple(segments)


def _check_head(strategy: object, n_layers: object) -> None:
    if not isinstance(strategy, str) or not strategy:
        raise PlanError(f"a plan's strategy is {strategy!r}, expected a name")
    if type(n_layers) is not int or n_layers < 1:
        raise PlanError(f"a plan is for {n_layers!r} layers, expected at least 1")


def _check_cover(ascending: Sequence[Segment], n_layers: int, what: str) -> None:
    due = 0
    for segment in ascending:
        if segment.first != due:
            raise PlanError(
                f"{what}: a segment begins at layer {segment.first}, expected layer {due}"
            )
        due = segment.last + 1
    if due != n_layers:
        raise PlanError(f"{what}: the segments cover {due} layers, expected {n_layers}")


def _read_segments(value: object, key: str) -> tuple[Segment, ...]:
    if not isinstance(value, list) or not value:
        raise PlanError(
            f"a plan's {key} is {reprlib.repr(value)}, expected a list of [first, last]"
        )
    segments = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise PlanError(f"a {key} segment is {reprlib.repr(pair)}, expected [first, last]")
        segments.append(Segment(pair[0], pair[1]))
    return tuple(segments)


def _read_policy(value: object, key: str) -> Policy:
    names = [field.name for field in fields(Policy)]
    if isinstance(value, Mapping):
        value = {"rear_first": False, **value}  # it is younger than some that were saved
    if not isinstance(value, Mapping) or any(name not in value for name in names):
        raise PlanError(
            f"a plan's {key} is {reprlib.repr(value)}, expected an object with {', '.join(names)}"
        )
    return Policy(**{name: value[name] for name in names})
