"""A directory of checkpoints: saved whole or not at all, and never loaded wrong.

A checkpoint is a directory ``000012-step-3400`` of safetensors files, ``checkpoint.json`` with the
rest and the SHA-256 of each file, and ``checkpoint.json.sha256`` with the JSON's own (as
``sha256sum -c`` reads it). It is written under another name, flushed file by file, and gets its
name in one rename. The JSON says the name too: files of two checkpoints never pass for one. The
numbers only grow: the highest is the newest, also after a server fell back to an older step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dynacomm_async.errors import CheckpointError, ConfigError, DynaCommError
from dynacomm_async.failpoints import failpoint
from dynacomm_async.server.checkpoint import files
from dynacomm_async.server.checkpoint.files import FileRecord
from dynacomm_async.server.checkpoint.state import (
    CheckpointState,
    Vector,
    encode_header,
    vectors_of,
)
from dynacomm_async.wire.grid import LayerSpec

__all__ = ["Checkpoint", "Checkpoints"]

_log = logging.getLogger("dynacomm_async.server")

_FORMAT = 1
_NAME = re.compile(r"(\d{6,})-step-(\d+)")
_JSON = "checkpoint.json"
_SUM = "checkpoint.json.sha256"
_SAVING, _REMOVING = ".saving-", ".removing-"
_INCARNATION = ".incarnation"


class _Torn(Exception):
    """A checkpoint that cannot be trusted, and why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint in a directory.

    Attributes:
        path: its directory.
        number: grows with every save.
        step: how many steps had been applied.
        healthy: whether it was saved as healthy; None if its JSON cannot be trusted.
    """

    path: Path
    number: int
    step: int
    healthy: bool | None


class Checkpoints:
    """The checkpoints of one run, in a directory that this object alone may use.

    Not safe for two threads at once. The disk needs room for ``keep + 2`` checkpoints: old ones go
    only when the new one is safe, and the newest healthy one never goes.

    Args:
        directory: made if it is missing.
        keep: how many of the newest are kept, at least 1.

    Raises:
        ConfigError: another server uses the directory, or ``keep`` is below 1.
        CheckpointError: the directory cannot be made, or not be written to.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError(f"{keep} checkpoints to keep, expected at least 1")
        self.directory = Path(directory)
        self.keep = keep
        self._identity: tuple[str, tuple[LayerSpec, ...], str] | None = None
        self._torn: set[int] = set()  # whose hashes are known to be wrong
        files.make_directories(self.directory)
        self._lock: int | None = files.lock_directory(self.directory)
        self._clean()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock is not None:
            files.unlock(self._lock)
            self._lock = None

    def list(self) -> tuple[Checkpoint, ...]:
        """Return the checkpoints that are there, oldest first. Their files are not read through.

        Raises:
            CheckpointError: the directory cannot be listed.
        """
        found = []
        for name in files.list_names(self.directory):
            if match := _NAME.fullmatch(name):
                path = self.directory / name
                found.append(Checkpoint(path, int(match[1]), int(match[2]), _health(path)))
        return tuple(sorted(found, key=lambda checkpoint: checkpoint.number))

    def save(self, state: CheckpointState) -> Path:
        """Write a checkpoint and wait until it is on the disk; then drop old ones.

        Raises:
            ConfigError: the directory belongs to another run, model or rule, or the settings are
                no plain values. Nothing was written.
            ShapeError: the vectors do not fit the layers. Nothing was written.
            CheckpointError: what the disk refused, and where. The checkpoints from before are as
                they were. The next call starts from scratch.
        """
        self._check_directory(state)
        self._clean()
        present = self.list()
        number = present[-1].number + 1 if present else 1
        name = f"{number:06d}-step-{state.step}"
        vectors = list(_vectors(state))
        about = _describe(state, name)
        temporary, path = self.directory / f"{_SAVING}{name}", self.directory / name
        files.make_directory(temporary)
        try:
            _write(temporary, about, vectors)
            failpoint("server.before-rename")
            files.move(temporary, path)
        except CheckpointError:
            self._remove(temporary)  # on a full disk it would be in the way of everybody
            raise
        failpoint("server.after-rename")
        files.sync_directory(self.directory)
        self._rotate()
        return path

    def load(
        self,
        *,
        run: str | None = None,
        layers: Sequence[LayerSpec] | None = None,
        rule: str | None = None,
        healthy: bool = False,
    ) -> CheckpointState | None:
        """Return the newest good checkpoint, or None if there is none at all.

        Those that are torn are skipped, and the log says which and why.

        Args:
            run: the run it must be of; None: any.
            layers: the model it must be of; None: any.
            rule: the update rule it must be of; None: any.
            healthy: skip those that were not saved as healthy.

        Raises:
            ConfigError: the newest one is of another run, model or rule.
            CheckpointError: there are checkpoints, but none will do.
        """
        present = self.list()
        for checkpoint in reversed(present):
            try:
                about = _read_about(checkpoint.path)
                _check_identity(self.directory, about, run, layers, rule)
                if healthy and not about["healthy"]:
                    _log.warning("checkpoint %s skipped: it is not healthy", checkpoint.path)
                    continue
                return _read(checkpoint.path, about)
            except _Torn as torn:
                self._torn.add(checkpoint.number)
                _log.warning("checkpoint %s skipped: %s", checkpoint.path, torn)
        if present:
            raise CheckpointError(
                f"none of the {len(present)} checkpoints in {self.directory} will do (the log "
                "says why); repair them, or move them away to begin anew"
            )
        return None

    def next_incarnation(self) -> int:
        """Return a number for this life of the server, higher than any before; it is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        path = self.directory / _INCARNATION
        highest = 0
        for checkpoint in self.list():
            try:
                highest = max(highest, int(_read_about(checkpoint.path)["incarnation"]))
            except _Torn:
                continue
        if path.name in files.list_names(self.directory):
            text = files.read_small(path).strip()
            highest = max(highest, int(text) if text.isdigit() else 0)
        temporary = self.directory / f"{_SAVING}incarnation"
        self._clean()
        files.make_directory(temporary)
        files.write_file(temporary / _INCARNATION, [b"%d\n" % (highest + 1)])
        files.move(temporary / _INCARNATION, path)
        files.sync_directory(self.directory)
        self._remove(temporary)
        return highest + 1

    def _check_directory(self, state: CheckpointState) -> None:
        identity = (state.run, state.layers, state.rule)
        if self._identity == identity:
            return
        for checkpoint in self.list():
            try:
                about = _read_about(checkpoint.path)
            except _Torn:
                continue
            _check_identity(self.directory, about, *identity)
        self._identity = identity

    def _rotate(self) -> None:
        """Drop what is older than the newest ``keep`` good ones, but never the last healthy one."""
        present = self.list()
        good = [c for c in present if c.healthy is not None and c.number not in self._torn]
        if len(good) < self.keep:
            return
        last_healthy = next((c.number for c in reversed(good) if c.healthy), None)
        for checkpoint in present:
            if checkpoint.number >= good[-self.keep].number:
                return
            # One that cannot be read now may be the last healthy one: it stays until there is a
            # newer one.
            outdated = last_healthy is not None and checkpoint.number < last_healthy
            if checkpoint.healthy is False or outdated:
                self._drop(checkpoint)

    def _drop(self, checkpoint: Checkpoint) -> None:
        # Renamed first: one that is half removed must not look like a checkpoint.
        removing = self.directory / f"{_REMOVING}{checkpoint.path.name}"
        try:
            files.move(checkpoint.path, removing)
        except CheckpointError as error:
            _log.error("an old checkpoint stays: %s", error)
        else:
            self._remove(removing)

    def _clean(self) -> None:
        """Remove what interrupted saves and removals have left."""
        for name in files.list_names(self.directory):
            if name.startswith((_SAVING, _REMOVING)):
                self._remove(self.directory / name)

    def _remove(self, path: Path) -> None:
        try:
            files.remove_tree(path)
        except CheckpointError as error:
            _log.error("a leftover stays: %s", error)


def _vectors(state: CheckpointState) -> Sequence[Vector]:
    n_versions = None if state.versions is None else state.versions.size
    return list(vectors_of(state.layers, len(state.optimizer), n_versions, state))


def _describe(state: CheckpointState, name: str) -> dict[str, Any]:
    """Return the JSON's content but for the files.

    Raises:
        ConfigError: settings that JSON would bring back changed.
    """
    about: dict[str, Any] = {
        "format": _FORMAT,
        "name": name,
        "run": state.run,
        "step": state.step,
        "incarnation": state.incarnation,
        "healthy": state.healthy and state.is_finite(),
        "rule": state.rule,
        "layers": [[spec.name, spec.count, spec.decay, spec.statistics] for spec in state.layers],
        "n_states": len(state.optimizer),
        "n_versions": None if state.versions is None else state.versions.size,
        "term": state.term,
        "roster": {str(slot): term for slot, term in state.roster.items()},
        "settings": dict(state.settings),
        "progress": dict(state.progress),
    }
    try:
        same = json.loads(json.dumps(about, allow_nan=False)) == about
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a checkpoint's settings must be plain values: {error}") from None
    if not same:
        raise ConfigError(
            "a checkpoint's settings must be plain values: string keys, and lists for tuples"
        )
    return about


def _write(path: Path, about: Mapping[str, Any], vectors: Sequence[Vector]) -> None:
    records = {}
    for vector in vectors:
        values = np.ascontiguousarray(vector.values, dtype=vector.dtype)
        parts: list[bytes | memoryview] = [encode_header(vector), values.view(np.uint8).data]
        name = f"{vector.stem}.safetensors"
        record = files.write_file(path / name, parts)
        records[name] = {"nbytes": record.nbytes, "sha256": record.sha256}
        failpoint("server.writing")
    text = json.dumps({**about, "files": records}, indent=1).encode()
    files.write_file(path / _JSON, [text])
    files.write_file(path / _SUM, [_sum_line(text)])
    files.sync_directory(path)


def _sum_line(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {_JSON}\n".encode()


def _health(path: Path) -> bool | None:
    try:
        return bool(_read_about(path)["healthy"])
    except _Torn:
        return None


def _read_about(path: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON, if it is what was written there.

    Raises:
        _Torn: it is not.
    """
    try:
        text = files.read_small(path / _JSON)
        line = files.read_small(path / _SUM)
    except CheckpointError as error:
        raise _Torn(str(error)) from error
    if line != _sum_line(text):
        raise _Torn(f"{_JSON} does not match {_SUM}")
    about: dict[str, Any] = json.loads(text)
    if about["format"] != _FORMAT:
        raise _Torn(f"its format is {about['format']}, this version reads {_FORMAT}")
    if about["name"] != path.name:
        raise _Torn(f"{_JSON} is that of {about['name']}")
    return about


def _check_identity(
    directory: Path,
    about: Mapping[str, Any],
    run: str | None,
    layers: Sequence[LayerSpec] | None,
    rule: str | None,
) -> None:
    where = f"{directory} holds checkpoints of"
    advice = "resume that one, or give another directory"
    if run is not None and about["run"] != run:
        raise ConfigError(f"{where} run {about['run']!r}, not of {run!r}; {advice}")
    if layers is not None and _layers(about) != tuple(layers):
        theirs, ours = _sketch(_layers(about)), _sketch(layers)
        raise ConfigError(f"{where} another model ({theirs}; this one has {ours}); {advice}")
    if rule is not None and about["rule"] != rule:
        raise ConfigError(f"{where} the update rule {about['rule']}, not {rule}; {advice}")


def _layers(about: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(*row) for row in about["layers"])


def _sketch(layers: Sequence[LayerSpec]) -> str:
    count = sum(layer.count for layer in layers)
    return f"{len(layers)} layers from {layers[0].name!r} on, {count} parameters"


def _read(path: Path, about: Mapping[str, Any]) -> CheckpointState:
    """Return what a checkpoint holds, after every byte of it has been checked.

    Raises:
        _Torn: one is not what was written.
    """
    forms = list(vectors_of(_layers(about), about["n_states"], about["n_versions"]))
    vectors = [_read_vector(path, about["files"], form) for form in forms]
    n_states = about["n_states"]
    return CheckpointState(
        run=about["run"],
        step=about["step"],
        incarnation=about["incarnation"],
        layers=_layers(about),
        rule=about["rule"],
        parameters=vectors[0],
        statistics=vectors[1],
        optimizer=tuple(vectors[2 : 2 + n_states]),
        settings=about["settings"],
        term=about["term"],
        roster={int(slot): term for slot, term in about["roster"].items()},
        progress=about["progress"],
        versions=None if about["n_versions"] is None else vectors[2 + n_states],
        healthy=about["healthy"],
    )


def _read_vector(
    path: Path, records: Mapping[str, Mapping[str, Any]], form: Vector
) -> NDArray[Any]:
    name = f"{form.stem}.safetensors"
    try:
        if files.measure_file(path / name) != FileRecord(**records[name]):
            raise _Torn(f"{name} is not what was written: its size or SHA-256 differs")
        tensors = load_file(path / name)
    except (DynaCommError, SafetensorError, OSError) as error:
        raise _Torn(str(error)) from error
    parts = [tensors[layer] for layer in form.sizes]
    return np.concatenate(parts).astype(form.dtype, copy=False)
