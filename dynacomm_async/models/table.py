"""The table of models, and how a reference becomes a network."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dynacomm_async.errors import ConfigError, DynaCommError
from dynacomm_async.models.googlenet import googlenet
from dynacomm_async.models.inception_v4 import inception_v4
from dynacomm_async.models.lenet import lenet, lenet_smooth
from dynacomm_async.models.mlp import mlp
from dynacomm_async.models.mobilenet import mobilenet_v2
from dynacomm_async.models.resnet import resnet18, resnet20, resnet50, resnet152
from dynacomm_async.models.vgg import vgg11, vgg16, vgg19, vgg_small
from dynacomm_async.nn import Network

__all__ = ["MODELS", "ModelFunction", "build"]

ModelFunction = Callable[..., Network]
"""Takes ``input_shape`` (H, W, C) and ``classes``, both with defaults, and returns a network."""

MODELS: Mapping[str, ModelFunction] = {
    "googlenet": googlenet,
    "inception_v4": inception_v4,
    "lenet": lenet,
    "lenet_smooth": lenet_smooth,
    "mlp": mlp,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "resnet152": resnet152,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "vgg_small": vgg_small,
}


def build(
    reference: str,
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
) -> Network:
    """The network that ``reference`` means.

    Args:
        reference: a name in :data:`MODELS`, or ``package.module:function`` for a model function of
            one's own, looked for in the current directory too.
        input_shape: (H, W, C); None: the model's default.
        classes: None: the model's default.

    Raises:
        ConfigError: the reference cannot be resolved, or gives something else than a network.
        ShapeError: the model does not fit the input shape.
    """
    function = _import_function(reference) if ":" in reference else _look_up(reference)
    settings: dict[str, Any] = {}
    if input_shape is not None:
        settings["input_shape"] = tuple(input_shape)
    if classes is not None:
        settings["classes"] = classes
    try:
        network = function(**settings)
    except TypeError as error:
        raise ConfigError(
            f"model {reference!r} cannot be called with input_shape and classes: {error}"
        ) from error
    except DynaCommError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model {reference!r} failed with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, Network):
        raise ConfigError(
            f"model {reference!r} returned a {type(network).__name__}, expected a Network"
        )
    return network


def _look_up(name: str) -> ModelFunction:
    if name in MODELS:
        return MODELS[name]
    close = get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(MODELS)}"
    raise ConfigError(f"unknown model {name!r}: {hint} (or give package.module:function)")


def _import_function(reference: str) -> ModelFunction:
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"model {reference!r}: cannot import {module_name!r}: {error}") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"model {reference!r}: {module_name!r} has no function {attribute!r}")
    function: ModelFunction = found
    return function
