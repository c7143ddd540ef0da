"""The tree of errors, as its own page draws it."""

from __future__ import annotations

import pickle
import re

import pytest

from dynacomm_async import errors
from dynacomm_async.errors import ConfigError, DynaCommError, PeerError

LINE = re.compile(r"^ {4}((?:[│ ]   )*(?:[├└]── )?)(\w+)(?: \(also (\w+)\))?", re.M)


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Each error with its bases, from the drawing in the module's docstring."""
    drawing = (errors.__doc__ or "").split("::\n\n", 1)[1].split("\n\n", 1)[0]
    tree: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for indent, name, also in LINE.findall(drawing):
        depth = len(indent) // 4
        path = [*path[:depth], name]
        tree[name] = (path[depth - 1] if depth else "Exception", *([also] if also else []))
    return tree


def test_the_tree_is_as_drawn() -> None:
    defined = {
        name: tuple(base.__name__ for base in value.__bases__)
        for name, value in vars(errors).items()
        if isinstance(value, type)
    }
    assert drawn_tree() == defined


def test_all_errors_are_public_and_described() -> None:
    assert sorted(errors.__all__) == sorted(drawn_tree())
    for name in errors.__all__:
        assert getattr(errors, name).__doc__


def test_a_wrong_setting_is_a_value_error_too() -> None:
    for name in ("ConfigError", "PlanError", "ShapeError"):
        assert issubclass(getattr(errors, name), ValueError)
    with pytest.raises(ValueError, match="rate"):
        raise ConfigError("rate is -1")


def test_a_peers_error_has_its_code_and_reads_as_its_text() -> None:
    error = PeerError("run-full", "no place left")
    assert (error.code, str(error)) == ("run-full", "no place left")
    assert isinstance(error, DynaCommError)


def test_a_peers_error_crosses_processes_with_its_code() -> None:
    error = pickle.loads(pickle.dumps(PeerError("run-full", "no place left")))
    assert (type(error), error.code, str(error)) == (PeerError, "run-full", "no place left")


def test_the_branches_that_call_for_different_action_are_apart() -> None:
    branches = [errors.ConfigError, errors.ProtocolError, errors.ChannelError, errors.PeerError]
    for branch in branches:
        assert [other for other in branches if issubclass(branch, other)] == [branch]
    assert not issubclass(DynaCommError, OSError), "the system's errors are translated"
