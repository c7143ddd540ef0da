"""Measured durations -> a cost table.

Everything here is handed numbers and reads no clock. Durations on a real machine have a hard
floor and a long tail (a page fault, a scheduler's pause, a lost packet), so nothing is averaged:
a layer's time is the median of its last steps, a link's overhead and rate come from a robust fit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf, log
from statistics import median
from typing import NamedTuple

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.costs import Costs, LayerCosts
from dynacomm_async.schedule.duplex import Duplex
from dynacomm_async.schedule.linkfit import LinkFit, Observation, Prior, fit_link

__all__ = ["Estimator", "LayerTimes", "LinkEstimator"]

_STEPS = 15
"""Steps that a median looks back on: 7 bad ones do no harm, a lasting change shows after 8."""

_MESSAGES = 64
"""Observations that a fit looks back on: a few steps of most plans, and enough to average jitter
down to a few percent of itself."""

_KEPT = 16
"""Observations of each kind that it looks back on however old: a plan of one message a step would
else wash out what is known of overheads, and be dropped for it. Too few to outvote the others
where the rate has changed since."""

_LEAST_NBYTES = 4096
"""Fewer bytes than this, timed inside one message, arrive with one read: they tell no rate."""

_STALE_SHARE = 8
"""A fit is repeated when the window has gained an eighth: less would hardly move it."""

_STALE_NS = 250_000_000
"""But of a full window not before so much link time has been seen since: a fit takes a millisecond,
and a plan of small messages would spend more on it than on sending them."""

_SETTLED, _SETTLED_ERROR = 32, 0.05
"""A fit of so many observations may begin from one that was so exact instead of from nothing."""

_SUDDEN, _GRADUAL = 5, 12
"""Observations that make a large change of rate, and a small one. One of them, which the change
may have cut in two, may differ."""

_LEAST_SUDDEN, _LEAST_GRADUAL = 0.08, 0.04
_NOISE_PER_SUDDEN, _NOISE_PER_GRADUAL = 2.5, 1.0
"""A rate has changed if it is off by so much, and by so many of the observations' own errors."""

_MOST_NOISE = 0.25
"""An observation that is less exact than this, relative to its transfer, tells no rate."""

_ALIKE = 0.15
"""Signs of one new rate differ by no more than this, or twice their noise; outliers do."""

_KEPT_ERROR, _KEPT_ERROR_NS = 0.05, 50_000.0
"""How exact an overhead is at most taken to remain when the rate has changed."""

_BETTER = 2.0
"""An overhead that is known within an error gives way to what observations tell about as exactly,
within so many times that. Messages of one size, as most plans send, tell it by the few that differ
and by what comes in bursts: badly, and with confidence."""

_DOUBTED_ERROR = 0.5
"""The same where it may have changed too. To forget it would leave a plan of one message a step,
which can tell none, without any."""


class LayerTimes:
    """The compute times of a model's layers: for each the median of the last 15 steps.

    Of an even number of steps it is the lower middle one, for errors are mostly too long.
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._forward: deque[tuple[int, ...]] = deque(maxlen=_STEPS)
        self._backward: deque[tuple[int, ...]] = deque(maxlen=_STEPS)

    @property
    def known(self) -> bool:
        """Whether a step has been observed."""
        return bool(self._forward)

    @property
    def forward_ns(self) -> tuple[int, ...]:
        """Each layer's forward time, in forward order; empty while not known."""
        return tuple(_median(times) for times in zip(*self._forward, strict=True))

    @property
    def backward_ns(self) -> tuple[int, ...]:
        """Each layer's backward time, in forward order; empty while not known."""
        return tuple(_median(times) for times in zip(*self._backward, strict=True))

    def observe(self, forward_ns: Sequence[int], backward_ns: Sequence[int]) -> None:
        """Add one step's times, both in forward order; the numbers are copied.

        Raises:
            PlanError: not one time of at least 0 per layer; nothing is added.
        """
        for phase, times in (("forward", forward_ns), ("backward", backward_ns)):
            if len(times) != self._n_layers or min(times, default=0) < 0:
                raise PlanError(
                    f"{len(times)} {phase} times, the least {min(times, default=None)}, "
                    f"expected {self._n_layers} of at least 0 ns"
                )
        self._forward.append(tuple(forward_ns))
        self._backward.append(tuple(backward_ns))


class LinkEstimator:
    """One direction of a link: the overhead of a message and the time of a byte.

    Times are taken by the receiver. A message that came back to back with the one before it counts
    from the end of that one and so tells its overhead; of any other only the bytes after its first
    piece can be timed.

    A window of observations follows a rate that drifts. One that jumps is noticed from five
    observations that are off in the same direction and agree on the new rate: then all older ones
    are forgotten, but for the overhead, which is kept as it was estimated until new
    observations tell it better.
    """

    def __init__(self) -> None:
        self._count = 0
        # By kind, 0 or 1 overhead in the time; each with its number among all observations.
        self._kinds = tuple(deque[tuple[int, Observation]](maxlen=_MESSAGES) for _ in range(2))
        self._prior: Prior | None = None
        self._fit = fit_link(())
        self._n_fresh = 0  # observations since the fit
        self._fresh_ns = 0  # their times
        self._signs: deque[_Sign] = deque(maxlen=_GRADUAL)
        self._change: _Change | None = None  # that has just been found
        self._changes = 0

    @property
    def known(self) -> bool:
        """Whether the observations tell the rate, and how far they can be trusted to."""
        return self._result().known

    @property
    def overhead_ns(self) -> int:
        """Time a message occupies the link beside its bytes; 0 while not known."""
        return self._result().overhead_ns

    @property
    def ns_per_byte(self) -> float:
        """Time a byte occupies the link; while not known a guess, 0 with nothing observed."""
        return self._result().ns_per_byte

    def expect_ns(self, nbytes: int, messages: int = 1) -> int:
        """Return how long the link is busy with so many bytes and overheads; a guess likewise."""
        fit = self._result()
        return messages * fit.overhead_ns + round(nbytes * fit.ns_per_byte)

    @property
    def rate_error(self) -> float:
        """Standard error of the rate as a share of it; infinite while nothing tells it."""
        return self._result().rate_error

    @property
    def n_observed(self) -> int:
        """How many observations there have been."""
        return self._count

    @property
    def changes(self) -> int:
        """How many jumps of the rate have been noticed."""
        return self._changes

    def observe(self, nbytes: int, elapsed_ns: int, messages: int) -> None:
        """Add one observation; the last 64 count, and always 16 with and 16 without an overhead.

        Args:
            nbytes: bytes that arrived in the time; with ``messages`` 0 without the first piece.
            elapsed_ns: with ``messages`` 1 from the end of the message before to the end of this
                one, with 0 from the arrival of the first piece to the end.
            messages: how many overheads are in the time, 0 or 1.

        Raises:
            PlanError: negative numbers, or ``messages`` neither 0 nor 1; nothing is added.
        """
        if nbytes < 0 or elapsed_ns < 0 or messages not in (0, 1):
            raise PlanError(
                f"{nbytes} bytes in {elapsed_ns} ns with {messages} overheads, "
                "expected no negative number and 0 or 1 overhead"
            )
        if messages or nbytes >= _LEAST_NBYTES:
            observation = Observation(messages, nbytes, elapsed_ns)
            self._look_for_change(observation)
            self._kinds[messages].append((self._count, observation))
            self._count += 1
            self._n_fresh += 1
            self._fresh_ns += elapsed_ns
            if self._change is not None:
                self._start_over(self._change)

    def _look_for_change(self, observation: Observation) -> None:
        # Judged by an older fit, but for when nobody has asked for one since half the window.
        if self._n_fresh > self._n_window // 2 and self._is_due:
            self._refit()
        sign = _read_sign(self._count, observation, self._fit) if self._fit.known else None
        if sign is not None:
            self._signs.append(sign)
            self._change = _find_change(list(self._signs))

    def _start_over(self, change: _Change) -> None:
        """Forget all that came before the change, and messages that do not fit it."""
        self._changes += 1
        self._signs.clear()
        self._change = None
        self._prior = self._keep_overhead(_KEPT_ERROR if change.of_rate else _DOUBTED_ERROR)
        first, unlike = change.first, change.unlike
        for kind in self._kinds:
            kept = [entry for entry in kind if entry[0] >= first and entry[0] not in unlike]
            kind.clear()
            kind.extend(kept)
        self._fit = fit_link(())
        self._refit()

    def _keep_overhead(self, least_error: float) -> Prior | None:
        fit = self._fit
        if fit.overhead_error_ns == inf:
            return self._prior
        least_ns = max(least_error * fit.overhead_ns, _KEPT_ERROR_NS)
        return Prior(fit.overhead_ns, max(fit.overhead_error_ns, least_ns))

    def _result(self) -> LinkFit:
        is_stale = self._n_fresh and self._n_fresh * _STALE_SHARE >= self._n_window
        if is_stale and self._is_due:
            self._refit()
        return self._fit

    @property
    def _is_due(self) -> bool:
        """Whether there is time for a fit, or the window is not full."""
        return self._fresh_ns >= _STALE_NS or self._n_window < _MESSAGES

    @property
    def _n_window(self) -> int:
        return min(sum(map(len, self._kinds)), _MESSAGES)

    def _refit(self) -> None:
        window = self._list_window()
        settled = (
            len(window) >= _SETTLED
            and self._fit.rate_error <= _SETTLED_ERROR
            and not (self._signs and self._signs[-1].is_far)
        )
        start = self._fit if settled else None
        self._n_fresh = self._fresh_ns = 0
        alone, prior = fit_link(window, start=start), self._prior
        told_ns = self._tells_overhead_to(alone)
        if prior is not None and told_ns > _BETTER * prior.error_ns:
            self._fit = fit_link(window, prior, start)
            return
        self._fit = alone
        if told_ns < inf and len(window) >= _SETTLED:
            self._prior = Prior(
                alone.overhead_ns, told_ns if prior is None else min(told_ns, prior.error_ns)
            )

    @staticmethod
    def _tells_overhead_to(fit: LinkFit) -> float:
        """Return the error within which a fit tells the overhead; infinite where it tells none."""
        if not fit.known:
            return inf
        return max(fit.overhead_error_ns, _KEPT_ERROR * fit.overhead_ns, _KEPT_ERROR_NS)

    def _list_window(self) -> list[Observation]:
        oldest = self._count - _MESSAGES
        return [
            observation
            for kind in self._kinds
            for age, (number, observation) in enumerate(reversed(kind))
            if number >= oldest or age < _KEPT
        ]


class _Sign(NamedTuple):
    """What one observation says of the rate.

    Attributes:
        number: of the observation.
        change: logarithm of its time of a byte over the estimated one: above 0 is slower.
        noise: the expected error of that.
    """

    number: int
    change: float
    noise: float

    @property
    def is_far(self) -> bool:
        """Whether the rate is likely another."""
        return abs(self.change) >= max(_LEAST_SUDDEN, _NOISE_PER_SUDDEN * self.noise)


def _read_sign(number: int, observation: Observation, fit: LinkFit) -> _Sign | None:
    """Return what an observation says of the rate; None: too little."""
    messages, nbytes, elapsed_ns = observation
    overhead_ns = messages * fit.overhead_ns
    expected_ns = nbytes * fit.ns_per_byte
    measured_ns = max(elapsed_ns - overhead_ns, fit.jitter_ns)
    # If the rate is another, the noise is that of the shorter time or less certain.
    least_ns = min(expected_ns, measured_ns)
    noise_ns = fit.error_ns(messages, overhead_ns + least_ns)
    if noise_ns > _MOST_NOISE * least_ns:
        return None
    return _Sign(number, log(measured_ns / expected_ns), noise_ns / least_ns)


class _Change(NamedTuple):
    """A change of the link.

    Attributes:
        first: number of the first observation after it.
        unlike: those after it that do not fit the others.
        of_rate: whether it is the rate that has changed; else it may be the overhead, or both.
    """

    first: int
    unlike: frozenset[int]
    of_rate: bool


def _find_change(signs: Sequence[_Sign]) -> _Change | None:
    """Return the change that the newest signs tell of.

    Five in a row, or six of seven, that are far off on one side and agree, or twelve, of which all
    but one are off by a little on one side and agree. Where twelve are far off and do not agree on
    a rate it is the overhead that has changed, or both.
    """
    for recent, least in ((signs[-_SUDDEN:], _SUDDEN), (signs[-_SUDDEN - 2 :], _SUDDEN + 1)):
        far = [sign for sign in _list_side(recent) if sign.is_far]
        alike = _list_alike(far) if len(far) >= least else []
        if alike:
            return _describe_change(recent, alike)
    side = _list_side(signs)
    if len(side) == _GRADUAL and all(sign.is_far for sign in side):
        return _Change(signs[0].number, frozenset(), of_rate=False)
    if len(signs) == _GRADUAL and len(side) >= _GRADUAL - 1:
        change = median(abs(sign.change) for sign in side)
        noise = median(sign.noise for sign in side)
        alike = _list_alike(side)
        if alike and change >= max(_LEAST_GRADUAL, _NOISE_PER_GRADUAL * noise):
            return _describe_change(signs, alike)
    return None


def _describe_change(signs: Sequence[_Sign], alike: Sequence[_Sign]) -> _Change:
    first = alike[0].number
    unlike = {sign.number for sign in signs} - {sign.number for sign in alike}
    return _Change(first, frozenset(unlike), of_rate=True)


def _list_side(signs: Sequence[_Sign]) -> list[_Sign]:
    """Return the signs on the side, slower or faster, on which there are more."""
    slower = [sign for sign in signs if sign.change > 0]
    if 2 * len(slower) >= len(signs):
        return slower
    return [sign for sign in signs if sign.change <= 0]


def _list_alike(signs: Sequence[_Sign]) -> list[_Sign]:
    """Return the signs that agree with each other; none if more than one does not."""
    middle = median(sign.change for sign in signs)
    alike = [sign for sign in signs if abs(sign.change - middle) <= max(_ALIKE, 2 * sign.noise)]
    return alike if len(alike) >= len(signs) - 1 else []


class Estimator:
    """All that a worker measures, joined to a cost table.

    It belongs to one thread and locks nothing. In a session that is the event loop's: another
    thread asks by submitting a coroutine there.

    Args:
        layers: name and size in bytes of every layer, in forward order.

    Attributes:
        times: the layers' compute times.
        up: the uplink, observed by the server.
        down: the downlink.
        duplex: whether the two have room at once.
    """

    def __init__(self, layers: Sequence[tuple[str, int]]) -> None:
        self._layers = tuple(layers)
        self._latencies_ns: deque[tuple[int, int]] = deque(maxlen=_STEPS)
        self._server_ns: deque[int] = deque(maxlen=_STEPS)
        self.times = LayerTimes(len(self._layers))
        self.up = LinkEstimator()
        self.down = LinkEstimator()
        self.duplex = Duplex()

    def observe_pull(
        self, nbytes: int, elapsed_ns: int, messages: int, *, shared_ns: int = 0
    ) -> None:
        """Add what one message of parameters took; see :meth:`LinkEstimator.observe`.

        What came while the uplink was busy tells of the downlink's rate only if the two do not
        take turns. Whether they do is found out anew when that rate has changed: what came before
        that was noticed was late for no fault of the uplink.

        Args:
            shared_ns: for how long of ``elapsed_ns`` the uplink was busy.
        """
        changes = self.down.changes
        if shared_ns and self.down.known:
            self.duplex.observe(self.down.expect_ns(nbytes, messages), elapsed_ns, shared_ns)
        if not shared_ns or self.duplex.half is False:
            self.down.observe(nbytes, elapsed_ns, messages)
        if self.down.changes != changes:
            self.duplex.start_over()

    def observe_pushes(
        self, arrivals: Iterable[tuple[int, int, int]], *, crossing: bool = False
    ) -> None:
        """Add what a step's messages of gradients took, as the server saw it; the step is over.

        Args:
            arrivals: ``(nbytes, elapsed_ns, messages)`` of each.
            crossing: whether parameters may have come down meanwhile; then they tell nothing of the
                uplink's rate if the directions take turns. Where that cannot be told they count:
                a downlink so fast that nothing is ever shared must not hide a slow uplink.
        """
        self.duplex.end_step(crossing=crossing)
        if crossing and self.duplex.half is True:
            return
        for nbytes, elapsed_ns, messages in arrivals:
            self.up.observe(nbytes, elapsed_ns, min(messages, 1))

    def observe_latency(self, up_ns: int, down_ns: int) -> None:
        """Add one measurement of both latencies; the median of the last 15 counts."""
        _check_duration(up_ns, "the latency up")
        _check_duration(down_ns, "the latency down")
        self._latencies_ns.append((up_ns, down_ns))

    def observe_server(self, server_ns: int) -> None:
        """Add one measurement of the server's time; the median of the last 15 counts."""
        _check_duration(server_ns, "the server's time")
        self._server_ns.append(server_ns)

    @property
    def known(self) -> bool:
        """Whether both directions of the link and the layers' times are known."""
        return self.times.known and self.up.known and self.down.known

    def costs(
        self, *, workers: int = 1, batch: int | None = None, guess: bool = False
    ) -> Costs | None:
        """Return the cost table, or None while a link or the layers' times are not known.

        With ``guess`` the layers' times are enough: the link is taken for what little there is to
        tell it by, as is right for a link too fast to be measured.

        Latencies and the server's time count as 0 until they have been observed. The table never
        says that the link is shared: what a worker measures on a shared link is its share of it.

        Raises:
            PlanError: layers, ``workers`` or ``batch`` that no cost table can have.
        """
        if not (self.times.known if guess else self.known):
            return None
        up, down = self.up.ns_per_byte, self.down.ns_per_byte
        times = zip(self._layers, self.times.forward_ns, self.times.backward_ns, strict=True)
        return Costs(
            layers=tuple(
                LayerCosts(
                    name=name,
                    nbytes=nbytes,
                    pull_ns=round(nbytes * down),
                    forward_ns=forward_ns,
                    backward_ns=backward_ns,
                    push_ns=round(nbytes * up),
                )
                for (name, nbytes), forward_ns, backward_ns in times
            ),
            overhead_up_ns=self.up.overhead_ns,
            overhead_down_ns=self.down.overhead_ns,
            latency_up_ns=_median([up_ns for up_ns, _ in self._latencies_ns]),
            latency_down_ns=_median([down_ns for _, down_ns in self._latencies_ns]),
            server_ns=_median(self._server_ns),
            workers=workers,
            batch=batch,
            half_duplex=self.duplex.half is True,
        )


def _median(times: Sequence[int]) -> int:
    """Return the lower median; 0 of nothing."""
    return sorted(times)[(len(times) - 1) // 2] if times else 0


def _check_duration(value_ns: int, what: str) -> None:
    if value_ns < 0:
        raise PlanError(f"{what} is {value_ns} ns, expected at least 0")
