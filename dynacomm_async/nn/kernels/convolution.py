"""The gradient of a convolution's input, as convolutions.

For stride 1 it is the convolution of the bordered gradient of the output with the weights turned by
180 degrees and their channels swapped. For a stride of s, input pixels whose coordinates leave the
same rest by s (a *phase*) are touched by the same taps of the kernel only: each phase is a
convolution of stride 1 with those taps. Nothing is multiplied with the zeros of a dilated gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Phase", "input_phases", "phase_border", "rotate_weights"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase in one direction.

    Attributes:
        pixels: which pixels of the input.
        count: how many those are.
        first: where the first of them begins to read the output's gradient; may be negative.
        taps: which taps of the kernel, turned around.
        reach: how many taps those are; 0 where the kernel touches none of the pixels.
    """

    pixels: slice
    count: int
    first: int
    taps: slice
    reach: int


def input_phases(extent: int, kernel: int, stride: int, padding: int) -> list[Phase]:
    """The phases of an input of ``extent`` pixels, in one direction."""
    phases = []
    for rest in range(min(stride, extent)):
        tap = (rest + padding) % stride
        reach = max(0, -(-(kernel - tap) // stride))
        last = tap + stride * (reach - 1)
        first = (rest + padding - tap) // stride - (reach - 1)
        phases.append(
            Phase(
                slice(rest, None, stride),
                -(-(extent - rest) // stride),
                first,
                slice(last, None, -stride) if reach else slice(0, 0),
                reach,
            )
        )
    return phases


def phase_border(phases: list[Phase], extent: int) -> tuple[int, int]:
    """Zeros that the phases read before and behind an output's gradient of ``extent`` pixels."""
    live = [phase for phase in phases if phase.reach]
    before = max((-phase.first for phase in live), default=0)
    end = max((phase.first + phase.count + phase.reach - 1 for phase in live), default=0)
    return max(0, before), max(0, end - extent)


def rotate_weights(weights: NDArray[Any], taps: tuple[slice, slice], out: NDArray[Any]) -> None:
    """Write these taps of ``weights`` (kh, kw, C, O) into ``out`` (.., .., O, C)."""
    np.copyto(out, weights[taps].transpose(0, 1, 3, 2))
