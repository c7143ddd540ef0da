"""A robust fit of ``elapsed = messages * overhead + nbytes / rate``.

Theory of operation. Message sizes span four orders of magnitude, and so do the errors: jitter adds
the same to all, a wandering rate adds a share of the time. Each observation is therefore judged by
its own expected error, taken from the fit's residuals: the short half tells the jitter, the long
half the share. Starting from the least absolute relative error, which a few times three too long do
not move, the fit is repeated with Tukey's biweight (Beaton, Tukey, Technometrics 16(2), 1974,
doi 10.1080/00401706.1974.10489171), which gives no weight to what lies far outside its error.

The same errors tell how well the rate is known. Observations that cannot tell overhead from
rate, such as back-to-back messages of one size, make that error infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isclose, sqrt
from typing import NamedTuple

__all__ = ["LinkFit", "Observation", "fit_link"]

_LEAST_COUNT = 3
_JITTER_NS = 20_000.0  # no event loop tells the time of an arrival better than this
_SIGMA_PER_MEDIAN = 1.4826  # of a normal distribution
_CUTOFF = 4.685  # 95 % efficient on normal errors
_ABSOLUTE_ROUNDS = 3
_BIWEIGHT_ROUNDS = 6
_CLOSE = 1e-3  # a round that changes less is the last
_CLOSE_NS = 1e3

_SINGULAR = 1e-12  # a determinant that is rounding errors

_RELATIVE_ERROR = 0.2
_LEAST_ERROR_NS_PER_BYTE = 0.1  # 0.1 ms in a megabyte: of no importance to any plan


class Observation(NamedTuple):
    """What a receiver timed: ``messages`` overheads (0 or 1) and ``nbytes`` in ``elapsed_ns``."""

    messages: int
    nbytes: int
    elapsed_ns: int


class LinkFit(NamedTuple):
    """The result: overhead (0 unless known), time of a byte, whether the rate can be relied on."""

    overhead_ns: int
    ns_per_byte: float
    known: bool


class _Solution(NamedTuple):
    overhead: float
    slope: float
    slope_error: float  # in units of the weights' errors


def fit_link(observations: Sequence[Observation]) -> LinkFit:
    """Return the robust fit of the observations, with neither overhead nor rate below 0. O(n)."""
    if not observations:
        return LinkFit(0, 0.0, False)
    solution = _fit_absolute(observations)
    for _ in range(_BIWEIGHT_ROUNDS):
        before = solution
        solution = _solve(observations, _weigh_biweight(observations, before))
        if isclose(solution.overhead, before.overhead, rel_tol=_CLOSE, abs_tol=_CLOSE_NS) and (
            isclose(solution.slope, before.slope, rel_tol=_CLOSE)
        ):
            break
    error = max(_RELATIVE_ERROR * solution.slope, _LEAST_ERROR_NS_PER_BYTE)
    known = len(observations) >= _LEAST_COUNT and solution.slope_error <= error
    return LinkFit(round(solution.overhead) if known else 0, solution.slope, known)


def _fit_absolute(observations: Sequence[Observation]) -> _Solution:
    """Return about the least sum of absolute errors, each relative to its observation."""
    scales = [elapsed + _JITTER_NS for _, _, elapsed in observations]
    solution = _solve(observations, [1 / (scale * scale) for scale in scales])
    for _ in range(_ABSOLUTE_ROUNDS):
        errors = _list_errors(observations, solution)
        solution = _solve(
            observations,
            [
                1 / (scale * max(abs(error), 0.01 * scale))
                for scale, error in zip(scales, errors, strict=True)
            ],
        )
    return solution


def _weigh_biweight(observations: Sequence[Observation], solution: _Solution) -> list[float]:
    errors = _list_errors(observations, solution)
    times = [
        max(elapsed - error, 1.0)
        for (_, _, elapsed), error in zip(observations, errors, strict=True)
    ]
    jitter, share = _estimate_noise(times, errors)
    weights = []
    for time, error in zip(times, errors, strict=True):
        sigma = max(jitter, share * time)
        distance = error / (_CUTOFF * sigma)
        inside = max(0.0, 1 - distance * distance)
        weights.append((inside / sigma) ** 2)
    return weights


def _estimate_noise(times: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Return the expected error of a short time, in ns, and of a long one, as a share of it."""
    pairs = sorted(zip(times, map(abs, errors), strict=True))
    half = (len(pairs) + 1) // 2
    short = sorted(error for _, error in pairs[:half])
    long = sorted(error / time for time, error in pairs[-half:])
    jitter = max(_JITTER_NS, _SIGMA_PER_MEDIAN * short[half // 2])
    return jitter, _SIGMA_PER_MEDIAN * long[half // 2]


def _list_errors(observations: Sequence[Observation], solution: _Solution) -> list[float]:
    overhead, slope, _ = solution
    return [
        elapsed - messages * overhead - nbytes * slope for messages, nbytes, elapsed in observations
    ]


def _solve(observations: Sequence[Observation], weights: Sequence[float]) -> _Solution:
    """Return the weighted least squares, neither unknown below 0."""
    mm = mb = bb = my = by = 0.0
    for (messages, nbytes, elapsed), weight in zip(observations, weights, strict=True):
        weighted = weight * nbytes
        bb += weighted * nbytes
        by += weighted * elapsed
        if messages:
            mm += weight
            mb += weighted
            my += weight * elapsed
    if not bb:
        return _Solution(0.0, 0.0, inf)
    if not mm:
        return _Solution(0.0, by / bb, 1 / sqrt(bb))
    determinant = mm * bb - mb * mb
    if determinant <= _SINGULAR * mm * bb:
        return _Solution(0.0, by / bb, inf)
    overhead = (bb * my - mb * by) / determinant
    slope = (mm * by - mb * my) / determinant
    slope_error = sqrt(mm / determinant)
    if overhead < 0:
        return _Solution(0.0, by / bb, slope_error)
    if slope < 0:
        return _Solution(my / mm, 0.0, slope_error)
    return _Solution(overhead, slope, slope_error)
