"""The paper's comparison: its pictures, its table, and that DynaComm is nowhere behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demos" / "paper.py"

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(DEMO), *options],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
def test_every_picture_is_drawn_and_dynacomm_is_nowhere_behind(tmp_path):
    folder = tmp_path / "new" / "paper"
    done = run_demo("-o", str(folder), "--bandwidth", "2gbit", "--overhead", "5ms")

    assert (done.returncode, done.stderr) == (0, "")
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {f"{name}.png" for name in ("networks", "batch", "bandwidth", "workers")} | {
        "planning.png"
    }
    assert all(path.stat().st_size > 20_000 for path in folder.glob("*.png"))
    table = (folder / "table.txt").read_text()
    assert table.strip() in done.stdout
    header, *rows = table.splitlines()[1:]
    assert header.split()[:5] == ["sequential", "layerwise", "ibatch", "bucket", "dynacomm"]
    assert [row.split()[0] for row in rows] == ["VGG-19", "GoogLeNet", "Inception-v4", "ResNet-152"]
    for row in rows:
        layerwise, ibatch, bucket, dynacomm, _, joint, bound = map(float, row.split()[3:10])
        assert bound <= joint <= dynacomm <= min(1, layerwise, ibatch, bucket)


def test_help_shows_an_example():
    done = run_demo("--help")
    assert done.returncode == 0
    assert "example: python demos/paper.py" in done.stdout


@pytest.mark.parametrize(
    "options",
    [["--bandwidth", "unlimited"], ["--flops", "0"], ["--flops", "nan"], ["--bandwidth", "fast"]],
)
def test_a_setting_that_cannot_be_is_refused_without_a_traceback(options, tmp_path):
    done = run_demo(*options, "-o", str(tmp_path / "paper"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "paper").exists()
