"""Named places to fail at: off unless armed, and every name is really somewhere."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynacomm_async
from dynacomm_async import failpoints
from dynacomm_async.errors import ConfigError
from dynacomm_async.failpoints import FAILPOINTS, arm, arm_from, disarm, failpoint


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    disarm()


def test_every_name_is_come_to_somewhere_and_nothing_else_is() -> None:
    root = Path(dynacomm_async.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in root.rglob("*.py")]
    named = [name for text in texts for name in re.findall(r"^ +failpoint\(\"(.*)\"\)", text, re.M)]
    assert sorted(named) == sorted(FAILPOINTS)


def test_what_is_armed_hears_of_every_place_until_it_is_disarmed() -> None:
    seen: list[str] = []
    failpoint("server.greeted")
    arm(seen.append)
    failpoint("server.greeted")
    failpoint("worker.lost")
    disarm()
    failpoint("worker.lost")
    assert seen == ["server.greeted", "worker.lost"]


@pytest.mark.parametrize(
    "text", ["nowhere=kill@1", "worker.lost=sing@1", "worker.lost", "worker.lost=kill@x"]
)
def test_an_environment_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME=kill@N"):
        arm_from({"DYNACOMM_FAILPOINTS": text})


def test_without_a_word_in_the_environment_nothing_is_armed() -> None:
    arm_from({})
    assert failpoints._action is None


def test_one_that_hangs_keeps_the_thread_that_comes_there_and_no_other(tmp_path: Path) -> None:
    log = tmp_path / "hits"
    arm_from({"DYNACOMM_FAILPOINTS": "worker.lost=hang@2", "DYNACOMM_FAILPOINTS_LOG": str(log)})
    came_back: list[str] = []

    def come() -> None:
        for _ in range(2):
            failpoint("worker.lost")
            came_back.append("once")

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    while not log.exists() or not log.read_text():
        thread.join(0.01)
    failpoint("worker.lost")  # the third time
    thread.join(0.05)
    assert thread.is_alive()
    assert came_back == ["once"]
