"""Trained weights in files: as a run saves them, and as PyTorch reads them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn import Network, from_tensors, to_tensors

__all__ = ["SavedRun", "load_weights", "read_run", "save_run", "save_weights"]

Floats = NDArray[np.float32]

_STATISTICS = "statistics"
_MODEL = "model.name"
"""Arrays of a saved run beside its layers."""


@dataclass(frozen=True, slots=True, eq=False)
class SavedRun:
    """What a run has saved.

    Attributes:
        path: where it was.
        model: reference of the model, as :func:`dynacomm_async.models.build` takes it; None: the
            file does not say.
        layers: by name, (count,) float32 each.
        statistics: float32; of all layers.
    """

    path: Path
    model: str | None
    layers: Mapping[str, NDArray[Any]]
    statistics: NDArray[Any]

    def fit(self, network: Network) -> tuple[Floats, Floats]:
        """Return parameters and running statistics, float32, in arena order.

        Raises:
            ShapeError: what was saved is of another model.
        """
        parts = []
        for layer in network.layers:
            part = self.layers.get(layer.name)
            if part is None or part.shape != (layer.count,) or part.dtype.kind != "f":
                came = "none" if part is None else f"{part.dtype} of shape {part.shape}"
                raise ShapeError(
                    f"{self.path}: model {network.name} expects layer {layer.name} of "
                    f"({layer.count},) floats, but there is {came}"
                )
            parts.append(part)
        strange = sorted(set(self.layers) - {layer.name for layer in network.layers})
        if strange:
            raise ShapeError(f"{self.path}: model {network.name} has no layer {strange[0]}")
        if self.statistics.shape != (network.statistics,):
            raise ShapeError(
                f"{self.path}: {self.statistics.size} running statistics, model {network.name} "
                f"expects {network.statistics}"
            )
        return np.concatenate(parts, dtype=np.float32), self.statistics.astype(np.float32)


def save_run(
    path: Path, network: Network, parameters: Floats, statistics: Floats, *, model: str
) -> None:
    """Write the layers by name into an .npz file, with the running statistics."""
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    for layer in network.layers:
        arrays[layer.name] = parameters[start : start + layer.count]
        start += layer.count
    arrays |= {_STATISTICS: statistics, _MODEL: np.array(model)}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_run(path: Path) -> SavedRun:
    """Read what a run has saved.

    Args:
        path: an .npz file, a checkpoint, or a directory of checkpoints, of which the newest counts.

    Raises:
        ConfigError: there is nothing of the kind.
    """
    if path.is_dir():
        return _read_checkpoint(path)
    try:
        # Opened here: NumPy leaves a file that is no sound archive open.
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be read as .npz ({_reason(error)})") from None
    model = arrays.pop(_MODEL, None)
    statistics = arrays.pop(_STATISTICS, np.empty(0, np.float32))
    return SavedRun(path, None if model is None else str(model), arrays, statistics)


def save_weights(path: Path, network: Network, parameters: Floats, statistics: Floats) -> None:
    """Write a safetensors file with PyTorch's names and layouts.

    Raises:
        ConfigError: a layer of the network has no counterpart in PyTorch, or the file cannot be
            written.
    """
    tensors = to_tensors(network, parameters, statistics)
    # Readers of such files look for "format" to know whose layouts these are.
    try:
        save_file(tensors, path, metadata={"format": "pt", "model": network.name})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be written ({_reason(error)})") from None


def load_weights(path: Path, network: Network) -> tuple[Floats, Floats]:
    """Return parameters and running statistics, float32, in arena order.

    Args:
        path: a safetensors file with PyTorch's names and layouts, or what :func:`read_run` reads.

    Raises:
        ConfigError: the file is missing or of another kind.
        ShapeError: what is in it is missing or does not fit the network.
    """
    if path.suffix != ".safetensors":
        return read_run(path).fit(network)
    return from_tensors(network, _read_tensors(path), str(path))


def _read_checkpoint(path: Path) -> SavedRun:
    """As :mod:`dynacomm_async.server.checkpoint` writes it."""
    if not (path / "checkpoint.json").is_file():
        inside = [child.parent for child in path.glob("*-step-*/checkpoint.json")]
        if not inside:
            raise ConfigError(f"{path}: neither a checkpoint nor a directory of checkpoints")
        path = max(inside, key=lambda child: child.name)
    try:
        about = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        model = about["settings"].get("model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a sound checkpoint ({_reason(error)})") from None
    layers = _read_tensors(path / "parameters.safetensors")
    by_layer = _read_tensors(path / "statistics.safetensors")
    names = [row[0] for row in about.get("layers", [])]
    parts = [by_layer[name] for name in names if name in by_layer]
    statistics = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return SavedRun(path, model, layers, statistics)


def _read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
