"""The saver: one save at a time in a thread, the newest state wins, failures are heard."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref

import numpy as np
import pytest

from dynacomm_async.errors import CheckpointError
from dynacomm_async.server.checkpoint import Checkpoints, Saver, files


class Held:
    """Stands for a slow disk: each save waits until it is let go, and fails where told to."""

    def __init__(self, failing=()):
        self.failing = set(failing)
        self.saved = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.at_once = 0
        self.most_at_once = 0

    def save(self, state):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.begun.release()
        assert self.go.acquire(timeout=60)
        self.at_once -= 1
        if state.step in self.failing:
            raise CheckpointError("cannot write /disk/file: No space left on device")
        self.saved.append(state.step)
        return f"/disk/{state.step}"


def test_the_newest_state_wins_and_only_one_waits(draw_state):
    disk = Held()
    saver = Saver(disk)
    saver.offer(draw_state(1))
    assert disk.begun.acquire(timeout=60)
    waiting = [draw_state(step) for step in range(2, 12)]
    watched = [weakref.ref(state.parameters) for state in waiting]
    while waiting:
        saver.offer(waiting.pop(0))
    gc.collect()
    assert [ref() is not None for ref in watched] == [False] * 9 + [True], "bounded memory"
    disk.go.release(2)
    assert saver.close(60)
    assert disk.saved == [1, 11]
    assert (saver.saved_step, saver.replaced, disk.most_at_once) == (11, 9, 1)
    gc.collect()
    assert watched[-1]() is None


def test_a_failure_is_an_error_in_the_log_and_the_next_one_is_tried(draw_state, caplog):
    disk = Held(failing=[1, 2, 4])
    saved = []
    saver = Saver(disk, on_saved=lambda step, path: saved.append((step, path)))
    seen = []
    with caplog.at_level(logging.INFO, "dynacomm_async.server"):
        for step in (1, 2, 3, 4, 5):
            saver.offer(draw_state(step))
            assert disk.begun.acquire(timeout=60)  # so the one before has ended
            seen.append((saver.failures, saver.failures_in_a_row, saver.saved_step))
            disk.go.release()
        assert saver.close(60)
    assert seen == [(0, 0, None), (1, 1, None), (2, 2, None), (2, 0, 3), (3, 1, 3)]
    assert (saver.failures, saver.last_error, saver.saved_step) == (3, None, 5)
    assert saved == [(3, "/disk/3"), (5, "/disk/5")]
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "ERROR", "WARNING", "ERROR", "WARNING"]
    assert caplog.messages[2] == (
        "the checkpoint of step 3 was saved: the disk works again after 2 failures"
    )
    assert caplog.messages[1] == (
        "the checkpoint of step 2 was not saved (failure 2 in a row): "
        "cannot write /disk/file: No space left on device"
    )


@pytest.mark.parametrize("failing", [[], [1]])
def test_a_state_is_let_go_as_soon_as_its_save_has_ended(draw_state, failing):
    disk = Held(failing)
    saver = Saver(disk)
    freed = threading.Event()
    state = draw_state(1)
    watched = weakref.ref(state.parameters, lambda _: freed.set())
    saver.offer(state)
    del state
    assert watched() is not None
    disk.go.release()
    assert freed.wait(60)
    assert saver.close(60) is not bool(failing)


def test_closing_says_whether_the_last_state_is_safe(draw_state):
    disk = Held(failing=[1])
    saver = Saver(disk)
    saver.offer(draw_state(1))
    disk.go.release()
    assert saver.close(60) is False
    assert "No space left" in saver.last_error
    with pytest.raises(RuntimeError, match="closed"):
        saver.offer(draw_state(2))


def test_a_disk_that_hangs_does_not_hold_the_closing_for_ever(draw_state):
    disk = Held()
    saver = Saver(disk)
    saver.offer(draw_state(1))
    assert disk.begun.acquire(timeout=60)
    assert saver.close(0) is False
    disk.go.release()
    assert saver.close(60) is True


def test_an_error_that_nobody_expected_does_not_end_the_thread(draw_state, tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        saver = Saver(checkpoints)
        saver.offer(draw_state(1, parameters=np.zeros(3, np.float32)))
        assert saver.close(60) is False
        assert "step 1 was not saved" in caplog.text
        saver = Saver(checkpoints)
        saver.offer(draw_state(2))
        assert saver.close(60) is True
        assert checkpoints.load().step == 2


@pytest.mark.asyncio
async def test_the_event_loop_goes_on_while_the_disk_is_stuck(draw_state, tmp_path, monkeypatch):
    stuck, free = threading.Event(), threading.Event()
    flush = files.sync_directory

    def slow_flush(path):
        stuck.set()
        assert free.wait(60)
        flush(path)

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(files, "sync_directory", slow_flush)
        saver = Saver(checkpoints)
        saver.offer(draw_state(1))
        assert await asyncio.to_thread(stuck.wait, 60)
        for step in range(2, 50):
            saver.offer(draw_state(step))
            await asyncio.sleep(0)
        assert saver.saved_step is None
        free.set()
        assert await asyncio.to_thread(saver.close, 60)
        assert checkpoints.load().step == 49
        assert [found.step for found in checkpoints.list()] == [1, 49]
