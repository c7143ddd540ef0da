"""A network's operators for one shard of a batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from dynacomm_async.nn.crew import Member
from dynacomm_async.nn.graph import Operator
from dynacomm_async.nn.memory import Arenas, Array, Memory, MemoryUse

if TYPE_CHECKING:
    from dynacomm_async.nn.network import Network

__all__ = ["Shard", "count_shards"]

LEAST_FLOPS = 20_000_000
"""Forward operations that a shard must have for each node, on average.

Threads take turns at the interpreter between any two calls of NumPy. Where calls are short, as in
batch norms of small batches, they wait for each other longer than they save: on two cores ResNet-20
took 1.13 times as long with two threads as with one at 13 million, 0.88 at 25 million.
"""


def count_shards(network: Network, batch: int, threads: int) -> int:
    """Shards that ``batch`` images are cut into: a fixed rule, since sums depend on it."""
    shards = network.forward_flops * batch // (LEAST_FLOPS * len(network.nodes))
    return max(1, min(threads, batch, shards))


class Shard:
    """One shard, planned: its arrays and operators.

    The first writes its gradients into the arena; the others have room for those of one scheduled
    layer, which :meth:`add_gradients` adds to the arena before the next one is computed.

    Args:
        network: what it computes.
        member: which images.
        arenas: of the engine.

    Attributes:
        member: as given.
        input: where its images are copied to.
        logits, gradient: (n, classes), what the last layer gives and the gradient by it.
        use: bytes held beside the arenas.
    """

    def __init__(self, network: Network, member: Member, arenas: Arenas) -> None:
        self.member = member
        ends = accumulate(layer.count for layer in network.layers)
        self._parts = [
            slice(end - layer.count, end) for end, layer in zip(ends, network.layers, strict=True)
        ]
        self._arena = arenas.gradients
        self._own = np.zeros(0, self._arena.dtype)
        starts: dict[str, int] = {}
        if member.index:
            self._own = np.zeros(max(layer.count for layer in network.layers), self._arena.dtype)
            arenas = replace(arenas, gradients=self._own)
            for nodes, part in zip(network.layer_nodes, self._parts, strict=True):
                starts.update({node.name: part.start for node in nodes})
        # Planned twice: the first time tells how large workspaces have to be. The large arrays of
        # that are never touched, so they take up no memory.
        trial = Memory(network.nodes, network.input, member, arenas, starts=starts)
        _plan(network, trial)
        needs = trial.needs()
        del trial
        memory = Memory(network.nodes, network.input, member, arenas, starts=starts, scratch=needs)
        self.input = memory.value(network.input)
        self._layers = _plan(network, memory)
        self._memory = memory
        self.logits, self.gradient = memory.value(network.output), memory.gradient(network.output)
        self.use = memory.use() + MemoryUse(0, 0, self._own.nbytes)

    def set_draw(self, draw: tuple[int, ...]) -> None:
        """Say what the chance of the step at hand follows from."""
        self._memory.draw = draw

    def load(self, images: Array) -> None:
        """Copy the shard's part of the whole batch's images, with zeros behind too few."""
        part = images[self.member.images]
        np.copyto(self.input[: len(part)], part)
        self.input[len(part) :] = 0

    def forward(self, layer: int, training: bool) -> None:
        """Run a scheduled layer's operators."""
        for operator in self._layers[layer]:
            operator.forward(training)

    def backward(self, layer: int) -> None:
        """Run a scheduled layer's operators backwards."""
        for operator in reversed(self._layers[layer]):
            operator.backward()

    def add_gradients(self, layer: int) -> None:
        """Add a scheduled layer's gradients to the arena, where they are not there already."""
        if self.member.index:
            part = self._arena[self._parts[layer]]
            np.add(part, self._own[: part.size], out=part)


def _plan(network: Network, memory: Memory) -> list[list[Operator]]:
    """The operators of each scheduled layer."""
    return [[node.layer.plan(node, memory) for node in nodes] for nodes in network.layer_nodes]
