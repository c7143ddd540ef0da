"""Layer by layer: every layer is a message of its own.

Source: the wait-free backpropagation of Poseidon (Zhang et al., USENIX ATC 2017).
"""

from __future__ import annotations

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import Plan

__all__ = ["plan_layerwise"]


def plan_layerwise(costs: Costs) -> Plan:
    """Return the plan with one segment per layer each way; only their number matters."""
    n_layers = len(costs.layers)
    return Plan.from_cuts("layerwise", n_layers, range(1, n_layers), range(1, n_layers))
