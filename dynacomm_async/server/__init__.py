"""The parameter server: pure rounds and store, and the asyncio shell around them."""

from dynacomm_async.server.checkpoint import Checkpoint, Checkpoints, CheckpointState, Saver
from dynacomm_async.server.modes import Mode, check_mode
from dynacomm_async.server.results import Applied
from dynacomm_async.server.rounds import Rounds
from dynacomm_async.server.server import ParameterServer, RunResult, StepRecord
from dynacomm_async.server.store import (
    DEFAULT_MAX_GRADIENT,
    LayerOptions,
    Store,
    Training,
    is_sound,
    parameters_sha256,
)

__all__ = [
    "DEFAULT_MAX_GRADIENT",
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
    "check_mode",
    "is_sound",
    "parameters_sha256",
]
