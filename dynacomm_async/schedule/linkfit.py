"""A robust fit of ``elapsed = messages * overhead + nbytes / rate``.

Theory of operation. Message sizes span four orders of magnitude, and so do the errors: jitter adds
the same to all, a wandering rate adds a share of the time. Each observation is therefore judged by
its own expected error, taken from the fit's residuals: the short half tells the jitter, the long
half the share that comes on top. Starting from the least absolute relative error, which a few
times three too long do not move, the fit is repeated with Tukey's biweight (Beaton, Tukey,
Technometrics 16(2), 1974, doi 10.1080/00401706.1974.10489171), which gives no weight to what lies
far outside its error.

The same errors tell how well rate and overhead are known. Observations that cannot tell one from
the other, such as back-to-back messages of one size, make that error infinite, unless a prior says
what the overhead was when the rate was another.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, inf, isclose, sqrt
from typing import NamedTuple

__all__ = ["LinkFit", "Observation", "Prior", "fit_link"]

_LEAST_COUNT = 3
_JITTER_NS = 20_000.0  # no event loop tells the time of an arrival better than this
_BURST_NS = 100_000.0  # nor that of a first piece, which may have waited for the loop to wake up
_BURST_NBYTES = 16 * 1024  # behind which so much may come faster than the link: shapers and bridges
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


class Prior(NamedTuple):
    """What is known of the overhead from elsewhere, and its standard error (above 0)."""

    overhead_ns: float
    error_ns: float


class LinkFit(NamedTuple):
    """The result of a fit.

    Attributes:
        overhead_ns: of a message; 0 unless known.
        ns_per_byte: time of a byte; a guess unless known.
        known: whether the rate can be relied on.
        overhead_error_ns: standard error of the overhead; infinite where nothing tells it.
        rate_error: standard error of the rate, as a share of it; infinite likewise.
        jitter_ns: expected error of the time of a short message.
        share: what a time adds to its expected error, as a share of it.
    """

    overhead_ns: int
    ns_per_byte: float
    known: bool
    overhead_error_ns: float = inf
    rate_error: float = inf
    jitter_ns: float = _JITTER_NS
    share: float = 0.0

    def error_ns(self, messages: int, time_ns: float) -> float:
        """Return the expected error of a time that was observed with 0 or 1 overheads in it."""
        error_ns = self.jitter_ns + self.share * time_ns
        return error_ns if messages else hypot(error_ns, _BURST_NS)


_NOTHING = LinkFit(0, 0.0, False)


class _Solution(NamedTuple):
    overhead: float
    slope: float
    overhead_error: float  # in units of the weights' errors, like the next
    slope_error: float


def fit_link(
    observations: Sequence[Observation],
    prior: Prior | None = None,
    start: LinkFit | None = None,
) -> LinkFit:
    """Return the robust fit of the observations, with neither overhead nor rate below 0. O(n).

    Args:
        observations: in any order.
        prior: counts like one more observation, of an overhead alone.
        start: a fit of nearly the same observations, to begin from; saves two thirds of the time.
    """
    if not observations:
        return _NOTHING
    if start is None:
        solution = _fit_absolute(observations, prior)
    else:
        solution = _Solution(start.overhead_ns, start.ns_per_byte, inf, inf)
    noise = _JITTER_NS, 0.0
    for _ in range(_BIWEIGHT_ROUNDS):
        before = solution
        errors = _list_errors(observations, before)
        noise = _estimate_noise(observations, errors)
        weights = _weigh_biweight(observations, errors, *noise, before.slope)
        solution = _solve(observations, weights, prior)
        if isclose(solution.overhead, before.overhead, rel_tol=_CLOSE, abs_tol=_CLOSE_NS) and (
            isclose(solution.slope, before.slope, rel_tol=_CLOSE)
        ):
            break
    error = max(_RELATIVE_ERROR * solution.slope, _LEAST_ERROR_NS_PER_BYTE)
    known = len(observations) >= _LEAST_COUNT and solution.slope_error <= error
    return LinkFit(
        round(solution.overhead) if known else 0,
        solution.slope,
        known,
        solution.overhead_error,
        solution.slope_error / solution.slope if solution.slope else inf,
        *noise,
    )


def _fit_absolute(observations: Sequence[Observation], prior: Prior | None) -> _Solution:
    """Return about the least sum of absolute errors, each relative to its observation."""
    scales = [
        elapsed + (_JITTER_NS if messages else _BURST_NS) for messages, _, elapsed in observations
    ]
    solution = _solve(observations, [1 / (scale * scale) for scale in scales], prior)
    for _ in range(_ABSOLUTE_ROUNDS):
        errors = _list_errors(observations, solution)
        solution = _solve(
            observations,
            [
                1 / (scale * max(abs(error), 0.01 * scale))
                for scale, error in zip(scales, errors, strict=True)
            ],
            prior,
        )
    return solution


def _weigh_biweight(
    observations: Sequence[Observation],
    errors: Sequence[float],
    jitter: float,
    share: float,
    slope: float,
) -> list[float]:
    weights = []
    for (messages, _, elapsed), error in zip(observations, errors, strict=True):
        sigma = jitter + max(0.0, share * (elapsed - error))
        if not messages:
            sigma = hypot(sigma, _BURST_NS, _BURST_NBYTES * slope)
        distance = error / (_CUTOFF * sigma)
        inside = 1 - distance * distance
        weights.append((inside / sigma) ** 2 if inside > 0 else 0.0)
    return weights


def _estimate_noise(
    observations: Sequence[Observation], errors: Sequence[float]
) -> tuple[float, float]:
    """Return the expected error of any time, in ns, and what a long one adds, as a share of it."""
    pairs = sorted(
        (max(elapsed - error, 1.0), abs(error))
        for (_, _, elapsed), error in zip(observations, errors, strict=True)
    )
    half = (len(pairs) + 1) // 2
    short_ns, short_error = _find_middle(pairs[:half])
    long_ns, long_error = _find_middle(pairs[-half:])
    if long_ns < 2 * short_ns:  # times so alike cannot tell: half of each
        return max(_JITTER_NS, long_error / 2), long_error / 2 / long_ns
    share = max(0.0, long_error - max(short_error, _JITTER_NS)) / (long_ns - short_ns)
    return max(_JITTER_NS, short_error - share * short_ns), share


def _find_middle(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the median time and the standard error that the median error tells."""
    half = len(pairs) // 2
    return pairs[half][0], _SIGMA_PER_MEDIAN * sorted([error for _, error in pairs])[half]


def _list_errors(observations: Sequence[Observation], solution: _Solution) -> list[float]:
    overhead, slope = solution.overhead, solution.slope
    return [
        elapsed - messages * overhead - nbytes * slope for messages, nbytes, elapsed in observations
    ]


def _solve(
    observations: Sequence[Observation], weights: Sequence[float], prior: Prior | None
) -> _Solution:
    """Return the weighted least squares, neither unknown below 0."""
    mm = mb = bb = my = by = 0.0
    if prior is not None:
        mm = 1 / (prior.error_ns * prior.error_ns)
        my = mm * prior.overhead_ns
    for (messages, nbytes, elapsed), weight in zip(observations, weights, strict=True):
        weighted = weight * nbytes
        bb += weighted * nbytes
        by += weighted * elapsed
        if messages:
            mm += weight
            mb += weighted
            my += weight * elapsed
    if not bb:
        return _Solution(0.0, 0.0, inf, inf)
    if not mm:
        return _Solution(0.0, by / bb, inf, 1 / sqrt(bb))
    determinant = mm * bb - mb * mb
    if determinant <= _SINGULAR * mm * bb:
        return _Solution(0.0, by / bb, inf, inf)
    overhead = (bb * my - mb * by) / determinant
    slope = (mm * by - mb * my) / determinant
    overhead_error, slope_error = sqrt(bb / determinant), sqrt(mm / determinant)
    if overhead < 0:
        return _Solution(0.0, by / bb, overhead_error, slope_error)
    if slope < 0:
        return _Solution(my / mm, 0.0, overhead_error, slope_error)
    return _Solution(overhead, slope, overhead_error, slope_error)
