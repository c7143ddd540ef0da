"""Files that survive a power cut, and the one place where the system's errors are translated.

After a failed fsync the kernel may forget that pages were never written, so a second fsync proves
nothing: whoever sees an error here throws the whole file away and writes another one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dynacomm_async.errors import CheckpointError, ConfigError

__all__ = [
    "FileRecord",
    "list_names",
    "lock_directory",
    "make_directories",
    "make_directory",
    "measure_file",
    "move",
    "read_small",
    "remove_tree",
    "sync_directory",
    "unlock",
    "write_file",
]

_PIECE_NBYTES = 1 << 20
_SMALL_NBYTES = 64 << 20
"""More than any checkpoint's JSON; a larger one is not read."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size and SHA-256, in hexadecimal."""

    nbytes: int
    sha256: str


@contextmanager
def _doing(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {what} {path}: {error.strerror or error}") from error


def make_directory(path: Path) -> None:
    """Make a directory that does not exist yet."""
    with _doing("make the directory", path):
        os.mkdir(path)  # noqa: PTH102 - tests let each call of `os` in this module fail


def make_directories(path: Path) -> None:
    """Make a directory and those above it where they are missing; their names are on the disk."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        make_directory(each)
        sync_directory(each.parent)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file from pieces of bytes, and wait until it is on the disk.

    The interpreter is free for other threads while pieces are hashed, written and flushed.

    Raises:
        CheckpointError: what failed and where. A part of the file may be left.
    """
    digest, nbytes = hashlib.sha256(), 0
    with _doing("create", path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with _doing("write", path):
            for piece in _pieces(parts):
                digest.update(piece)
                nbytes += len(piece)
                _write_whole(file, piece)
        with _doing("flush", path):
            os.fsync(file)
    finally:
        with _doing("close", path):
            os.close(file)
    return FileRecord(nbytes, digest.hexdigest())


def _pieces(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        whole = memoryview(part)
        for start in range(0, len(whole), _PIECE_NBYTES):
            yield whole[start : start + _PIECE_NBYTES]


def _write_whole(file: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(file, piece) :]


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    with _doing("flush the directory", path):
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def move(source: Path, target: Path) -> None:
    """Rename, in one step that either has happened or has not."""
    with _doing("rename", source):
        os.rename(source, target)  # noqa: PTH104


def list_names(path: Path) -> list[str]:
    """Return the names in a directory."""
    with _doing("list", path):
        return os.listdir(path)  # noqa: PTH208


def read_small(path: Path) -> bytes:
    """Return a small file's content."""
    with _doing("read", path), path.open("rb") as file:
        # As much as there is: memory for the most that there could be costs time to get.
        return file.read(min(os.fstat(file.fileno()).st_size, _SMALL_NBYTES))


def measure_file(path: Path) -> FileRecord:
    """Return a file's size and hash, read from end to end."""
    digest, nbytes = hashlib.sha256(), 0
    with _doing("read", path), path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        piece = memoryview(bytearray(min(size, _PIECE_NBYTES) or 1))
        while count := file.readinto(piece):
            digest.update(piece[:count])
            nbytes += count
    return FileRecord(nbytes, digest.hexdigest())


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it."""
    with _doing("remove", path):
        shutil.rmtree(path)


def lock_directory(path: Path) -> int:
    """Take a directory for this process alone; returns what :func:`unlock` takes.

    The kernel gives the lock up with the process, however that ends.

    Raises:
        ConfigError: another process has it, or this system has no such locks.
        CheckpointError: the lock file cannot be made.
    """
    if sys.platform == "win32":
        raise ConfigError("checkpoints need POSIX file locks, which Windows does not have")
    import fcntl

    name = path / ".lock"
    with _doing("open", name):
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _doing("lock", name):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except CheckpointError as error:
        os.close(file)
        if isinstance(error.__cause__, BlockingIOError):
            raise ConfigError(
                f"{path} is in use by another server; stop it, or give this one a directory "
                "of its own"
            ) from None
        raise
    return file


def unlock(lock: int) -> None:
    """Give a directory back."""
    with suppress(OSError):  # nothing can be done, and the process's end does it too
        os.close(lock)
