"""What a training step costs on one machine and its link, layer by layer.

Inside the package a cost is an integer: nanoseconds or bytes, so that every machine computes the
same plan from the same table. Files hold seconds; the border is :meth:`Costs.from_json`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from dynacomm_async.errors import PlanError

__all__ = ["Costs", "LayerCosts"]

_NS_PER_S = 10**9
_LONGEST_S = 10**9  # about 32 years: more is a mistake in the unit, not a measurement


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """The costs of one layer; every scheduled layer has parameters.

    Attributes:
        name: unique within a cost table.
        nbytes: size of its parameters (and of its gradients), at least 1.
        pull_ns: time its parameters occupy the downlink, without the per-message overhead.
        forward_ns: time of its forward computation.
        backward_ns: time of its backward computation.
        push_ns: time its gradients occupy the uplink, without the per-message overhead.

    Raises:
        PlanError: an empty name, a number that is not an ``int`` or is too small.
    """

    name: str
    nbytes: int
    pull_ns: int
    forward_ns: int
    backward_ns: int
    push_ns: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"a layer's name is {_show(self.name)}, expected a non-empty string")
        where = f"layer {self.name!r}"
        _check_int(self.nbytes, 1, f"{where}: nbytes")
        _check_int(self.pull_ns, 0, f"{where}: pull_ns")
        _check_int(self.forward_ns, 0, f"{where}: forward_ns")
        _check_int(self.backward_ns, 0, f"{where}: backward_ns")
        _check_int(self.push_ns, 0, f"{where}: push_ns")


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost table of one worker's step.

    Attributes:
        layers: in forward order, at least one.
        overhead_up_ns: time every message occupies the uplink beside its bytes.
        overhead_down_ns: the same for the downlink.
        latency_up_ns: time from the end of a push to its arrival; it keeps no link busy.
        latency_down_ns: the same for a pull.
        server_ns: time from a gradient's arrival at the server until the parameters it changes
            may leave, however much arrived with it.
        workers: how many workers train together.
        batch: samples of one worker in one step, where known.
        shared_link: whether all workers share one medium; see :attr:`link_share`.
        half_duplex: whether both directions take turns on one medium, so that nothing is gained
            by using them at once.
        others: the tables of the other workers where they differ, none of which has others
            itself; empty: all workers are like this one.

    Raises:
        PlanError: others with others or with other layers, no layers, two layers of one name, a
            number that is not an ``int`` or is too small.
    """

    layers: tuple[LayerCosts, ...]
    overhead_up_ns: int
    overhead_down_ns: int
    latency_up_ns: int = 0
    latency_down_ns: int = 0
    server_ns: int = 0
    workers: int = 1
    batch: int | None = None
    shared_link: bool = False
    half_duplex: bool = False
    others: tuple[Costs, ...] = ()

    def __post_init__(self) -> None:
        _check_layers(self.layers)
        _check_int(self.overhead_up_ns, 0, "overhead_up_ns")
        _check_int(self.overhead_down_ns, 0, "overhead_down_ns")
        _check_int(self.latency_up_ns, 0, "latency_up_ns")
        _check_int(self.latency_down_ns, 0, "latency_down_ns")
        _check_int(self.server_ns, 0, "server_ns")
        _check_int(self.workers, 1, "workers")
        if self.batch is not None:
            _check_int(self.batch, 1, "batch")
        if not isinstance(self.shared_link, bool):
            raise PlanError(f"shared_link is {_show(self.shared_link)}, expected True or False")
        if not isinstance(self.half_duplex, bool):
            raise PlanError(f"half_duplex is {_show(self.half_duplex)}, expected True or False")
        sizes = [layer.nbytes for layer in self.layers]
        for other in self.others:
            if other.others:
                raise PlanError("the table of another worker has others itself, expected none")
            if [layer.nbytes for layer in other.layers] != sizes:
                raise PlanError("the table of another worker has other layers, expected the same")

    @property
    def link_share(self) -> int:
        """How many times longer the link is busy than for this worker's bytes alone.

        On a shared link the workers, who run in lockstep, send the same messages one after
        another: every transfer and every overhead takes ``workers`` times as long. Else 1.
        """
        return self.workers if self.shared_link else 1

    @classmethod
    def from_json(cls, mapping: object) -> Costs:
        """Build a table from the parsed content of a ``costs.json`` file.

        Times are in seconds, rounded here to whole nanoseconds. ``overhead_s`` and ``layers`` are
        required; ``overhead_up_s`` and ``overhead_down_s`` override ``overhead_s`` for their
        direction; ``latency_up_s``, ``latency_down_s``, ``server_s``, ``workers``, ``batch``,
        ``link`` (``"own"`` or ``"shared"``), ``duplex`` (``"full"`` or ``"half"``) and ``others``
        (a list of such tables) are optional. Other keys are ignored, so that files may carry notes.

        Raises:
            PlanError: anything else than such a table; the sentence names the layer and the key,
                what came and what was expected.
        """
        table = _read_object(mapping, "the cost table")
        where = "the cost table"
        overhead_ns = _read_ns(table, "overhead_s", where)
        batch = table.get("batch")
        return cls(
            layers=tuple(
                _read_layer(row, index) for index, row in enumerate(_read_rows(table, where))
            ),
            overhead_up_ns=_read_ns(table, "overhead_up_s", where, overhead_ns),
            overhead_down_ns=_read_ns(table, "overhead_down_s", where, overhead_ns),
            latency_up_ns=_read_ns(table, "latency_up_s", where, 0),
            latency_down_ns=_read_ns(table, "latency_down_s", where, 0),
            server_ns=_read_ns(table, "server_s", where, 0),
            workers=_read_count(table, "workers", where, 1),
            batch=None if batch is None else _read_count(table, "batch", where),
            shared_link=_read_choice(table, "link", ("own", "shared"), where),
            half_duplex=_read_choice(table, "duplex", ("full", "half"), where),
            others=tuple(cls.from_json(other) for other in _read_others(table, where)),
        )

    def to_json(self) -> dict[str, object]:
        """Return the content of a ``costs.json`` file.

        :meth:`from_json` gives back an equal table as long as no time exceeds 2**51 ns (26 days).
        ``overhead_s`` is the larger of the two directions, for readers that know one only.
        """
        table: dict[str, object] = {
            "overhead_s": max(self.overhead_up_ns, self.overhead_down_ns) / _NS_PER_S,
            "overhead_up_s": self.overhead_up_ns / _NS_PER_S,
            "overhead_down_s": self.overhead_down_ns / _NS_PER_S,
            "latency_up_s": self.latency_up_ns / _NS_PER_S,
            "latency_down_s": self.latency_down_ns / _NS_PER_S,
            "server_s": self.server_ns / _NS_PER_S,
            "workers": self.workers,
            "link": "shared" if self.shared_link else "own",
            "duplex": "half" if self.half_duplex else "full",
        }
        if self.batch is not None:
            table["batch"] = self.batch
        table["layers"] = [_write_layer(layer) for layer in self.layers]
        if self.others:
            table["others"] = [other.to_json() for other in self.others]
        return table


def _show(value: object) -> str:
    return reprlib.repr(value)


def _check_int(value: object, least: int, what: str) -> None:
    if type(value) is not int or value < least:
        raise PlanError(f"{what} is {_show(value)}, expected an int of at least {least}")


def _check_layers(layers: object) -> None:
    if not isinstance(layers, tuple) or not layers:
        raise PlanError(f"the layers are {_show(layers)}, expected a tuple of at least one layer")
    seen: dict[str, int] = {}
    for index, layer in enumerate(layers):
        if not isinstance(layer, LayerCosts):
            raise PlanError(f"layer {index} is {_show(layer)}, expected LayerCosts")
        if layer.name in seen:
            raise PlanError(
                f"layers {seen[layer.name]} and {index} are both named {layer.name!r}, "
                "expected every name once"
            )
        seen[layer.name] = index


def _read_object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} is {_show(value)}, expected an object with named fields")
    return value


def _read_rows(table: Mapping[str, object], where: str) -> list[object]:
    if "layers" not in table:
        raise PlanError(f"{where}: layers is missing, expected a list of layers")
    rows = table["layers"]
    if not isinstance(rows, list) or not rows:
        raise PlanError(f"{where}: layers is {_show(rows)}, expected a list of at least one layer")
    return rows


def _read_layer(value: object, index: int) -> LayerCosts:
    row = _read_object(value, f"layer {index}")
    name = row.get("name")
    if not isinstance(name, str) or not name:
        came = _show(name) if "name" in row else "missing"
        raise PlanError(f"layer {index}: name is {came}, expected a non-empty string")
    where = f"layer {index} ({name!r})"
    return LayerCosts(
        name=name,
        nbytes=_read_count(row, "nbytes", where),
        pull_ns=_read_ns(row, "pull_s", where),
        forward_ns=_read_ns(row, "forward_s", where),
        backward_ns=_read_ns(row, "backward_s", where),
        push_ns=_read_ns(row, "push_s", where),
    )


def _read_ns(table: Mapping[str, object], key: str, where: str, default: int | None = None) -> int:
    """Read seconds, return nanoseconds; a default stands in for an absent key only."""
    if key not in table and default is not None:
        return default
    value = table.get(key)
    # The comparison is false for NaN and both infinities, and safe for integers of any size.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LONGEST_S:
        return round(value * _NS_PER_S)
    came = _show(value) if key in table else "missing"
    raise PlanError(
        f"{where}: {key} is {came}, expected seconds as a number from 0 to {_LONGEST_S:.0e}"
    )


def _read_count(
    table: Mapping[str, object], key: str, where: str, default: int | None = None
) -> int:
    if key not in table and default is not None:
        return default
    value = table.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    came = _show(value) if key in table else "missing"
    raise PlanError(f"{where}: {key} is {came}, expected a whole number of at least 1")


def _read_others(table: Mapping[str, object], where: str) -> list[object]:
    others = table.get("others", [])
    if not isinstance(others, list):
        raise PlanError(f"{where}: others is {_show(others)}, expected a list of cost tables")
    for other in others:
        if isinstance(other, Mapping) and other.get("others"):
            raise PlanError(f"{where}: a table among others has others itself, expected none")
    return others


def _read_choice(
    table: Mapping[str, object], key: str, choices: tuple[str, str], where: str
) -> bool:
    """Return whether it is the second of two choices; the first is the default."""
    choice = table.get(key, choices[0])
    if choice not in choices:
        raise PlanError(
            f'{where}: {key} is {_show(choice)}, expected "{choices[0]}" or "{choices[1]}"'
        )
    return choice == choices[1]


def _write_layer(layer: LayerCosts) -> dict[str, object]:
    return {
        "name": layer.name,
        "nbytes": layer.nbytes,
        "pull_s": layer.pull_ns / _NS_PER_S,
        "forward_s": layer.forward_ns / _NS_PER_S,
        "backward_s": layer.backward_ns / _NS_PER_S,
        "push_s": layer.push_ns / _NS_PER_S,
    }
