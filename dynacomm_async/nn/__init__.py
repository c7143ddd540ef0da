"""A small CNN engine on NumPy: layers to define models with, networks, and what runs them.

It does not know that there is a transport: hooks around every scheduled layer tell the caller when
parameters are about to be read and when gradients are final.
"""

from __future__ import annotations

from dynacomm_async.nn.engine import MOMENTUM, Engine
from dynacomm_async.nn.graph import Definition
from dynacomm_async.nn.hooks import Hooks
from dynacomm_async.nn.interchange import from_tensors, to_tensors
from dynacomm_async.nn.kernels import KERNELS
from dynacomm_async.nn.layers import (
    Add,
    AvgPool,
    BatchNorm,
    Branches,
    Concat,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    LocalResponseNorm,
    MaxPool,
    PadShortcut,
    ReLU,
    Residual,
    Tanh,
)
from dynacomm_async.nn.memory import MemoryUse
from dynacomm_async.nn.network import LayerInfo, Network

__all__ = [
    "KERNELS",
    "MOMENTUM",
    "Add",
    "AvgPool",
    "BatchNorm",
    "Branches",
    "Concat",
    "Conv2d",
    "Definition",
    "Dense",
    "Dropout",
    "Engine",
    "Flatten",
    "GlobalAvgPool",
    "Hooks",
    "LayerInfo",
    "LocalResponseNorm",
    "MaxPool",
    "MemoryUse",
    "Network",
    "PadShortcut",
    "ReLU",
    "Residual",
    "Tanh",
    "from_tensors",
    "to_tensors",
]
