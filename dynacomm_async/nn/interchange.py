"""Parameters and running statistics as PyTorch names and lays them out, and back.

A layer called ``layer1.0.conv1`` becomes the tensor ``layer1.0.conv1.weight``: a model whose layers
are named after PyTorch's modules can be loaded there. Convolutions are (O, C / groups, kh, kw)
there, dense layers (features, inputs), and a flattened image is in the order (C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn.graph import Node, Shape
from dynacomm_async.nn.layers import Add, BatchNorm, Concat, Conv2d, Dense, Flatten
from dynacomm_async.nn.network import Network

__all__ = ["from_tensors", "to_tensors"]

Array = NDArray[Any]

_COUNTER = "num_batches_tracked"
"""PyTorch's batch norms count their batches. Nothing here depends on it."""

_SHOWN = 3
"""How much of a kind a message lists."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One of PyTorch's tensors.

    Attributes:
        name: as in a state dict.
        view: of the arena, with the axes in PyTorch's order; a flattened image has three axes.
        shape: PyTorch's.
    """

    name: str
    view: Array
    shape: Shape


def to_tensors(network: Network, parameters: Array, statistics: Array) -> dict[str, Array]:
    """Return the state dict of the same model in PyTorch, as new contiguous arrays.

    Args:
        parameters: (network.parameters,), in arena order.
        statistics: (network.statistics,), in arena order.

    Raises:
        ConfigError: a layer of the network has no counterpart there.
        ShapeError: an arena has the wrong size.
    """
    found: dict[str, Array] = {}
    for tensor in _tensors(network, parameters, statistics):
        found[tensor.name] = np.ascontiguousarray(tensor.view).reshape(tensor.shape)
        module, _, attribute = tensor.name.rpartition(".")
        if attribute == "running_var":
            found[f"{module}.{_COUNTER}"] = np.zeros((), np.int64)
    return found


def from_tensors(
    network: Network, tensors: Mapping[str, Array], source: str = "the state dict"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return parameters and running statistics, float32, in arena order.

    Args:
        tensors: PyTorch's state dict of the model, as arrays of floating point numbers.
        source: what the tensors come from, for messages.

    Raises:
        ShapeError: a tensor is missing, too many, of another shape, or not of numbers.
        ConfigError: a layer of the network has no counterpart in PyTorch.
    """
    parameters = np.empty(network.parameters, np.float32)
    statistics = np.empty(network.statistics, np.float32)
    wanted = list(_tensors(network, parameters, statistics))
    _check_names(network, wanted, tensors, source)
    _check_kinds(network, wanted, tensors, source)
    for tensor in wanted:
        came = tensors[tensor.name].reshape(tensor.view.shape)
        np.copyto(tensor.view, came, casting="same_kind")
    return parameters, statistics


def _check_names(
    network: Network, wanted: Sequence[_Tensor], tensors: Mapping[str, Array], source: str
) -> None:
    names = {tensor.name: None for tensor in wanted}
    missing = [name for name in names if name not in tensors]
    strange = [name for name in tensors if name not in names and not name.endswith(f".{_COUNTER}")]
    if missing:
        hint = f"; it has {_list(strange)} instead" if strange else ""
        raise ShapeError(f"{source}: model {network.name} misses {_list(missing)}{hint}")
    if strange:
        raise ShapeError(f"{source}: model {network.name} has no layer for {_list(strange)}")


def _check_kinds(
    network: Network, wanted: Sequence[_Tensor], tensors: Mapping[str, Array], source: str
) -> None:
    wrong = []
    for tensor in wanted:
        came = tensors[tensor.name]
        if came.shape != tensor.shape or came.dtype.kind != "f":
            what = f"{came.dtype} of shape {came.shape} instead of floats of {tensor.shape}"
            wrong.append(f"{tensor.name} is {what}")
    if wrong:
        raise ShapeError(f"{source}: it does not fit model {network.name}: {_list(wrong)}")


def _list(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _tensors(network: Network, parameters: Array, statistics: Array) -> Iterator[_Tensor]:
    """All tensors in forward order, as views of the arenas."""
    _check_arena("parameters", parameters, network.parameters, network)
    _check_arena("statistics", statistics, network.statistics, network)
    flattened: dict[int, Shape | None] = {}
    offset = moment = 0
    for node in network.nodes:
        images = [flattened.get(value.index) for value in node.inputs]
        views = []
        for shape in node.parameter_shapes:
            views.append(parameters[offset : offset + prod(shape)].reshape(shape))
            offset += prod(shape)
        own = statistics[moment : moment + node.statistics]
        moment += node.statistics
        yield from _convert(node, images[0], views, own)
        flattened[node.output.index] = _behind(node, images)


def _check_arena(what: str, arena: Array, count: int, network: Network) -> None:
    if arena.shape != (count,):
        raise ShapeError(
            f"model {network.name}: {what} are an array {arena.shape}, expected ({count},)"
        )


def _behind(node: Node, images: Sequence[Shape | None]) -> Shape | None:
    """The shape of the image that the node's output is, flattened; None: of no image.

    An image of one pixel has but one order.
    """
    layer, source = node.layer, node.inputs[0].shape
    if isinstance(layer, Flatten) and len(source) == 3:
        return source if source[:2] != (1, 1) else None
    if isinstance(layer, Dense) or len(node.output.shape) == 3 or not any(images):
        return None
    if isinstance(layer, Concat) or (isinstance(layer, Add) and images[0] != images[1]):
        raise ConfigError(
            f"layer {node.name}: what is joined here, flattened, has no one order in PyTorch"
        )
    return images[0]


def _convert(
    node: Node, image: Shape | None, views: Sequence[Array], statistics: Array
) -> Iterator[_Tensor]:
    """The tensors of one node that reads ``image``, flattened, if it does."""
    layer = node.layer
    if isinstance(layer, Conv2d):
        weights = views[0].transpose(3, 2, 0, 1)
        yield _Tensor(f"{node.name}.weight", weights, weights.shape)
        if layer.bias:
            yield _Tensor(f"{node.name}.bias", views[1], views[1].shape)
    elif isinstance(layer, Dense):
        inputs, features = views[0].shape
        weights = views[0].T
        if image is not None:
            weights = views[0].reshape(*image, features).transpose(3, 2, 0, 1)
        yield _Tensor(f"{node.name}.weight", weights, (features, inputs))
        if layer.bias:
            yield _Tensor(f"{node.name}.bias", views[1], views[1].shape)
    elif isinstance(layer, BatchNorm):
        names = ("weight", "bias", "running_mean", "running_var")
        for name, view in zip(names, (*views, *statistics.reshape(2, -1)), strict=True):
            turned = view if image is None else view.reshape(image).transpose(2, 0, 1)
            yield _Tensor(f"{node.name}.{name}", turned, view.shape)
    elif views:
        kind = type(layer).__name__
        raise ConfigError(f"layer {node.name}: {kind} has no counterpart in PyTorch")
