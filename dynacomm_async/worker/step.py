"""One training step of one worker, as a pure state machine: events in, instructions out.

It knows neither sockets nor clocks nor arrays. A session feeds it what happens on a real link;
fed by a fake clock it is the simulator, and its makespan is what
:func:`dynacomm_async.schedule.timeline.evaluate` says.

    parameters arrive  --RangeArrived-->                 --Compute(FORWARD, layer)-->  compute
    a gradient exists  --LayerComputed-->  StepMachine   --Compute(BACKWARD, layer)--> compute
    the uplink is free --LinkFree------->                --Send(ranges)-------------->  uplink
    the uplink is new  --Resumed-------->                --Send(ranges)-------------->  uplink

Compute instructions are to be carried out one after the other, in the order given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from dynacomm_async.errors import LocalProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.schedule.dispatch import Dispatcher

__all__ = [
    "Compute",
    "Event",
    "Instruction",
    "LayerComputed",
    "LinkFree",
    "Phase",
    "RangeArrived",
    "Resumed",
    "Send",
    "StepMachine",
]


class Phase(Enum):
    """The two passes over the layers."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class RangeArrived:
    """Parameters of this step have landed."""

    cells: Range


@dataclass(frozen=True, slots=True)
class LayerComputed:
    """The gradient of a layer is complete, and its parameters are not needed any more."""

    layer: int


@dataclass(frozen=True, slots=True)
class LinkFree:
    """The message that was sent last has (nearly) left."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The connection is a new one: what the other end has not got leaves again.

    Attributes:
        uplink: the rule by which it leaves; it has handed nothing out yet.
        statistics: cells that travel with the first message, where they have not arrived.
    """

    uplink: Dispatcher
    statistics: Range | None = None


@dataclass(frozen=True, slots=True)
class Compute:
    """The layer may be computed, once the instructions before this one are done."""

    phase: Phase
    layer: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send these gradients as one message; ``first`` marks a step's first one on a connection."""

    cells: tuple[Range, ...]
    first: bool


Event: TypeAlias = RangeArrived | LayerComputed | LinkFree | Resumed
Instruction: TypeAlias = Compute | Send


class StepMachine:
    """What may be computed and what is to be sent, in one step.

    Args:
        layers: the cells of each layer in forward order; together cells 0 .. n-1.
        uplink: the rule by which gradients leave; it has handed nothing out yet.
        statistics: cells that travel with the first gradient message (batch statistics).
    """

    def __init__(
        self,
        layers: Sequence[Range],
        uplink: Dispatcher,
        statistics: Range | None = None,
    ) -> None:
        self._layers = layers
        self._firsts = [cells.first for cells in layers]
        self._missing = [cells.count for cells in layers]  # cells that have not arrived
        self._granted = 0  # layers whose forward may be computed, from the front
        self._computed = [False] * len(layers)
        self._uplink = uplink
        self._statistics = statistics
        self._link_free = True
        self._sent_any = False

    @property
    def pulled(self) -> bool:
        """Whether all parameters of the step have arrived."""
        return self._granted == len(self._layers)

    @property
    def computed(self) -> bool:
        """Whether all gradients of the step exist."""
        return all(self._computed)

    @property
    def pushed(self) -> bool:
        """Whether the last gradient message has (nearly) left."""
        return self._uplink.done and self._link_free

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event; return what is to be done because of it, in order.

        Raises:
            LocalProtocolError: an event that cannot be: cells or a gradient twice.
        """
        if isinstance(event, RangeArrived):
            return self._arrive(event.cells)
        if isinstance(event, LayerComputed):
            self._compute(event.layer)
        elif isinstance(event, Resumed):
            self._resume(event)
        else:
            self._link_free = True
        return self._send()

    def _arrive(self, cells: Range) -> list[Instruction]:
        end = cells.first + cells.count
        layer = bisect_right(self._firsts, cells.first) - 1  # the first layer begins at cell 0
        while layer < len(self._layers) and self._firsts[layer] < end:
            own = self._layers[layer]
            overlap = min(end, own.first + own.count) - max(cells.first, own.first)
            self._missing[layer] -= max(0, overlap)  # statistics lie behind the last layer
            if self._missing[layer] < 0:
                raise LocalProtocolError(f"cells of layer {layer} have arrived twice")
            layer += 1
        instructions: list[Instruction] = []
        while not self.pulled and not self._missing[self._granted]:
            instructions.append(Compute(Phase.FORWARD, self._granted))
            self._granted += 1
            if self.pulled:
                layers = range(len(self._layers))
                instructions += [Compute(Phase.BACKWARD, layer) for layer in reversed(layers)]
        return instructions

    def _compute(self, layer: int) -> None:
        if not self.pulled:
            raise LocalProtocolError(
                f"the gradient of layer {layer} is there before all parameters have arrived"
            )
        if self._computed[layer]:
            raise LocalProtocolError(f"the gradient of layer {layer} is there twice")
        self._computed[layer] = True
        self._uplink.ready(*self._layers[layer])

    def _resume(self, event: Resumed) -> None:
        self._uplink, self._statistics = event.uplink, event.statistics
        for layer, computed in enumerate(self._computed):
            if computed:
                self._uplink.ready(*self._layers[layer])
        self._link_free = True
        self._sent_any = False

    def _send(self) -> list[Instruction]:
        if not self._link_free:
            return []
        cells = self._uplink.next()
        if cells is None:
            return []
        self._link_free = False
        first = not self._sent_any
        self._sent_any = True
        if first and self._statistics is not None and self._statistics.count:
            cells = (*cells, self._statistics)
        return [Send(cells, first)]
