"""The parameter server: pure rounds and store, and the asyncio shell around them."""

from dynacomm_async.server.checkpoint import Checkpoint, Checkpoints, CheckpointState, Saver
from dynacomm_async.server.modes import Mode
from dynacomm_async.server.results import Applied
from dynacomm_async.server.rounds import Rounds
from dynacomm_async.server.server import ParameterServer, RunResult, StepRecord
from dynacomm_async.server.store import (
    LayerOptions,
    Store,
    Training,
    is_sound,
    parameters_sha256,
)

__all__ = [
    "Applied",
    "Checkpoint",
    "CheckpointState",
    "Checkpoints",
    "LayerOptions",
    "Mode",
    "ParameterServer",
    "Rounds",
    "RunResult",
    "Saver",
    "StepRecord",
    "Store",
    "Training",
    "is_sound",
    "parameters_sha256",
]
