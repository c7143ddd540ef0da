"""What a run leaves: a record of each step, and the result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.server.store import parameters_sha256

__all__ = ["RunResult", "StepRecord"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step.

    Attributes:
        index: from 0.
        loss: mean of the workers' losses, in rank order, or None if one did not report.
        images: samples that all workers used in the step.
        ended_ns: monotonic clock.
    """

    index: int
    loss: float | None
    images: int
    ended_ns: int


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
