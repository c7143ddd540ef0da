"""What a step sends: runs of layers, one message each, in the order they leave.

Between the last push of a step and the first pull of the next there is a barrier.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dynacomm_async.errors import PlanError

__all__ = ["Plan", "Segment", "cut_segments"]


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
        pull: segments in the order they are sent down; they cover layers 0 to L-1, ascending.
        push: segments in the order they are sent up; they cover layers L-1 to 0, descending.

    Raises:
        PlanError: the segments of a direction leave out or repeat a layer, or are out of order.
    """

    strategy: str
    n_layers: int
    pull: tuple[Segment, ...]
    push: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str) or not self.strategy:
            raise PlanError(f"a plan's strategy is {self.strategy!r}, expected a name")
        if type(self.n_layers) is not int or self.n_layers < 1:
            raise PlanError(f"a plan is for {self.n_layers!r} layers, expected at least 1")
        _check_cover(self.pull, self.n_layers, "pull")
        _check_cover(tuple(reversed(self.push)), self.n_layers, "push (read from its end)")

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
        return cls(strategy, max(segment.last for segment in pull) + 1, pull, push)

    def to_json(self) -> dict[str, object]:
        """Return ``strategy``, ``pull`` and ``push``: [first, last] pairs in the order sent."""
        return {
            "strategy": self.strategy,
            "pull": [[segment.first, segment.last] for segment in self.pull],
            "push": [[segment.first, segment.last] for segment in self.push],
        }


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
