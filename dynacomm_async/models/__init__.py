"""Model definitions, the table that finds them by name, and cost tables that follow from them."""

from __future__ import annotations

from dynacomm_async.models.costs import costs_of
from dynacomm_async.models.googlenet import googlenet
from dynacomm_async.models.inception_v4 import inception_v4
from dynacomm_async.models.lenet import lenet, lenet_smooth
from dynacomm_async.models.mlp import mlp
from dynacomm_async.models.mobilenet import mobilenet_v2
from dynacomm_async.models.resnet import resnet18, resnet20, resnet50, resnet152
from dynacomm_async.models.table import MODELS, ModelFunction, build
from dynacomm_async.models.vgg import vgg11, vgg16, vgg19, vgg_small
from dynacomm_async.models.weights import (
    SavedRun,
    load_weights,
    read_run,
    save_run,
    save_weights,
)

__all__ = [
    "MODELS",
    "ModelFunction",
    "SavedRun",
    "build",
    "costs_of",
    "googlenet",
    "inception_v4",
    "lenet",
    "lenet_smooth",
    "load_weights",
    "mlp",
    "mobilenet_v2",
    "read_run",
    "resnet18",
    "resnet20",
    "resnet50",
    "resnet152",
    "save_run",
    "save_weights",
    "vgg11",
    "vgg16",
    "vgg19",
    "vgg_small",
]
