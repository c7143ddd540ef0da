"""What a network would cost on a machine and a link that are known by a few numbers only."""

from __future__ import annotations

from math import isfinite

from dynacomm_async.errors import PlanError
from dynacomm_async.nn import Network
from dynacomm_async.schedule import Costs, LayerCosts

__all__ = ["costs_of"]

_NBYTES = 4  # of a float32


def costs_of(
    network: Network,
    *,
    batch: int,
    flops_per_s: float,
    down_bytes_per_s: float,
    up_bytes_per_s: float | None = None,
    overhead_ns: int,
    latency_ns: int = 0,
    workers: int = 1,
    shared_link: bool = False,
) -> Costs:
    """Return the cost table of a step by arithmetic instead of measurement.

    A layer's forward takes the operations of its convolution or dense layer, for every image of
    the batch, at ``flops_per_s``. Backward is twice that work, for the gradients of its input and
    of its weights; once for the first layer, whose input needs no gradient. Pooling, batch norm
    and the like count as nothing; no layer is more or less efficient than another. Parameters and
    gradients are float32.

    Args:
        network: gives names, sizes and operations of the layers.
        batch: images of one worker in one step.
        flops_per_s: two operations for a multiply-add.
        down_bytes_per_s: rate at which parameters come.
        up_bytes_per_s: rate at which gradients go; None: the same.
        overhead_ns: how long every message occupies its link beside its bytes, either way.
        latency_ns: each way.
        workers: how many train together.
        shared_link: whether they share one link.

    Raises:
        PlanError: a number that cannot be.
    """
    up_bytes_per_s = down_bytes_per_s if up_bytes_per_s is None else up_bytes_per_s
    for what, number in (
        ("flops_per_s", flops_per_s),
        ("down_bytes_per_s", down_bytes_per_s),
        ("up_bytes_per_s", up_bytes_per_s),
    ):
        if not (number > 0 and isfinite(number)):
            raise PlanError(f"{what} is {number}, expected a finite number above 0")
    layers = []
    for index, layer in enumerate(network.layers):
        nbytes = _NBYTES * layer.count
        work = batch * layer.forward_flops * 1e9 / flops_per_s
        layers.append(
            LayerCosts(
                name=layer.name,
                nbytes=nbytes,
                pull_ns=round(nbytes * 1e9 / down_bytes_per_s),
                forward_ns=round(work),
                backward_ns=round(work if index == 0 else 2 * work),
                push_ns=round(nbytes * 1e9 / up_bytes_per_s),
            )
        )
    return Costs(
        tuple(layers),
        overhead_up_ns=overhead_ns,
        overhead_down_ns=overhead_ns,
        latency_up_ns=latency_ns,
        latency_down_ns=latency_ns,
        workers=workers,
        batch=batch,
        shared_link=shared_link,
    )
