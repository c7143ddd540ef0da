"""scikit-learn's digits and their fixed split."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dynacomm_async.data import digits
from dynacomm_async.data.digits import read_digits, split_stratified
from dynacomm_async.errors import ConfigError


@pytest.mark.parametrize("kept_in", ["a file that is known", "a place of its own"])
def test_every_fifth_image_of_each_class_is_held_out(kept_in, monkeypatch):
    if kept_in == "a place of its own":
        monkeypatch.setattr(digits, "find_spec", lambda name: None)
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    scans = datasets.load_digits()
    expected = {"train": [], "test": []}
    counts = [0] * 10
    for image, label in zip(scans.images, scans.target, strict=True):
        counts[label] += 1
        expected["test" if counts[label] % 5 == 0 else "train"].append((image, label))
    for split, name in zip(read_digits(), ("train", "test"), strict=True):
        np.testing.assert_array_equal(split.pixels[..., 0], [image for image, _ in expected[name]])
        np.testing.assert_array_equal(split.labels, [label for _, label in expected[name]])
    assert (len(expected["train"]), len(expected["test"])) == (1442, 355)


def test_reading_them_imports_nothing_that_takes_seconds():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    code = "import sys; from dynacomm_async.data.digits import read_digits; read_digits(); "
    code += "print([name for name in ('sklearn', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_split_takes_a_fifth_of_every_class():
    labels = np.random.default_rng(0).integers(0, 4, 1000)
    held_out = split_stratified(labels)
    for label in range(4):
        of_class = labels == label
        assert (held_out & of_class).sum() == of_class.sum() // 5


def test_without_scikit_learn_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install .*digits"):
        read_digits()
