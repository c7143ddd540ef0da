"""Train one shared model on many machines over slow links.

A parameter server and its workers talk plain asyncio TCP; a scheduler cuts each step's parameter
pull and gradient push into segments, so that transfer hides behind layer-wise computation.

Everything public is importable from here; names are loaded on first use, so that importing the
package costs nothing and programs can choose BLAS threads before NumPy is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynacomm_async.errors import (
        ChannelBroken as ChannelBroken,
        ChannelClosed as ChannelClosed,
        ChannelError as ChannelError,
        ConfigError as ConfigError,
        DynaCommError as DynaCommError,
        LocalProtocolError as LocalProtocolError,
        PeerError as PeerError,
        PlanError as PlanError,
        ProtocolError as ProtocolError,
        RemoteProtocolError as RemoteProtocolError,
        ShapeError as ShapeError,
    )
    from dynacomm_async.optim import (
        SGD as SGD,
        Adam as Adam,
        Constant as Constant,
        Cosine as Cosine,
        StepDecay as StepDecay,
    )
    from dynacomm_async.recording import (
        Recorder as Recorder,
        Recording as Recording,
        read_recordings as read_recordings,
        write_recordings as write_recordings,
    )
    from dynacomm_async.schedule import (
        PLANNERS as PLANNERS,
        Costs as Costs,
        LayerCosts as LayerCosts,
        Plan as Plan,
        Segment as Segment,
        evaluate as evaluate,
        lower_bound_ns as lower_bound_ns,
        make_plan as make_plan,
    )
    from dynacomm_async.server import (
        Applied as Applied,
        LayerOptions as LayerOptions,
        Mode as Mode,
        ParameterServer as ParameterServer,
        RunResult as RunResult,
        StepRecord as StepRecord,
        Training as Training,
        parameters_sha256 as parameters_sha256,
    )
    from dynacomm_async.transport import (
        Address as Address,
        LoopThread as LoopThread,
    )
    from dynacomm_async.wire.grid import LayerSpec as LayerSpec
    from dynacomm_async.worker import (
        AsyncSession as AsyncSession,
        AsyncStep as AsyncStep,
        Session as Session,
        Step as Step,
        connect as connect,
    )

__version__ = "0.1.0"

_HOMES = {
    "errors": [
        "ChannelBroken",
        "ChannelClosed",
        "ChannelError",
        "ConfigError",
        "DynaCommError",
        "LocalProtocolError",
        "PeerError",
        "PlanError",
        "ProtocolError",
        "RemoteProtocolError",
        "ShapeError",
    ],
    "optim": ["SGD", "Adam", "Constant", "Cosine", "StepDecay"],
    "recording": ["Recorder", "Recording", "read_recordings", "write_recordings"],
    "schedule": [
        "PLANNERS",
        "Costs",
        "LayerCosts",
        "Plan",
        "Segment",
        "evaluate",
        "lower_bound_ns",
        "make_plan",
    ],
    "server": [
        "Applied",
        "LayerOptions",
        "Mode",
        "ParameterServer",
        "RunResult",
        "StepRecord",
        "Training",
        "parameters_sha256",
    ],
    "transport": ["Address", "LoopThread"],
    "wire.grid": ["LayerSpec"],
    "worker": ["AsyncSession", "AsyncStep", "Session", "Step", "connect"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
