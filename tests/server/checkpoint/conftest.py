"""States to save, and what is in them, byte by byte."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dynacomm_async.server.checkpoint import CheckpointState
from dynacomm_async.wire.grid import LayerSpec

LAYERS = (LayerSpec("conv1", 7, 5, 4), LayerSpec("norm", 2), LayerSpec("dense/ü", 9, 9, 1))


@pytest.fixture
def draw_state() -> Callable[..., CheckpointState]:
    def draw(step: int, layers=LAYERS, n_states: int = 1, **changes) -> CheckpointState:
        rng = np.random.default_rng(step)

        def floats(n: int):
            return rng.standard_normal(n).astype(np.float32)

        n = sum(layer.count for layer in layers)
        values = {
            "run": "run-1",
            "step": step,
            "incarnation": 1,
            "layers": layers,
            "rule": "SGD(momentum=0.9, nesterov=False)",
            "parameters": floats(n),
            "statistics": floats(sum(layer.statistics for layer in layers)),
            "optimizer": tuple(floats(n) for _ in range(n_states)),
            "settings": {"batch": 32, "rate": 0.1, "data": ["digits", None, True]},
            "term": 3,
            "roster": {0: 1, 1: 3},
        }
        return CheckpointState(**{**values, **changes})

    return draw


@pytest.fixture
def content() -> Callable[[CheckpointState], tuple[object, ...]]:
    """Everything in a state, vectors as bytes: equal only if every bit is."""

    def values(state: CheckpointState) -> tuple[object, ...]:
        vectors = [state.parameters, state.statistics, *state.optimizer]
        if state.versions is not None:
            vectors.append(state.versions)
        plain = (state.run, state.step, state.incarnation, state.layers, state.rule)
        return (
            *plain,
            *((vector.dtype.str, vector.shape, vector.tobytes()) for vector in vectors),
            dict(state.settings),
            state.term,
            dict(state.roster),
            state.healthy,
        )

    return values
