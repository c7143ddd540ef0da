"""A run whose disk fails: training goes on, the log says so, and what is on the disk stays true."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading

import pytest

from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server import Checkpoints, ParameterServer, Training
from dynacomm_async.server.checkpoint import files

STEPS = 12
WORKERS = 2


class BrokenDisk:
    """The ``os`` module, of which one call always fails while the disk is broken."""

    def __init__(self, call, code):
        self.broken = False
        self._call, self._code = call, code

    def __getattr__(self, name):
        return self._fail if self.broken and name == self._call else getattr(os, name)

    def _fail(self, *args):
        raise OSError(self._code, os.strerror(self._code))


class Alarm(logging.Handler):
    """Hears the log in the thread that saves: loads what is there, and mends after two failures."""

    def __init__(self, checkpoints, disk):
        super().__init__()
        self.mended = threading.Event()
        self.failures = []
        self.recoveries = []
        self.found = []
        self._checkpoints, self._disk = checkpoints, disk

    def emit(self, record):
        text = record.getMessage()
        if "works again" in text:
            self.recoveries.append(text)
        if "was not saved" not in text:
            return
        self.failures.append(text)
        self.found.append(self._checkpoints.load())
        if len(self.failures) == 2:
            self._disk.broken = False
            self.mended.set()


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
async def test_training_goes_on_while_the_disk_fails_and_saving_recovers_by_itself(
    toy, tmp_path, monkeypatch, call, code
):
    training = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)

    def pause(session, step):
        if step == 8:  # so that the end does not come before the disk has failed twice
            assert alarm.mended.wait(20)

    def on_step(record):
        disk.broken = disk.broken or (record.index >= 3 and not alarm.mended.is_set())

    with Checkpoints(tmp_path) as checkpoints:
        disk = BrokenDisk(call, code)
        alarm = Alarm(checkpoints, disk)
        monkeypatch.setattr(files, "os", disk)
        logger = logging.getLogger("dynacomm_async.server")
        logger.addHandler(alarm)
        try:
            async with ParameterServer(
                toy.layers,
                workers=WORKERS,
                steps=STEPS,
                training=training,
                initial=toy.initial,
                initial_statistics=toy.initial_statistics,
                checkpoints=checkpoints,
                checkpoint_every=1,
                on_step=on_step,
            ) as server:
                work = [asyncio.to_thread(toy.work, server.address, pause) for _ in range(WORKERS)]
                await asyncio.gather(*work)
                result = await server.finished()
        finally:
            logger.removeHandler(alarm)
        last = checkpoints.load()

    for text in alarm.failures:
        assert str(tmp_path) in text
        assert os.strerror(code) in text
    assert len(alarm.failures) == 2
    assert len(alarm.recoveries) == 1
    states = [*alarm.found, last]
    assert states[0].step == states[1].step <= 4, "the old one is intact while the disk fails"
    assert last.step == STEPS
    for state in states:
        parameters, statistics = toy.replay(WORKERS, state.step, training)
        assert state.parameters.tobytes() == parameters.tobytes(), state.step
        assert state.statistics.tobytes() == statistics.tobytes(), state.step
    assert result.parameters.tobytes() == parameters.tobytes()
