"""Update rules on flat float32 ranges, and learning-rate schedules.

A rule knows no layers and owns no state: the caller keeps the parameters and ``n_states`` arrays of
the same length beside them, all zero at first, and hands over whichever range is due. Rules are
elementwise and written in NumPy's correctly rounded operations only (add, subtract, multiply,
divide, square root), so cutting a vector into ranges, in any way and any order, never changes a bit
of the result.

Semantics are PyTorch's (``torch.optim.SGD``, ``Adam``, ``AdamW``): weight decay is added to the
gradient, except in AdamW, which shrinks the parameters by themselves. PyTorch starts the momentum
buffer as the first gradient; ``v = momentum * v + g`` from ``v = 0`` gives the same, without a flag
for the first step.

Sources: Nesterov momentum as in Sutskever et al., ICML 2013; Adam, arXiv 1412.6980; AdamW and the
cosine schedule, arXiv 1711.05101 and 1608.03983; linear warm-up, arXiv 1706.02677.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError, ShapeError

__all__ = [
    "SGD",
    "Adam",
    "Constant",
    "Cosine",
    "Schedule",
    "StepDecay",
    "UpdateRule",
    "parse_rule",
    "parse_schedule",
]

Floats: TypeAlias = NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)

_BLOCK = 128 * 1024
"""Floats handled at a time. Three arrays (plain SGD) to six (Adam) of it are 1.5 to 3 MiB, which
stay in a core's caches; smaller blocks cost more for NumPy's calls than they gain in L2."""


class UpdateRule(Protocol):
    """Turns a gradient into new parameters, in place, on any range of the vector."""

    @property
    def n_states(self) -> int:
        """State arrays per parameter: 0 for plain SGD, 1 with momentum, 2 for Adam."""
        ...

    def update(
        self,
        parameters: Floats,
        gradient: Floats,
        states: tuple[Floats, ...],
        *,
        step: int,
        rate: float,
        decay: float,
    ) -> None:
        """Update one range.

        Args:
            parameters: (n,) float32, written in place.
            gradient: (n,) float32, only read; must not overlap with the others.
            states: ``n_states`` arrays, (n,) float32, written in place; zero before step 0.
            step: 0-based index of this update, the same for every range of one step.
            rate: learning rate of this step.
            decay: weight decay of this range.

        Not safe for two threads at once on one rule: it owns a small scratch.

        Raises:
            ShapeError: the arrays do not fit each other or this rule; nothing was written.
        """
        ...


class Schedule(Protocol):
    """The learning rate as a function of the step alone."""

    def rate(self, step: int) -> float:
        """Return the learning rate of the 0-based ``step``."""
        ...


def _new_scratch() -> Floats:
    return np.empty(_BLOCK, np.float32)


def _check_ranges(
    n_states: int, parameters: Floats, gradient: Floats, states: tuple[Floats, ...]
) -> None:
    expected = (parameters.size,)
    if isinstance(states, tuple) and len(states) == n_states:
        for array in (parameters, gradient, *states):
            if array.dtype != _FLOAT32 or array.shape != expected:
                break
        else:
            return
    _explain_ranges(n_states, parameters, gradient, states)


def _explain_ranges(n_states: int, parameters: Floats, gradient: Floats, states: object) -> None:
    if not isinstance(states, tuple) or len(states) != n_states:
        came = len(states) if isinstance(states, tuple) else type(states).__name__
        raise ShapeError(f"this rule keeps a tuple of {n_states} state arrays, not {came}")
    named = {"parameters": parameters, "gradient": gradient}
    named |= {f"state {i}": state for i, state in enumerate(states)}
    for name, array in named.items():
        if array.dtype != np.float32 or array.shape != (parameters.size,):
            raise ShapeError(
                f"{name}: {array.dtype} of shape {array.shape}, "
                f"expected float32 of {(parameters.size,)}"
            )


def _blocks(n: int) -> Iterator[slice]:
    return (slice(begin, min(begin + _BLOCK, n)) for begin in range(0, n, _BLOCK))


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent, with (Nesterov) momentum unless that is 0.

    With d = gradient + decay * p and v = momentum * v + d:
    p -= rate * d (plain), rate * v (momentum), rate * (d + momentum * v) (Nesterov).

    Raises:
        ConfigError: momentum outside [0, 1), or Nesterov without momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False
    _scratch: tuple[Floats, Floats] = field(
        default_factory=lambda: (_new_scratch(), _new_scratch()),
        init=False,
        repr=False,
        compare=False,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}, expected at least 0 and below 1")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("Nesterov's rule needs a momentum above 0")

    def __reduce__(self) -> tuple[type[SGD], tuple[float, bool]]:
        """Copies and pickles have a scratch of their own, which can be written to."""
        return SGD, (self.momentum, self.nesterov)

    @property
    def n_states(self) -> int:
        """1 (the momentum buffer), or 0 without momentum."""
        return 1 if self.momentum else 0

    def update(
        self,
        parameters: Floats,
        gradient: Floats,
        states: tuple[Floats, ...],
        *,
        step: int,
        rate: float,
        decay: float,
    ) -> None:
        """See :meth:`UpdateRule.update`; ``step`` does not matter here."""
        _check_ranges(self.n_states, parameters, gradient, states)
        rate32, decay32 = np.float32(rate), np.float32(decay)
        for part in _blocks(parameters.size):
            p, d = parameters[part], gradient[part]
            decayed, change = (scratch[: p.size] for scratch in self._scratch)
            if decay:
                np.multiply(p, decay32, out=decayed)
                d = np.add(d, decayed, out=decayed)
            if states:
                d = self._add_momentum(states[0][part], d, change)
            np.multiply(d, rate32, out=change)
            np.subtract(p, change, out=p)

    def _add_momentum(self, v: Floats, d: Floats, scratch: Floats) -> Floats:
        momentum = np.float32(self.momentum)
        np.multiply(v, momentum, out=v)
        np.add(v, d, out=v)
        if not self.nesterov:
            return v
        np.multiply(v, momentum, out=scratch)
        return np.add(d, scratch, out=scratch)


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam; with ``decoupled=True`` AdamW.

    With t = step + 1, m += (1 - beta1) * (d - m) and v = beta2 * v + (1 - beta2) * d * d:
    p -= rate / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + epsilon). d is
    gradient + decay * p, or, decoupled, the gradient, after p *= 1 - rate * decay. Unlike in the
    paper (and as in PyTorch), epsilon counts after v's bias correction.

    Raises:
        ConfigError: a beta outside [0, 1), or an epsilon that is not above 0.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    decoupled: bool = False
    _scratch: tuple[Floats, Floats] = field(
        default_factory=lambda: (_new_scratch(), _new_scratch()),
        init=False,
        repr=False,
        compare=False,
    )

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"Adam's {name} is {beta}, expected at least 0 and below 1")
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(f"Adam's epsilon is {self.epsilon}, expected a number above 0")

    def __reduce__(self) -> tuple[type[Adam], tuple[float, float, float, bool]]:
        """Copies and pickles have a scratch of their own, which can be written to."""
        return Adam, (self.beta1, self.beta2, self.epsilon, self.decoupled)

    @property
    def n_states(self) -> int:
        """2: the running mean of the gradient and of its square."""
        return 2

    def update(
        self,
        parameters: Floats,
        gradient: Floats,
        states: tuple[Floats, ...],
        *,
        step: int,
        rate: float,
        decay: float,
    ) -> None:
        """See :meth:`UpdateRule.update`."""
        _check_ranges(2, parameters, gradient, states)
        # Scalars are worked out in double and rounded once, as PyTorch does.
        shrink = np.float32(1 - rate * decay)
        size = np.float32(rate / (1 - self.beta1 ** (step + 1)))
        correction = np.float32(math.sqrt(1 - self.beta2 ** (step + 1)))
        for part in _blocks(parameters.size):
            p, d = parameters[part], gradient[part]
            m, v = states[0][part], states[1][part]
            decayed, scratch = (scratch[: p.size] for scratch in self._scratch)
            if decay and self.decoupled:
                np.multiply(p, shrink, out=p)
            elif decay:
                np.multiply(p, np.float32(decay), out=decayed)
                d = np.add(d, decayed, out=decayed)
            self._move_means(m, v, d, scratch)
            np.sqrt(v, out=scratch)
            np.divide(scratch, correction, out=scratch)
            np.add(scratch, np.float32(self.epsilon), out=scratch)
            np.divide(m, scratch, out=scratch)
            np.multiply(scratch, size, out=scratch)
            np.subtract(p, scratch, out=p)

    def _move_means(self, m: Floats, v: Floats, d: Floats, scratch: Floats) -> None:
        np.subtract(d, m, out=scratch)
        np.multiply(scratch, np.float32(1 - self.beta1), out=scratch)
        np.add(m, scratch, out=m)
        np.multiply(d, d, out=scratch)
        np.multiply(scratch, np.float32(1 - self.beta2), out=scratch)
        np.multiply(v, np.float32(self.beta2), out=v)
        np.add(v, scratch, out=v)


def _check_schedule(base: float, warmup: int) -> None:
    if not 0 <= base < math.inf:
        raise ConfigError(f"the learning rate is {base}, expected a number of at least 0")
    if warmup < 0:
        raise ConfigError(f"the warm-up is {warmup} steps, expected at least 0")


def _ramp(step: int, warmup: int) -> float:
    """Return the warm-up's factor: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return (step + 1) / warmup if step < warmup else 1.0


@dataclass(frozen=True, slots=True)
class Constant:
    """``base`` at every step, after a linear warm-up over ``warmup`` steps."""

    base: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_schedule(self.base, self.warmup)

    def rate(self, step: int) -> float:
        """Return the learning rate of the 0-based ``step``."""
        return self.base * _ramp(step, self.warmup)


@dataclass(frozen=True, slots=True)
class StepDecay:
    """``base``, multiplied by ``factor`` every ``every`` steps, counted from step 0.

    A linear warm-up over ``warmup`` steps multiplies it and does not shift the decay.
    """

    base: float
    every: int
    factor: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_schedule(self.base, self.warmup)
        if self.every < 1:
            raise ConfigError(f"the rate decays every {self.every} steps, expected at least 1")
        if not 0 < self.factor <= 1:
            raise ConfigError(f"the decay factor is {self.factor}, expected above 0 and at most 1")

    def rate(self, step: int) -> float:
        """Return the learning rate of the 0-based ``step``."""
        return float(self.base * self.factor ** (step // self.every)) * _ramp(step, self.warmup)


@dataclass(frozen=True, slots=True)
class Cosine:
    """Half a cosine from ``base`` down to ``floor`` over ``steps`` steps, then ``floor``.

    The first ``warmup`` of the steps rise linearly to ``base``; the cosine spans the rest.
    """

    base: float
    steps: int
    floor: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_schedule(self.base, self.warmup)
        if self.steps <= self.warmup:
            raise ConfigError(
                f"a cosine schedule over {self.steps} steps with {self.warmup} of warm-up: "
                "expected more steps than warm-up"
            )
        if not 0 <= self.floor <= self.base:
            raise ConfigError(
                f"the cosine's floor is {self.floor}, expected between 0 and the rate {self.base}"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of the 0-based ``step``."""
        if step < self.warmup:
            return self.base * _ramp(step, self.warmup)
        progress = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        return self.floor + (self.base - self.floor) * (1 + math.cos(math.pi * progress)) / 2


_RULES: dict[str, tuple[int, Callable[..., UpdateRule]]] = {
    "sgd": (0, SGD),
    "momentum": (1, lambda momentum=0.9: SGD(momentum)),
    "nesterov": (1, lambda momentum=0.9: SGD(momentum, nesterov=True)),
    "adam": (3, Adam),
    "adamw": (3, partial(Adam, decoupled=True)),
}
_RULE_FORMS = "sgd, momentum:0.9, nesterov:0.9, adam:0.9:0.999:1e-8, adamw:0.9:0.999:1e-8"
_SCHEDULES = ("constant", "step", "cosine")
_SCHEDULE_FORMS = "constant, step:EVERY:FACTOR, cosine[:FLOOR], each with ,warmup:STEPS after it"


def parse_rule(text: str) -> UpdateRule:
    """Return the rule that ``text`` names: ``sgd``, ``momentum:0.9``, ``adam:0.9:0.999`` ...

    Numbers left out keep their defaults (momentum 0.9).

    Raises:
        ConfigError: unknown name, too many numbers, or one out of range.
    """
    name, *words = text.strip().split(":")
    if name not in _RULES:
        raise ConfigError(_describe_unknown("update rule", name, tuple(_RULES), _RULE_FORMS))
    most, make = _RULES[name]
    if len(words) > most:
        raise ConfigError(
            f"update rule {text!r}: {name} takes at most {most} numbers; write {_RULE_FORMS}"
        )
    return make(*(_parse_number(word, text) for word in words))


def parse_schedule(text: str, *, base: float, steps: int | None) -> Schedule:
    """Return the schedule that ``text`` names: ``constant``, ``step:100:0.1``, ``cosine`` ...

    ``,warmup:20`` after it adds a linear warm-up. ``steps`` is the length of the whole training;
    only the cosine needs it.

    Raises:
        ConfigError: unknown name, wrong or missing numbers, or a cosine without ``steps``.
    """
    curve, *options = text.strip().split(",")
    name, *words = curve.split(":")
    if name not in _SCHEDULES:
        raise ConfigError(_describe_unknown("schedule", name, _SCHEDULES, _SCHEDULE_FORMS))
    warmup = _parse_warmup(options, text)
    if name == "constant" and not words:
        return Constant(base, warmup=warmup)
    if name == "step" and len(words) == 2:
        every, factor = _parse_count(words[0], text), _parse_number(words[1], text)
        return StepDecay(base, every, factor, warmup=warmup)
    if name == "cosine" and len(words) <= 1:
        if steps is None:
            raise ConfigError("the cosine schedule needs the number of steps of the training")
        floor = _parse_number(words[0], text) if words else 0.0
        return Cosine(base, steps, floor, warmup=warmup)
    raise ConfigError(f"schedule {text!r} has the wrong numbers; write {_SCHEDULE_FORMS}")


def _parse_warmup(options: list[str], text: str) -> int:
    if not options:
        return 0
    name, _, count = options[0].strip().partition(":")
    if name != "warmup" or len(options) > 1:
        raise ConfigError(f"schedule {text!r} has an unknown option; write {_SCHEDULE_FORMS}")
    return _parse_count(count, text)


def _parse_number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(f"{text!r}: {word!r} is not a number") from None


def _parse_count(word: str, text: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ConfigError(f"{text!r}: {word!r} is not a whole number") from None


def _describe_unknown(what: str, name: str, known: tuple[str, ...], forms: str) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {what} {name!r}{hint}; known: {forms}"
