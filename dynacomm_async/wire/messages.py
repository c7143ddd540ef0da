"""The messages, as values; their headers are the business of :mod:`dynacomm_async.wire.codec`.

A message here is everything but its payload: the payload's bytes go from and to memory that the
caller owns (see :mod:`dynacomm_async.wire.decoder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

from dynacomm_async.ranges import Range
from dynacomm_async.split import Split
from dynacomm_async.wire.frame import MessageKind
from dynacomm_async.wire.grid import LayerSpec

__all__ = [
    "PROTOCOL_VERSION",
    "DownPolicy",
    "End",
    "Error",
    "Gradients",
    "Have",
    "Heartbeat",
    "Hello",
    "Initial",
    "Join",
    "Leave",
    "Membership",
    "Message",
    "Parameters",
    "Report",
    "Resume",
    "Skip",
    "Subscribe",
    "Subscription",
    "Timing",
    "Welcome",
]

PROTOCOL_VERSION = 1

Ranges: TypeAlias = tuple[Range, ...]


class DownPolicy(NamedTuple):
    """How the server makes messages up from the parameters that exist, front layers first.

    The fields are those of :class:`dynacomm_async.schedule.dispatch.Policy`.
    """

    cap_nbytes: int | None
    threshold_nbytes: int
    whole_layers: bool
    one_layer: bool


@dataclass(frozen=True, slots=True)
class Subscription:
    """The down plan for one version: the messages that the worker wants, in order.

    Attributes:
        version: the version of the parameters that is asked for.
        messages: each message is a run of ranges; together they cover every parameter cell once.
            Empty where there is a policy.
        barrier: True: nothing of the version is sent before all of it exists.
        policy: by which messages are made up as cells come to exist; None: ``messages`` holds.
    """

    version: int
    messages: tuple[Ranges, ...] = ()
    barrier: bool = False
    policy: DownPolicy | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of its step beside the gradients.

    Attributes:
        loss: mean loss over the worker's batch, or None.
        images: how many samples the batch had.
    """

    loss: float | None = None
    images: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """What only the server can see of the step before, told to one worker. Nanoseconds.

    Attributes:
        arrivals: one ``(nbytes, elapsed_ns, messages)`` for each gradient message of this worker:
            what the receiver saw of the uplink (``elapsed = messages * overhead + nbytes / rate``).
        wait_ns: from this worker's last gradient cell to the last worker's last one.
        apply_ns: from there until every cell was at its new version.
        last_slot: the worker whose last cell was the last of all, for whom the others waited.
    """

    arrivals: tuple[tuple[int, int, int], ...] = ()
    wait_ns: int = 0
    apply_ns: int = 0
    last_slot: int = 0


class Membership(NamedTuple):
    """The membership of a run that a worker whose connection broke comes back to.

    Attributes:
        slot: its rank.
        term: its number. Older ones are refused: another has the slot by now.
        connection: counts this membership's connections; all but the highest are refused.
        incarnation: the life of the server that the worker has last spoken to.
    """

    slot: int
    term: int
    connection: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a worker. At most 4 KiB, so that strangers cost nothing.

    Attributes:
        protocol: the version that the worker speaks.
        run: id of the run that is meant; None: whichever.
        fingerprint: of the worker's model, where it has one of its own.
        member: what a worker whose connection broke comes back to; None: a newcomer.
    """

    kind: ClassVar[MessageKind] = MessageKind.HELLO
    protocol: int = PROTOCOL_VERSION
    run: str | None = None
    fingerprint: str | None = None
    member: Membership | None = None


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer to a hello that it accepts.

    Attributes:
        protocol: the version that both sides speak from here on.
        run: id of the run.
        slot: the rank that is held for this worker.
        term: number of this membership; grows with each join of the run.
        workers: how many ranks the run has.
        layers: the layer table, or None where the first member brings it.
        version: the version of the parameters that training stands at.
        steps: the last version.
        upload: whether this worker must send the initial parameters.
        settings: whatever the server's owner wants each worker to know.
        incarnation: which life of the server this is; a restart from a checkpoint raises it.
        resumed: whether the worker has its old place again and goes on with :class:`Resume`;
            otherwise it joins.
        silence_ms: how long either end may hear nothing before it gives the connection up; 0: for
            ever.
        split: among whom the data are divided, where members may come and go; None: among all
            ranks, throughout.
    """

    kind: ClassVar[MessageKind] = MessageKind.WELCOME
    protocol: int
    run: str
    slot: int
    term: int
    workers: int
    layers: tuple[LayerSpec, ...] | None
    version: int
    steps: int
    upload: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    incarnation: int = 0
    resumed: bool = False
    silence_ms: int = 0
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """A worker takes its place: its model fits, and it says how it wants its first parameters.

    Attributes:
        fingerprint: of the model that the worker has built.
        subscription: for the version in the welcome.
        kernels: names of numerical choices that all workers must share.
        layers: the layer table, where the welcome had none.
    """

    kind: ClassVar[MessageKind] = MessageKind.JOIN
    fingerprint: str
    subscription: Subscription
    kernels: str = ""
    layers: tuple[LayerSpec, ...] | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """A member is back: which parameters it lacks, and how it wants them.

    Attributes:
        subscription: to the version that it was receiving, or is told to begin again with.
        has: the cells of that version that it has got whole; ascending.
    """

    kind: ClassVar[MessageKind] = MessageKind.RESUME
    subscription: Subscription
    has: Ranges = ()


@dataclass(frozen=True, slots=True)
class Have:
    """What the server has of a member that is back.

    Attributes:
        step: the one that the server stands in.
        has: the cells of the member's gradients of ``step`` that have arrived whole; ascending.
    """

    kind: ClassVar[MessageKind] = MessageKind.HAVE
    step: int
    has: Ranges = ()


@dataclass(frozen=True, slots=True)
class Initial:
    """Version 0 of the given cells, from the first member. Payload: float32."""

    kind: ClassVar[MessageKind] = MessageKind.INITIAL
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Parameters:
    """Cells at ``version``. Payload: float32, range after range.

    They also say that this worker's gradients of the step before have arrived.

    Attributes:
        version: of the cells.
        ranges: the cells.
        timing: what only the server could see of the step before.
        split: among whom the data are divided from the step ``version`` on, where that is news.
    """

    kind: ClassVar[MessageKind] = MessageKind.PARAMETERS
    version: int
    ranges: Ranges
    timing: Timing | None = None
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class Gradients:
    """One worker's gradients (and batch statistics) of ``step``. Payload: float32.

    Attributes:
        step: the version that the gradients were computed from.
        ranges: the cells.
        subscription: for version step + 1, on the first message of a step.
        report: on the first message of a step.
    """

    kind: ClassVar[MessageKind] = MessageKind.GRADIENTS
    step: int
    ranges: Ranges
    subscription: Subscription | None = None
    report: Report | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Asks (``reply`` False) or answers; the number comes back unchanged.

    Attributes:
        number: chosen by whoever asks.
        reply: whether this is the answer.
        clock_ns: the sender's monotonic clock; for offsets, never for ordering.
    """

    kind: ClassVar[MessageKind] = MessageKind.HEARTBEAT
    number: int
    reply: bool
    clock_ns: int


@dataclass(frozen=True, slots=True)
class End:
    """The run is over, in order; the last version has been sent. Payload: the statistics."""

    kind: ClassVar[MessageKind] = MessageKind.END
    version: int


@dataclass(frozen=True, slots=True)
class Error:
    """Why the sender closes the connection; ``code`` is for programs, ``text`` for people.

    A text of more than 800 characters is cut to that when sent, so that every error fits.
    """

    kind: ClassVar[MessageKind] = MessageKind.ERROR
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Leave:
    """The worker goes, in order."""

    kind: ClassVar[MessageKind] = MessageKind.LEAVE


@dataclass(frozen=True, slots=True)
class Skip:
    """This worker's gradients do not count, up to and including those of a step.

    It sends no more of them, and goes on with the step after it.

    Attributes:
        step: the last one.
        code: why, for programs.
        text: why, for people.
    """

    kind: ClassVar[MessageKind] = MessageKind.SKIP
    step: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Subscribe:
    """What a worker says that skips a step: the gradients that would have said it do not come."""

    kind: ClassVar[MessageKind] = MessageKind.SUBSCRIBE
    subscription: Subscription


Message: TypeAlias = (
    Hello
    | Welcome
    | Join
    | Resume
    | Have
    | Initial
    | Parameters
    | Gradients
    | Heartbeat
    | End
    | Error
    | Leave
    | Skip
    | Subscribe
)
