"""Workers: the step as a pure state machine, sessions for embedding, and the training loop."""

from dynacomm_async.worker.aio import AsyncSession, AsyncStep, connect
from dynacomm_async.worker.metrics import Metrics
from dynacomm_async.worker.planning import WARMUP_STEPS, AdaptivePlans, FixedPlan, Plans
from dynacomm_async.worker.reaching import Whereabouts
from dynacomm_async.worker.session import DEFAULT_PORT, DEFAULT_STRATEGY, Session
from dynacomm_async.worker.step import StepMachine
from dynacomm_async.worker.taken import Step
from dynacomm_async.worker.training import TrainedStep, bind_engine, layer_specs, train

__all__ = [
    "DEFAULT_PORT",
    "DEFAULT_STRATEGY",
    "WARMUP_STEPS",
    "AdaptivePlans",
    "AsyncSession",
    "AsyncStep",
    "FixedPlan",
    "Metrics",
    "Plans",
    "Session",
    "Step",
    "StepMachine",
    "TrainedStep",
    "Whereabouts",
    "bind_engine",
    "connect",
    "layer_specs",
    "train",
]
