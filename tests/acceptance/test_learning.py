"""Networks learn what they should when they are trained the way a user trains them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TRAIN = (sys.executable, "-m", "dynacomm_async.cli.main", "train", "--data", "digits", "--json")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_resnet20_learns_digits_that_are_resized_to_colour_images():
    """Two workers, 8 x 8 grey scans as 32 x 32 x 3; three to four minutes on two cores::

    dynacomm train --model resnet20 --data digits --workers 2 --batch 16 --epochs 12
        --rate 0.05 --rate-schedule cosine,warmup:20 --augment crop:4
    """
    options = "--model resnet20 --workers 2 --batch 16 --epochs 12 --rate 0.05 --augment crop:4"
    options += " --rate-schedule cosine,warmup:20"
    done = subprocess.run(
        [*TRAIN, *options.split()], capture_output=True, text=True, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 540
    assert result["test_accuracy"] >= 0.985
