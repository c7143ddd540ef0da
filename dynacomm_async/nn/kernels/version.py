"""The name that workers of a run must agree on."""

from __future__ import annotations

__all__ = ["KERNELS"]

KERNELS = "numpy engine 2"
"""Names what results follow from, to the last bit: which kernel a layer uses, the sizes of blocks
and tiles, how a batch is cut into shards. All of it follows from shapes and the number of threads,
by rules of this version; a change of a rule changes the number.
"""
