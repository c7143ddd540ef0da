"""The layers that models are defined with, each beside the operator that runs it."""

from __future__ import annotations

from dynacomm_async.nn.layers.activation import ReLU, Tanh
from dynacomm_async.nn.layers.branches import Branches, Concat
from dynacomm_async.nn.layers.convolution import Conv2d
from dynacomm_async.nn.layers.dense import Dense, Flatten
from dynacomm_async.nn.layers.dropout import Dropout
from dynacomm_async.nn.layers.normalisation import BatchNorm
from dynacomm_async.nn.layers.pooling import AvgPool, GlobalAvgPool, MaxPool
from dynacomm_async.nn.layers.residual import Add, PadShortcut, Residual
from dynacomm_async.nn.layers.response import LocalResponseNorm

__all__ = [
    "Add",
    "AvgPool",
    "BatchNorm",
    "Branches",
    "Concat",
    "Conv2d",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "LocalResponseNorm",
    "MaxPool",
    "PadShortcut",
    "ReLU",
    "Residual",
    "Tanh",
]
