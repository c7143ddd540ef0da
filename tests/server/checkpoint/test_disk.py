"""Disks that fail and processes that die: the checkpoints from before are never harmed."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dynacomm_async.errors import CheckpointError
from dynacomm_async.server.checkpoint import Checkpoints, files
from dynacomm_async.wire.grid import LayerSpec

SEED = 21
CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "listdir")


class FailingOs:
    """The ``os`` module, whose n-th call of those that touch the disk fails.

    A write that fails has written half before, as on a disk that fills up.
    """

    def __init__(self, fail_at=None, error=errno.EIO, names=CALLS):
        self.fail_at = fail_at
        self.error = error
        self.names = names
        self.calls = []

    def __getattr__(self, name):
        real = getattr(os, name)
        return self._wrap(name, real) if name in self.names else real

    def _wrap(self, name, real):
        def call(*args):
            self.calls.append(name)
            if len(self.calls) - 1 != self.fail_at:
                return real(*args)
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if name == "close":
                real(*args)
            raise OSError(self.error, os.strerror(self.error))

        return call


def count_calls(monkeypatch, tmp_path, draw_state):
    """The calls of a save that finds two checkpoints and rotates one away."""
    with Checkpoints(tmp_path / "counted", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(draw_state(step))
        counting = FailingOs()
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", counting)
            checkpoints.save(draw_state(3))
    return counting.calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_whichever_call_fails_the_old_ones_stay_and_the_next_save_works(
    tmp_path, monkeypatch, draw_state, content, code, caplog
):
    calls = count_calls(monkeypatch, tmp_path, draw_state)
    assert {name: calls.count(name) for name in ("mkdir", "rename")} == {"mkdir": 1, "rename": 2}
    assert calls.count("write") >= 8, "a header and a vector in each of three files, two in JSON"
    assert calls.count("fsync") == 7, "five files, their directory, and the one it is in"
    raised = 0
    for fail_at, name in enumerate(calls):
        directory = tmp_path / f"{fail_at}"
        states = [draw_state(step) for step in (1, 2)]
        with Checkpoints(directory, keep=2) as checkpoints:
            for state in states:
                checkpoints.save(state)
            caplog.clear()
            failing = FailingOs(fail_at, code)
            with monkeypatch.context() as patch:
                patch.setattr(files, "os", failing)
                try:
                    checkpoints.save(draw_state(3))
                except CheckpointError as error:
                    raised += 1
                    told = str(error)
                else:
                    # The new one was safe already; what failed is the removal of an old one.
                    told = caplog.text
                    assert checkpoints.load().step == 3
            assert os.strerror(code) in told, (fail_at, name)
            assert str(directory) in told, (fail_at, name)
            # With a directory that was renamed but maybe not flushed, 3 is there and whole.
            steps = [found.step for found in checkpoints.list()]
            assert steps in ([1, 2], [1, 2, 3]), (fail_at, name)
            loaded = checkpoints.load()
            assert content(loaded) == content([*states, draw_state(3)][steps[-1] - 1])
            after = draw_state(4)
            checkpoints.save(after)
            assert content(checkpoints.load()) == content(after)
            assert len(checkpoints.list()) == 2
            assert not [path for path in directory.iterdir() if path.name.startswith(".saving")]
    assert raised >= 25


def test_a_failure_says_what_and_where(tmp_path, monkeypatch, draw_state):
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(files, "os", FailingOs(0, errno.ENOSPC, names=("write",)))
        match = r"^cannot write .*/parameters\.safetensors: No space left on device$"
        with pytest.raises(CheckpointError, match=match) as caught:
            checkpoints.save(draw_state(1))
    assert isinstance(caught.value.__cause__, OSError)


def test_a_leftover_that_could_not_be_removed_at_once_is_removed_by_the_next_save(
    tmp_path, monkeypatch, draw_state, caplog
):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", FailingOs(0, errno.EIO, names=("fsync",)))
            patch.setattr(files.shutil, "rmtree", fail)
            with pytest.raises(CheckpointError, match=r"^cannot flush .*Input/output error$"):
                checkpoints.save(draw_state(1))
        assert (tmp_path / ".saving-000001-step-1").exists()
        assert "a leftover stays: cannot remove" in caplog.text
        checkpoints.save(draw_state(2))
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "000001-step-2"}


def test_an_unreadable_file_is_skipped_like_a_torn_one(tmp_path, monkeypatch, draw_state, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(draw_state(step))
        measure = files.measure_file

        def fail(path):
            if "step-2" in str(path):
                raise CheckpointError(f"cannot read {path}: Input/output error")
            return measure(path)

        monkeypatch.setattr(files, "measure_file", fail)
        assert checkpoints.load().step == 1
    assert "step-2 skipped: cannot read" in caplog.text


def test_a_file_where_the_directory_should_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot open .*file/\.lock: Not a directory"):
        Checkpoints(tmp_path / "file")


def test_a_disk_that_is_full_fails_the_save_and_harms_nothing(small_disk, draw_state, content):
    place, _ = small_disk
    layers = (LayerSpec("w", 20_000),)
    states = [draw_state(step, layers=layers) for step in (1, 2, 3)]
    with Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(states[0])
        for room_nbytes in (0, 4096, 90_000, 150_000, 170_000):
            ballast = place / "ballast"
            free = os.statvfs(place)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - room_nbytes))
            for _ in range(2):
                with pytest.raises(CheckpointError, match="No space left on device"):
                    checkpoints.save(states[1])
                assert content(checkpoints.load()) == content(states[0])
                free_now = os.statvfs(place)
                assert free_now.f_bavail * free_now.f_bsize >= room_nbytes // 4096 * 4096
            ballast.unlink()
        checkpoints.save(states[2])
        assert content(checkpoints.load()) == content(states[2])
        assert [found.step for found in checkpoints.list()] == [1, 3]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_disk_with_any_room_left_saves_whole_or_fails_and_harms_nothing(
    small_disk, draw_state, content
):
    """The long form: 300 amounts of room, from nothing to more than enough."""
    place, _ = small_disk
    numbers = random.Random(SEED)
    layers = (LayerSpec("w", 20_000),)
    outcomes = []
    with Checkpoints(place / "checkpoints", keep=1) as checkpoints:
        last = draw_state(0, layers=layers)
        checkpoints.save(last)
        for step in range(1, 301):
            free = os.statvfs(place)
            free_nbytes = free.f_bavail * free.f_bsize
            ballast = place / "ballast"
            ballast.write_bytes(bytes(free_nbytes - numbers.randrange(250_000)))
            state = draw_state(step, layers=layers)
            told = None
            try:
                checkpoints.save(state)
            except CheckpointError as error:
                told = str(error)
            else:
                last = state
            outcomes.append(told is None)
            assert told is None or "No space left on device" in told, (SEED, step)
            assert content(checkpoints.load()) == content(last), (SEED, step)
            ballast.unlink()
    assert min(outcomes.count(True), outcomes.count(False)) >= 20, (SEED, outcomes)


def test_a_disk_that_turns_read_only_is_said_and_recovers(small_disk, draw_state, content):
    place, mount = small_disk
    with Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(draw_state(1))
        lock, checkpoints._lock = checkpoints._lock, None  # a file open for writing forbids it
        files.unlock(lock)
        assert mount("remount", "ro").returncode == 0
        with pytest.raises(CheckpointError, match="Read-only file system"):
            checkpoints.save(draw_state(2))
        assert content(checkpoints.load()) == content(draw_state(1))
        with pytest.raises(CheckpointError, match=r"cannot open .*\.lock: Read-only file system"):
            Checkpoints(place / "checkpoints")
        assert mount("remount", "rw").returncode == 0
        checkpoints.save(draw_state(3))
        assert content(checkpoints.load()) == content(draw_state(3))


KILLED = """
    import os, signal, sys
    import numpy as np
    from dynacomm_async.server.checkpoint import Checkpoints, CheckpointState, files
    from dynacomm_async.wire.grid import LayerSpec

    CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "listdir")

    class DyingOs:
        "Kills this process at the n-th call: before it, after it, or with half a write done."

        def __init__(self, die_at, when):
            self.n, self.die_at, self.when = 0, die_at, when

        def __getattr__(self, name):
            real = getattr(os, name)
            return self.wrap(name, real) if name in CALLS else real

        def wrap(self, name, real):
            def call(*args):
                self.n += 1
                if self.n - 1 != self.die_at:
                    return real(*args)
                if self.when == "after":
                    real(*args)
                elif self.when == "within" and name == "write":
                    real(args[0], args[1][:len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call

    def state(step):
        values = np.random.default_rng(step).standard_normal(3000).astype(np.float32)
        return CheckpointState(
            "run", step, 1, (LayerSpec("a", 1000), LayerSpec("b", 2000)), "momentum",
            values, values[:0], (values[::-1].copy(),), {"step": step},
        )

    def same(loaded):
        wanted = state(loaded.step)
        pairs = zip((loaded.parameters, *loaded.optimizer), (wanted.parameters, *wanted.optimizer))
        return all(a.tobytes() == b.tobytes() for a, b in pairs) and loaded.settings["step"]

    root, every, died, renamed = sys.argv[1], int(sys.argv[2]), 0, 0
    for first, when in enumerate(("before", "within", "after")):
        for die_at in range(first % every, 1000, every):
            directory = f"{root}/{when}-{die_at}"
            with Checkpoints(directory, keep=2) as checkpoints:
                checkpoints.save(state(1))
                checkpoints.save(state(2))
            child = os.fork()
            if child == 0:
                checkpoints = Checkpoints(directory, keep=2)
                files.os = DyingOs(die_at, when)
                checkpoints.save(state(3))
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            with Checkpoints(directory, keep=2) as checkpoints:
                loaded = checkpoints.load()
                assert loaded.step in (2, 3), (when, die_at)
                assert same(loaded), (when, die_at)
                names = {name for name in os.listdir(directory) if name[0] == "."}
                assert names == {".lock"}, names
                if os.WIFSIGNALED(status):
                    died += 1
                    renamed += loaded.step == 3
                checkpoints.save(state(4))
                assert checkpoints.load().step == 4 and len(checkpoints.list()) == 2
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0 and loaded.step == 3
                break
    print(died, renamed)
"""


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_a_process_killed_at_any_call_of_a_save_leaves_the_last_good_one(tmp_path, every):
    """Before, within and after every call; the short form takes the three in turns."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(every)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    died, renamed = map(int, done.stdout.split())
    assert died > 90 // every, "three times about 35 calls"
    assert 0 < renamed < died, "before and after the rename"


def test_a_large_vector_is_written_in_pieces(tmp_path, monkeypatch):
    whole = np.arange(1_000_000, dtype=np.uint8)
    sizes = []
    write = os.write

    class Short:
        def __getattr__(self, name):
            return self.write if name == "write" else getattr(os, name)

        def write(self, file, piece):
            sizes.append(len(piece))
            return write(file, piece[:300_000])  # a system may take less than it is given

    monkeypatch.setattr(files, "os", Short())
    record = files.write_file(tmp_path / "file", [b"head", whole.data, whole.data])
    assert (tmp_path / "file").read_bytes() == b"head" + whole.tobytes() * 2
    assert record == files.measure_file(tmp_path / "file")
    assert max(sizes) <= 1 << 20
