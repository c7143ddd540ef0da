"""Steps as they happened, in the same terms as the cost model's predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from dynacomm_async.errors import ConfigError
from dynacomm_async.observe.joining import Crossing, Joined, Party, layers_of
from dynacomm_async.schedule import Segment
from dynacomm_async.schedule.timeline import Computation, Timeline, Transfer

__all__ = ["measured_steps", "median_step"]

Span = TypeVar("Span", Computation, Transfer)


def measured_steps(
    joined: Joined, slot: int = 0, label: str | None = None, *, barrier: bool = True
) -> dict[int, Timeline]:
    """Return every step of one worker of which all was recorded, by its index.

    A step lasts from the start of its first pull to the start of the next step's. A transfer lasts
    as long as it kept an emulated link busy; where there was none, from when the sender handed it
    over until its last byte had arrived. Latency, the server's time and waiting for other workers
    lie between the last push and the end. ``ranges`` of transfers are not told.

    Args:
        slot: the worker's rank.
        label: of the run, where several were joined.
        barrier: False: a step lasts from the start of its backward pass to that of the next one,
            as the cost model has it for strategies without a barrier.

    Raises:
        ConfigError: there is no recording of such a worker.
    """
    index, worker = _find_worker(joined, slot, label)
    layers = worker.recording.layers
    pulls: dict[int, list[Transfer]] = defaultdict(list)
    pushes: dict[int, list[Transfer]] = defaultdict(list)
    for crossing in joined.crossings:
        if crossing.kind == "PARAMETERS" and crossing.receiver == index:
            pulls[crossing.step] += _transfers("pull", crossing, layers)
        elif crossing.kind == "GRADIENTS" and crossing.sender == index:
            pushes[crossing.step] += _transfers("push", crossing, layers)
    works: dict[int, list[Computation]] = defaultdict(list)
    for work in worker.recording.computed:
        start_ns, end_ns = work.start_ns + worker.shift_ns, work.end_ns + worker.shift_ns
        if work.what != "wait":
            works[work.step].append(Computation(work.what, work.layer, start_ns, end_ns))
    whole = {step for step, done in works.items() if len(done) >= 2 * len(layers)}
    whole &= pushes.keys() & pulls.keys()
    if barrier:
        return {
            step: _assemble(pulls[step], works[step], pushes[step], pulls[step + 1])
            for step in sorted(whole)
            if step + 1 in pulls
        }
    return {
        step: _assemble_crossing(pushes[step], works[step], pulls[step + 1], works[step + 1])
        for step in sorted(whole)
        if step + 1 in whole
    }


def median_step(steps: Mapping[int, Timeline], among: Iterable[int] | None = None) -> int | None:
    """Return the index of the step of median duration, the shorter of two; None if there is none.

    Args:
        among: the steps that count; by default all.
    """
    chosen = [step for step in (steps if among is None else among) if step in steps]
    chosen.sort(key=lambda step: (steps[step].step_ns, step))
    return chosen[(len(chosen) - 1) // 2] if chosen else None


def _find_worker(joined: Joined, slot: int, label: str | None) -> tuple[int, Party]:
    for index, party in enumerate(joined.parties):
        if (
            party.recording.role == "worker"
            and party.slots == (slot,)
            and label in (None, party.label)
        ):
            return index, party
    of = "" if label is None else f" of {label}"
    raise ConfigError(f"there is no recording of worker {slot}{of}")


def _transfers(
    direction: Literal["pull", "push"],
    crossing: Crossing,
    layers: Sequence[tuple[str, int, int]],
) -> list[Transfer]:
    """Return when a message kept its link busy; nothing if one end was not recorded."""
    touched = layers_of(crossing.cells, layers)
    if not touched:
        return []
    segment = Segment(touched[0], touched[-1])
    if crossing.carried is not None:
        start_ns, end_ns = crossing.carried.start_ns, crossing.carried.end_ns
    elif crossing.sent is not None and crossing.received is not None:
        start_ns, end_ns = crossing.sent.start_ns, crossing.received.end_ns
    else:
        return []
    return [Transfer(direction, segment, start_ns, end_ns)]


def _assemble(
    pulls: Sequence[Transfer],
    works: Sequence[Computation],
    pushes: Sequence[Transfer],
    following: Sequence[Transfer],
) -> Timeline:
    start_ns = min(pull.start_ns for pull in pulls)
    step_ns = min(pull.start_ns for pull in following) - start_ns
    forward_ns = max(work.end_ns for work in works if work.phase == "forward") - start_ns
    return Timeline(
        step_ns=step_ns,
        forward_ns=forward_ns,
        backward_ns=step_ns - forward_ns,
        computations=_since(start_ns, works),
        transfers=(*_since(start_ns, pulls), *_since(start_ns, pushes)),
    )


def _assemble_crossing(
    pushes: Sequence[Transfer],
    works: Sequence[Computation],
    pulls: Sequence[Transfer],
    following: Sequence[Computation],
) -> Timeline:
    """Return what happens from one backward pass to the next one."""
    backward = [work for work in works if work.phase == "backward"]
    forward = [work for work in following if work.phase == "forward"]
    start_ns = min(work.start_ns for work in backward)
    end_ns = min(work.start_ns for work in following if work.phase == "backward")
    return Timeline(
        step_ns=end_ns - start_ns,
        forward_ns=None,
        backward_ns=None,
        computations=_since(start_ns, [*backward, *forward]),
        transfers=(*_since(start_ns, pushes), *_since(start_ns, pulls)),
    )


def _since(start_ns: int, spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return spans in the order of time, counted from ``start_ns``."""
    moved = (
        span._replace(start_ns=span.start_ns - start_ns, end_ns=span.end_ns - start_ns)
        for span in spans
    )
    return tuple(sorted(moved, key=lambda span: span.start_ns))
