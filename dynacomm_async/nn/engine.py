"""A network at one batch size: computes steps in arenas that may be the caller's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn.crew import Crew, Member
from dynacomm_async.nn.hooks import Hooks
from dynacomm_async.nn.kernels import softmax_cross_entropy
from dynacomm_async.nn.memory import Arenas, Array, MemoryUse
from dynacomm_async.nn.shards import Shard, count_shards

if TYPE_CHECKING:
    from dynacomm_async.nn.network import Network

__all__ = ["MOMENTUM", "Draw", "Engine"]

Draw = tuple[int, int, int]
"""(seed, step, slot): what dropout follows from, each at least 0."""

MOMENTUM = 0.1
"""Weight of the newest batch in running statistics."""


class Engine:
    """Runs a :class:`Network`; made by :meth:`Network.bind`.

    One thread at a time may use it. The same images, labels, parameters, draw and number of shards
    give the same bits, wherever the arenas lie in memory. Hooks are called on the caller's thread.

    Attributes:
        network, batch: what it was bound for.
        parameters: 1-D; read by every call.
        gradients: 1-D; :meth:`backward` and :meth:`step` overwrite it.
        statistics: 1-D; read in evaluation only, never written by a step.
        batch_statistics: 1-D; mean and unbiased variance of the last training batch.
        memory: bytes held beside the arenas.
        loss: of the last :meth:`step`, set before ``after_forward`` of the last layer is called.
    """

    def __init__(
        self, network: Network, batch: int, arenas: Arenas, smoothing: float = 0.0, threads: int = 1
    ) -> None:
        self.network = network
        self.batch = batch
        self.parameters = arenas.parameters
        self.gradients = arenas.gradients
        self.statistics = arenas.statistics
        self.batch_statistics = arenas.batch_statistics
        self._smoothing = smoothing
        self._crew = Crew(batch, count_shards(network, batch, threads))
        self._shards = [Shard(network, member, arenas) for member in self._crew.members]
        self._logits, self._gradient = np.zeros(
            (2, batch, network.classes), arenas.parameters.dtype
        )
        rows = MemoryUse(self._logits.nbytes, self._gradient.nbytes, 0)
        self.memory = sum((shard.use for shard in self._shards), rows)
        self._norm = next((node.name for node in network.nodes if node.layer.normalises), None)
        self._chance = next((node.name for node in network.nodes if node.layer.draws), None)
        self._ready = False
        self.loss = 0.0

    @property
    def shards(self) -> int:
        """How many threads compute a part of the batch each."""
        return len(self._shards)

    def forward(
        self, images: Array, *, hooks: Hooks | None = None, draw: Draw | None = None
    ) -> Array:
        """Logits (N, classes) for a training batch, with batch statistics.

        Args:
            images: (N, H, W, C) with N the bound batch; copied.
            draw: what dropout follows from; only a network without any does without.

        Returns:
            A view, valid until the next call.

        Raises:
            ShapeError: images of the wrong shape or dtype, or one image with batch norm.
            ConfigError: there is dropout, and no draw.
        """
        self._check_training(images)
        self._set_draw(draw)
        self._run_forward(images, None, hooks)
        return self._logits

    def backward(self, gradient: Array, *, hooks: Hooks | None = None) -> None:
        """Overwrite the gradients with those of the last :meth:`forward`.

        Args:
            gradient: (N, classes) of some loss by the logits; copied.

        Raises:
            ShapeError: the gradient does not fit, or there was no forward.
        """
        if not self._ready:
            raise ShapeError(f"model {self.network.name}: backward needs a forward before it")
        self._check("gradient", gradient, self._gradient.shape)
        np.copyto(self._gradient, gradient)
        self._run_backward(hooks)

    def step(
        self,
        images: Array,
        labels: NDArray[np.integer[Any]],
        hooks: Hooks | None = None,
        *,
        draw: Draw | None = None,
    ) -> float:
        """Forward and backward of one training batch.

        Args:
            images: (N, H, W, C) with N the bound batch; copied.
            labels: (N,) integers from 0 to classes - 1.
            draw: as for :meth:`forward`.

        Returns:
            Mean softmax cross-entropy; its gradient is in :attr:`gradients`.

        Raises:
            ShapeError: as :meth:`forward`, or labels that do not fit.
            ConfigError: as :meth:`forward`.
        """
        checked = self._check_labels(labels, len(images))
        self._check_training(images)
        self._set_draw(draw)
        self._run_forward(images, checked, hooks)
        self._run_backward(hooks)
        return self.loss

    def predict(self, images: Array) -> Array:
        """Logits (M, classes) in evaluation mode, for any number M of images.

        Running statistics are used. More images than the bound batch are worked off a batch at a
        time; a last part is filled up with zeros.
        """
        self._check("images", images, (len(images), *self.network.input_shape))
        self._ready = False
        logits = np.empty((len(images), self.network.classes), self._logits.dtype)
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            self._crew.run(partial(self._predict_shard, part))
            logits[start : start + len(part)] = self._logits[: len(part)]
        return logits

    def evaluate(self, images: Array, labels: NDArray[np.integer[Any]]) -> tuple[float, int]:
        """Mean loss and number of right answers in evaluation mode, for any number of images.

        Labels are never smoothed here.

        Raises:
            ShapeError: images or labels that do not fit, or no images at all.
        """
        if len(images) == 0:
            raise ShapeError(f"model {self.network.name}: no images to evaluate, expected some")
        checked = self._check_labels(labels, len(images))
        logits = self.predict(images)
        losses = softmax_cross_entropy(logits, checked)
        correct = int(np.count_nonzero(logits.argmax(axis=1) == checked))
        return float(losses.mean(dtype=np.float64)), correct

    def move_statistics(self, momentum: float = MOMENTUM) -> None:
        """Move the running statistics towards the last batch's: for use in a single process."""
        self.statistics *= 1 - momentum
        self.statistics += momentum * self.batch_statistics

    def _run_forward(
        self, images: Array, labels: NDArray[np.int64] | None, hooks: Hooks | None
    ) -> None:
        self._ready = False
        self._crew.run(partial(self._forward_shard, images, labels, hooks))
        self._ready = True

    def _run_backward(self, hooks: Hooks | None) -> None:
        self._ready = False
        self._crew.run(partial(self._backward_shard, hooks))

    def _forward_shard(
        self,
        images: Array,
        labels: NDArray[np.int64] | None,
        hooks: Hooks | None,
        member: Member,
    ) -> None:
        shard = self._shards[member.index]
        last = len(self.network.layers) - 1
        if hooks is not None:
            member.meet(partial(hooks.before_forward, 0))
        shard.load(images)
        for layer in range(last + 1):
            shard.forward(layer, True)
            if layer == last:
                self._logits[member.images] = shard.logits
            member.meet(partial(self._between_forward, layer, labels, hooks))

    def _between_forward(
        self, layer: int, labels: NDArray[np.int64] | None, hooks: Hooks | None
    ) -> None:
        """What one thread does behind a layer while the others wait."""
        last = layer == len(self.network.layers) - 1
        if last and labels is not None:
            losses = softmax_cross_entropy(
                self._logits, labels, self._gradient, smoothing=self._smoothing
            )
            self.loss = float(losses.mean(dtype=np.float64))
        if hooks is not None:
            hooks.after_forward(layer)
            if not last:
                hooks.before_forward(layer + 1)

    def _backward_shard(self, hooks: Hooks | None, member: Member) -> None:
        shard = self._shards[member.index]
        last = len(self.network.layers) - 1
        if hooks is not None:
            member.meet(partial(hooks.before_backward, last))
        np.copyto(shard.gradient, self._gradient[member.images])
        for layer in range(last, -1, -1):
            shard.backward(layer)
            member.meet(partial(self._between_backward, layer, hooks))

    def _between_backward(self, layer: int, hooks: Hooks | None) -> None:
        """As :meth:`_between_forward`; the layer's gradients are added up."""
        for shard in self._shards:
            shard.add_gradients(layer)
        if hooks is not None:
            hooks.after_backward(layer)
            if layer:
                hooks.before_backward(layer - 1)

    def _predict_shard(self, images: Array, member: Member) -> None:
        shard = self._shards[member.index]
        shard.load(images)
        for layer in range(len(self.network.layers)):
            shard.forward(layer, False)
        self._logits[member.images] = shard.logits

    def _check_training(self, images: Array) -> None:
        """Raises ShapeError if these images are no training batch."""
        self._check("images", images, (self.batch, *self.network.input_shape))
        if self._norm is not None and self.batch < 2:
            raise ShapeError(
                f"layer {self._norm}: a batch of 1 image has no batch statistics, "
                f"expected at least 2 to train with batch norm"
            )

    def _set_draw(self, draw: Draw | None) -> None:
        if self._chance is not None and draw is None:
            raise ConfigError(
                f"layer {self._chance}: dropout needs to know what it follows from, "
                f"expected draw=(seed, step, slot)"
            )
        for shard in self._shards:
            shard.set_draw(draw or ())

    def _check(self, what: str, array: Array, shape: tuple[int, ...]) -> None:
        """Raises ShapeError naming the layer that would read ``array``: the first or the last."""
        layer = self.network.layers[0 if what == "images" else -1].name
        if array.shape != shape or array.dtype != self._logits.dtype:
            raise ShapeError(
                f"layer {layer}: {what} have shape {array.shape} and dtype {array.dtype}, "
                f"expected {shape} and {self._logits.dtype}"
            )

    def _check_labels(self, labels: NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
        layer, classes = self.network.layers[-1].name, self.network.classes
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ShapeError(
                f"layer {layer}: labels have shape {labels.shape} and dtype {labels.dtype}, "
                f"expected ({count},) integers"
            )
        if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ShapeError(
                f"layer {layer}: labels run from {labels.min()} to {labels.max()}, "
                f"expected 0 to {classes - 1}"
            )
        return labels.astype(np.int64)
