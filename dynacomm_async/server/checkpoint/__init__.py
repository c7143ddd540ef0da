"""Checkpoints on disk: what a server needs to go on as if it had never stopped."""

from dynacomm_async.server.checkpoint.directory import Checkpoint, Checkpoints
from dynacomm_async.server.checkpoint.saver import Saver
from dynacomm_async.server.checkpoint.state import CheckpointState

__all__ = ["Checkpoint", "CheckpointState", "Checkpoints", "Saver"]
