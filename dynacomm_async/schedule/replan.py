"""What made a plan give way to another, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import AnyPlan

__all__ = ["Replan", "describe_change", "describe_estimate"]

_WORTH_TELLING = 0.05
_DUPLEX = {
    True: "the link's directions take turns",
    False: "the link's directions have room at once, or it is tried whether they have",
}
_LEAST_NS = 100_000  # a time that changed by less has made no difference


@dataclass(frozen=True, slots=True)
class Replan:
    """One plan taking over from another.

    Attributes:
        step: the first step that follows the new plan.
        reason: in words, what has changed since the old plan was made.
        before: the old plan.
        after: the new plan.
        before_ns: what a step would take under the old plan, by the newest estimates.
        after_ns: the same under the new plan.
    """

    step: int
    reason: str
    before: AnyPlan
    after: AnyPlan
    before_ns: int
    after_ns: int

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.reason}; predicted step {self.before_ns / 1e6:.1f} -> "
            f"{self.after_ns / 1e6:.1f} ms"
        )


def describe_estimate(costs: Costs) -> str:
    """Return in words what a cost table says of the link and of computing."""
    return (
        f"down {_format_rate(_down_rate(costs))} Mbit/s and "
        f"{costs.overhead_down_ns / 1e6:.2f} ms a message, "
        f"up {_format_rate(_up_rate(costs))} Mbit/s and "
        f"{costs.overhead_up_ns / 1e6:.2f} ms a message, "
        f"computing {_compute_ns(costs) / 1e6:.1f} ms"
    )


def describe_change(before: Costs, after: Costs) -> str:
    """Return in words what has changed most between two cost tables of one model.

    All that has changed by 5 % or more is told, the largest change first; else the largest alone.
    """
    changes = sorted(_list_changes(before, after), key=lambda change: -change[0])
    telling = [words for size, words in changes if size >= _WORTH_TELLING]
    return ", ".join(telling or [changes[0][1]])


def _list_changes(before: Costs, after: Costs) -> Iterator[tuple[float, str]]:
    """Yield the size and the words of every change, sizes as shares of the larger value."""
    if before.half_duplex != after.half_duplex:
        yield 1.0, _DUPLEX[after.half_duplex]
    for name, rate in (("downlink rate", _down_rate), ("uplink rate", _up_rate)):
        old, new = rate(before), rate(after)
        yield (
            abs(old - new) / max(old, new, 1e-9),
            f"{name} {_format_rate(old)} -> {_format_rate(new)} Mbit/s",
        )
    for name, old_ns, new_ns in (
        ("downlink overhead", before.overhead_down_ns, after.overhead_down_ns),
        ("uplink overhead", before.overhead_up_ns, after.overhead_up_ns),
        ("computing", _compute_ns(before), _compute_ns(after)),
    ):
        moved_ns = abs(old_ns - new_ns)
        size = moved_ns / max(old_ns, new_ns) if moved_ns >= _LEAST_NS else 0.0
        yield size, f"{name} {old_ns / 1e6:.2f} -> {new_ns / 1e6:.2f} ms"


def _down_rate(costs: Costs) -> float:
    """Return Mbit/s; 0 stands for a transfer that takes no time."""
    pull_ns = sum(layer.pull_ns for layer in costs.layers)
    return _total_nbytes(costs) * 8e3 / pull_ns if pull_ns else 0.0


def _up_rate(costs: Costs) -> float:
    push_ns = sum(layer.push_ns for layer in costs.layers)
    return _total_nbytes(costs) * 8e3 / push_ns if push_ns else 0.0


def _total_nbytes(costs: Costs) -> int:
    return sum(layer.nbytes for layer in costs.layers)


def _compute_ns(costs: Costs) -> int:
    return sum(layer.forward_ns + layer.backward_ns for layer in costs.layers)


def _format_rate(mbit_per_s: float) -> str:
    return f"{mbit_per_s:.3g}" if mbit_per_s < 100 else f"{mbit_per_s:.0f}"
