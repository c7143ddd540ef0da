"""What a run leaves: a record of each step, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.ranges import Range
from dynacomm_async.server.store import parameters_sha256
from dynacomm_async.wire.messages import Report

__all__ = ["Applied", "Contributors", "RunResult", "StepRecord", "join_contributors"]

Floats = NDArray[np.float32]

Contributors = tuple[tuple[Range, tuple[int, ...]], ...]
"""Ranges of cells, and the slots whose contributions each is the mean of, in rank order."""


class Applied(NamedTuple):
    """Cells have been updated.

    Attributes:
        cells: which.
        step: the step that the contributions belong to.
        slots: whose mean it was, in rank order; nobody's left the cells as they were.
        undone: True: the step's updates of these cells have been taken back, since a contribution
            to it is refused; they come again without it.
    """

    step: int
    cells: Range
    slots: tuple[int, ...]
    undone: bool = False


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step.

    Attributes:
        index: from 0.
        loss: mean of the contributing workers' losses, in rank order, or None if one of them did
            not report.
        images: samples that they used in the step.
        ended_ns: monotonic clock.
        contributors: what each cell of the step is the mean of. Without a common step, as under
            staleness, it says only who has finished the step.
    """

    index: int
    loss: float | None
    images: int
    ended_ns: int
    contributors: Contributors = ()

    @classmethod
    def of(
        cls, index: int, contributors: Contributors, reports: Mapping[int, Report], ended_ns: int
    ) -> StepRecord:
        """Return the record of a step to which the contributors have reported."""
        slots = sorted({slot for _, some in contributors for slot in some})
        told = [reports.get(slot, Report()) for slot in slots]
        losses = [report.loss for report in told if report.loss is not None]
        mean = sum(losses) / len(losses) if losses and len(losses) == len(slots) else None
        return cls(index, mean, sum(report.images for report in told), ended_ns, contributors)


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        steps: updates of the model.
        parameters: (n,) float32, forward order; the caller's own copy.
        statistics: (m,) float32 running statistics; the caller's own copy.
        records: one for each step that this server has seen: after a restart from a checkpoint,
            those from there on.
    """

    steps: int
    parameters: Floats
    statistics: Floats
    records: tuple[StepRecord, ...]

    @property
    def parameters_sha256(self) -> str:
        """Hash of the parameters' bytes."""
        return parameters_sha256(self.parameters)

    @property
    def losses(self) -> list[float | None]:
        """Loss of each recorded step."""
        return [record.loss for record in self.records]


def join_contributors(parts: Iterable[tuple[Range, tuple[int, ...]]]) -> Contributors:
    """Return the same in ascending order, with neighbours of the same contributors as one."""
    joined: list[tuple[Range, tuple[int, ...]]] = []
    for cells, slots in sorted(parts):
        if joined and joined[-1][1] == slots:
            (first, count), _ = joined[-1]
            if first + count == cells.first:
                joined[-1] = (Range(first, count + cells.count), slots)
                continue
        joined.append((cells, slots))
    return tuple(joined)
