"""The parameter server: pure rounds and store, and the asyncio shell around them."""

from dynacomm_async.server.rounds import Rounds
from dynacomm_async.server.server import ParameterServer, RunResult, StepRecord
from dynacomm_async.server.store import LayerOptions, Store, Training, parameters_sha256

__all__ = [
    "LayerOptions",
    "ParameterServer",
    "Rounds",
    "RunResult",
    "StepRecord",
    "Store",
    "Training",
    "parameters_sha256",
]
