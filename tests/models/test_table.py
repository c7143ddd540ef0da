"""How a reference becomes a network."""

from __future__ import annotations

import sys

import pytest

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.models import build

OWN = """
from dynacomm_async.nn import Dense, Flatten, Network

number = 3

def tiny(input_shape=(4, 4, 1), classes=3):
    return Network("tiny", [Flatten(), Dense(classes)], input_shape, classes)

def nothing(input_shape=(4, 4, 1), classes=3):
    return None

def stubborn():
    return tiny()
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of one's own in the current directory."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_models"
    sys.modules.pop("own_models", None)


def test_a_function_of_ones_own_is_found_in_the_current_directory(own_module):
    network = build(f"{own_module}:tiny", classes=5)
    assert (network.name, network.input_shape, network.classes) == ("tiny", (4, 4, 1), 5)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("lenett", "unknown model 'lenett': did you mean 'lenet'"),
        ("zzz", "unknown model 'zzz': expected one of googlenet, "),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("own_models:missing", "'own_models' has no function 'missing'"),
        ("own_models:number", "'own_models' has no function 'number'"),
        ("own_models:nothing", "returned a NoneType, expected a Network"),
        (":f", "cannot import ''"),
        ("own_models:", "has no function ''"),
    ],
)
def test_what_cannot_be_resolved_is_refused_in_one_sentence(own_module, reference, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(reference)
    assert "\n" not in str(caught.value)


def test_a_function_that_takes_no_shape_is_refused(own_module):
    assert build(f"{own_module}:stubborn").name == "tiny"
    with pytest.raises(ConfigError, match="cannot be called with input_shape and classes"):
        build(f"{own_module}:stubborn", classes=3)


def test_a_model_that_does_not_fit_the_input_names_the_layer():
    with pytest.raises(ShapeError, match="layer conv2"):
        build("lenet", input_shape=(6, 6, 1))
