"""Kernels of the engine: functions of plain arrays that know neither layers nor networks."""

from __future__ import annotations

from dynacomm_async.nn.kernels.blocks import (
    Block,
    GroupBlock,
    columns_needed,
    plan_blocks,
    plan_group_blocks,
)
from dynacomm_async.nn.kernels.convolution import (
    Phase,
    input_phases,
    phase_border,
    rotate_weights,
)
from dynacomm_async.nn.kernels.depthwise import DepthwiseWindows
from dynacomm_async.nn.kernels.dropping import draw_factors
from dynacomm_async.nn.kernels.elementwise import (
    column_sums,
    image_groups,
    line_groups,
    mask_between,
    mask_positive,
)
from dynacomm_async.nn.kernels.loss import softmax_cross_entropy
from dynacomm_async.nn.kernels.pooling import (
    Tap,
    clipped_taps,
    maximum_steps,
    pool_maximum,
    unpool_maximum,
    window_taps,
)
from dynacomm_async.nn.kernels.version import KERNELS
from dynacomm_async.nn.kernels.winograd import (
    PLACES,
    REACH,
    TILE,
    TileBlock,
    Transforms,
    block_tiles,
    plan_tiles,
    suits_winograd,
    tiles_in,
)

__all__ = [
    "KERNELS",
    "PLACES",
    "REACH",
    "TILE",
    "Block",
    "DepthwiseWindows",
    "GroupBlock",
    "Phase",
    "Tap",
    "TileBlock",
    "Transforms",
    "block_tiles",
    "clipped_taps",
    "column_sums",
    "columns_needed",
    "draw_factors",
    "image_groups",
    "input_phases",
    "line_groups",
    "mask_between",
    "mask_positive",
    "maximum_steps",
    "phase_border",
    "plan_blocks",
    "plan_group_blocks",
    "plan_tiles",
    "pool_maximum",
    "rotate_weights",
    "softmax_cross_entropy",
    "suits_winograd",
    "tiles_in",
    "unpool_maximum",
    "window_taps",
]
