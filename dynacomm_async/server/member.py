"""One connection to the server, from hello to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic_ns
from typing import NamedTuple, Protocol

from dynacomm_async.errors import DynaCommError, PlanError, RemoteProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.schedule.dispatch import (
    Dispatcher,
    OrderedDispatcher,
    Policy,
    PriorityDispatcher,
)
from dynacomm_async.schedule.layout import Layout
from dynacomm_async.split import Split
from dynacomm_async.transport.channel import Channel
from dynacomm_async.transport.pulse import Pulse
from dynacomm_async.wire.decoder import Arrival, Received
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import (
    End,
    Error,
    Gradients,
    Have,
    Heartbeat,
    Hello,
    Initial,
    Join,
    Leave,
    Message,
    Parameters,
    Resume,
    Skip,
    Subscribe,
    Subscription,
    Timing,
    Welcome,
)

__all__ = ["Comeback", "Member", "Refusal", "Run"]

_GOODBYE_S = 1.0
"""How long a peer may take to hear why the connection ends."""

_END_S = 120.0
"""How long a peer may take to receive what is in socket buffers and leave: slow links need time."""


class Comeback(NamedTuple):
    """What a member that is back is told.

    Attributes:
        grid: the cells of the model.
        have: what has arrived of its gradients.
        skip: what has been decided without it; None: nothing.
        ending: what to say once it has got the rest; None: training goes on.
    """

    grid: Grid
    have: Have
    skip: Skip | None = None
    ending: End | None = None


class Run(Protocol):
    """What a member needs of the run that it belongs to."""

    def greet(self, member: Member, hello: Hello) -> Welcome:
        """Hold a rank for a stranger; raises :class:`Refusal`."""
        ...

    def join(self, member: Member, join: Join) -> Grid:
        """Make sure that a greeted stranger fits; raises :class:`Refusal`."""
        ...

    def joined(self, member: Member) -> None:
        """A member has taken its place, and its subscription is known; raises :class:`Refusal`."""
        ...

    def resume(self, member: Member, resume: Resume) -> Comeback:
        """Take a member back; raises RemoteProtocolError."""
        ...

    def counts(self, member: Member, gradients: Gradients) -> bool:
        """Whether gradients are not to be dropped; raises RemoteProtocolError."""
        ...

    def ready(self, member: Member, version: int) -> Sequence[Range]:
        """Return the parameter cells that may go out to a member as those of a version."""
        ...

    def split_of(self, version: int) -> Split | None:
        """Return among whom the data of a step are divided, where that may change."""
        ...

    def place(self, member: Member, message: Initial | Gradients) -> Sequence[memoryview]:
        """Return where a payload goes; raises RemoteProtocolError."""
        ...

    def initial_arrived(self, member: Member, initial: Initial) -> None:
        """Cells of version 0 are in place."""
        ...

    def gradients_arrived(self, member: Member, gradients: Gradients, now_ns: int) -> None:
        """A contribution is in place."""
        ...

    def bytes_of(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the parameters' bytes, to be sent."""
        ...

    def statistics_bytes(self) -> memoryview:
        """Return the running statistics' bytes, to be sent."""
        ...

    def departed(self, member: Member, error: DynaCommError) -> None:
        """The connection is over."""
        ...


class Refusal(DynaCommError):
    """Why a peer may not go on; it is told so, and the connection ends."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Member:
    """The server's end of one connection: a channel handler and its downlink.

    Args:
        run: what it belongs to.
        channel: how it is reached.
        hello_deadline_s: how long a stranger may take to say hello.
        join_deadline_s: how long it may take after its welcome to build its model and load its
            data.

    Attributes:
        slot: its rank, or None before the welcome.
        joined: whether it has taken its place.
        resumed: whether it was here before, over another connection.
        said_leave: whether it has left in order.
        said_end: whether everything has been sent to it, up to the end of the run.
        subscribed: the version of its latest subscription.
        sent: the highest version of which anything was sent to it.
    """

    def __init__(
        self,
        run: Run,
        channel: Channel,
        hello_deadline_s: float = 10.0,
        join_deadline_s: float = 120.0,
    ) -> None:
        self._run = run
        self.channel = channel
        self._join_deadline_s = join_deadline_s
        self.slot: int | None = None
        self.joined = False
        self.subscribed = -1
        self.sent = -1
        self.resumed = False
        self.said_leave = False
        self.said_end = False
        self._grid: Grid | None = None
        self._greeting: Welcome | None = None  # still to be sent, like the next one
        self._welcomed = 0  # the version that it was told to begin with
        self._have: Have | None = None
        self._skip: Skip | None = None
        self._split: Split | None = None  # as it was told
        self._waits = True  # for training to begin with it: its subscription is to no version yet
        self._answer: Heartbeat | None = None
        self._pulse: Pulse | None = None
        self._silence_ms = 0
        self._sending = False
        self._dispatcher: Dispatcher | None = None
        self._timing: Timing | None = None
        self._arrivals: list[tuple[int, int, int]] = []
        self._last_arrival_ns = 0
        self._ending: End | Error | None = None
        self._wake = asyncio.Event()
        self._over = asyncio.get_running_loop().create_future()
        self._downlink = asyncio.create_task(self._send_all(), name="downlink")
        self._downlink.add_done_callback(self._downlink_ended)
        self._deadline: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(
            hello_deadline_s, self._expire, "hello"
        )

    # -- what the run tells it --

    @property
    def has_barrier(self) -> bool:
        """Whether nothing of the version that it subscribes to goes out before all of it exists."""
        dispatcher = self._dispatcher
        return isinstance(dispatcher, OrderedDispatcher) and dispatcher.barrier

    def begin(self, version: int) -> None:
        """Training begins with this member: its subscription is to this version."""
        self._waits = False
        self.subscribed = version
        self.make_ready()

    def cells_ready(self, cells: Range, version: int) -> None:
        """Let cells that have reached ``version`` go out, as the subscription has it."""
        if self._dispatcher is not None and self.subscribed == version and not self._waits:
            self._dispatcher.ready(cells.first, cells.count)
            self._wake.set()

    def make_ready(self) -> None:
        """Let everything go out that exists of what it subscribes to, and may."""
        if not self._waits:
            for cells in self._run.ready(self, self.subscribed):
                self.cells_ready(cells, self.subscribed)

    def skip(self, skip: Skip) -> None:
        """Tell it that it computes in vain; from here on it gets what comes after."""
        self._skip = skip
        if self.subscribed <= skip.step:
            self._dispatcher = None  # until it has subscribed anew
        self._wake.set()

    def set_timing(self, wait_ns: int, apply_ns: int, last_slot: int) -> None:
        """Take note of what only the server saw; the next parameters carry it."""
        self._timing = Timing(tuple(self._arrivals), wait_ns, apply_ns, last_slot)
        self._arrivals.clear()

    def finish(self, ending: End | Error) -> None:
        """Say ``ending`` once everything that was asked for has gone out, then close.

        An error overtakes what has not begun to be sent.
        """
        if self._ending is None:
            self._ending = ending
            self._wake.set()

    async def wait_closed(self, limit_s: float) -> None:
        """Return when the connection is over and its task has ended; drop it after the limit."""
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.shield(self._over)
        except TimeoutError:
            self.channel.abort()
            await self._over
        await asyncio.gather(self._downlink, return_exceptions=True)

    # -- the channel's handler --

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        """Say where a payload goes."""
        if isinstance(message, Gradients | Initial):
            if not self.joined:
                raise RemoteProtocolError(f"{message.kind.name} from a stranger")
            if isinstance(message, Gradients) and self._run.counts(self, message):
                self._check_subscription(message)
            return self._run.place(self, message)
        return ()

    def handle(self, received: Received) -> None:
        """Take a complete message."""
        message = received.message
        if self._pulse is not None:
            self._pulse.heard()
        try:
            if isinstance(message, Gradients):
                self._take_gradients(message, received.arrival)
            elif isinstance(message, Heartbeat):
                if not message.reply:
                    # Only the newest question is answered: nobody can make us keep a queue.
                    self._answer = Heartbeat(message.number, True, monotonic_ns())
                    self._wake.set()
            elif isinstance(message, Hello):
                self._greeting = self._run.greet(self, message)
                self._welcomed = self._greeting.version
                self._split = self._greeting.split
                self._silence_ms = self._greeting.silence_ms
                self.resumed = self._greeting.resumed
                self._wake.set()
                self._disarm()
                loop = asyncio.get_running_loop()
                self._deadline = loop.call_later(self._join_deadline_s, self._expire, "join")
            elif isinstance(message, Join):
                self._check_join(message)
                self._grid = self._run.join(self, message)
                self._take_place(message.subscription)
                self._run.joined(self)
            elif isinstance(message, Resume):
                self._take_up(message, self._run.resume(self, message))
            elif isinstance(message, Subscribe):
                if message.subscription.version > self.subscribed:
                    self.subscribe(message.subscription)
            elif isinstance(message, Initial):
                self._run.initial_arrived(self, message)
            elif isinstance(message, Leave):
                self.said_leave = True
                self.channel.abort()
        except Refusal as refusal:
            self.channel.turn_deaf()  # what is on its way already is no fault of the peer's
            self.finish(Error(refusal.code, str(refusal)))

    def lost(self, error: DynaCommError) -> None:
        """The channel is over."""
        self._disarm()
        if self._pulse is not None:
            self._pulse.stop()
        self._downlink.cancel()
        if not self._over.done():
            self._over.set_result(None)
        self._run.departed(self, error)

    # -- the rest --

    def _check_join(self, join: Join) -> None:
        if join.subscription.version != self._welcomed:
            raise RemoteProtocolError(
                f"it joins with a subscription to version {join.subscription.version}, expected "
                f"version {self._welcomed}, as in its welcome"
            )

    def _take_place(self, subscription: Subscription, has: Sequence[Range] = ()) -> None:
        self.joined = True
        self._disarm()
        self.subscribe(subscription, has)
        self._pulse = Pulse(self.channel, self._silence_ms / 1000, self._beat)

    def _take_up(self, resume: Resume, comeback: Comeback) -> None:
        self._grid = comeback.grid
        self._have = comeback.have
        if resume.has:
            self.sent = resume.subscription.version
        self._waits = False
        self._take_place(resume.subscription, resume.has)
        if comeback.skip is not None:
            self.skip(comeback.skip)
        self._ending = self._ending or comeback.ending
        self._wake.set()

    def _beat(self) -> None:
        """Nothing has been sent for a while: say that this end is there."""
        if not self._sending and self._answer is None:
            self._answer = Heartbeat(0, True, monotonic_ns())
            self._wake.set()

    def subscribe(self, subscription: Subscription, has: Sequence[Range] = ()) -> None:
        """Plan what goes down for a version, without the cells that the worker has.

        Raises:
            RemoteProtocolError: the plan does not cover every parameter cell once.
        """
        assert self._grid is not None
        try:
            self._dispatcher = _downlink(subscription, self._grid, has)
        except PlanError as error:
            raise RemoteProtocolError(f"subscription: {error}") from None
        self.channel.limit_ahead(
            None if subscription.policy is None else subscription.policy.cap_nbytes
        )
        self.subscribed = subscription.version
        self.make_ready()

    def _check_subscription(self, gradients: Gradients) -> None:
        """The first message of a step, and only that, subscribes to the next version."""
        subscription = gradients.subscription
        if subscription is None:
            if self.subscribed != gradients.step + 1:
                raise RemoteProtocolError(
                    f"the first gradients of step {gradients.step} carry no subscription"
                )
        elif subscription.version != gradients.step + 1 or self.subscribed > gradients.step:
            raise RemoteProtocolError(
                f"gradients of step {gradients.step} subscribe to version {subscription.version}"
            )

    def _take_gradients(self, gradients: Gradients, arrival: Arrival) -> None:
        subscription = gradients.subscription
        if subscription is not None and subscription.version > self.subscribed:
            self.subscribe(subscription)
        observation = arrival.observation(self._last_arrival_ns)
        if observation is not None:
            self._arrivals.append(observation)
        self._last_arrival_ns = arrival.last_ns
        self._run.gradients_arrived(self, gradients, arrival.last_ns)

    def _expire(self, awaited: str) -> None:
        self.finish(Error(f"{awaited}-timeout", f"no {awaited} came in time"))

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def _send_all(self) -> None:
        """The downlink: choose the next message only when the one before has nearly left."""
        busy = False
        try:
            while True:
                message, payload = self._next()
                if message is None:
                    busy = False
                    await self._wake.wait()
                    self._wake.clear()
                    continue
                self._sending = True
                await self.channel.send(message, payload, back_to_back=busy)
                self._sending = False
                if self._pulse is not None:
                    self._pulse.sent()
                busy = True
                if isinstance(message, End | Error):
                    self.said_end = isinstance(message, End)
                    break
            await self._say_goodbye(_END_S if isinstance(message, End) else _GOODBYE_S)
        except DynaCommError:
            # Mostly it is over already, and its handler was told why. Otherwise it is a message
            # of ours that cannot be sent: then nothing more would come.
            self.channel.abort()

    def _downlink_ended(self, task: asyncio.Task[None]) -> None:
        """Without a downlink everybody would wait: better no connection, and a word to the log."""
        if not task.cancelled() and (error := task.exception()) is not None:
            context = {"message": f"the downlink to {self.channel.peer} failed", "exception": error}
            task.get_loop().call_exception_handler(context)
            self.channel.abort()

    def _next(self) -> tuple[Message | None, Sequence[memoryview]]:
        if isinstance(self._ending, Error):
            return self._ending, ()
        if self._greeting is not None:
            greeting, self._greeting = self._greeting, None
            return greeting, ()
        if self._have is not None:
            have, self._have = self._have, None
            return have, ()
        if self._skip is not None:
            skip, self._skip = self._skip, None
            return skip, ()
        if self._answer is not None:
            answer, self._answer = self._answer, None
            return answer, ()
        dispatcher = self._dispatcher
        if dispatcher is not None:
            ranges = dispatcher.next()
            if ranges is not None:
                return self._bind(tuple(ranges)), self._run.bytes_of(ranges)
            if not dispatcher.done:
                return None, ()
        if self._ending is not None and self.subscribed >= self._ending.version:
            return self._ending, (self._run.statistics_bytes(),)
        return None, ()

    def _bind(self, ranges: tuple[Range, ...]) -> Parameters:
        self.sent = self.subscribed
        timing, self._timing = self._timing, None
        split = self._run.split_of(self.subscribed)
        if split == self._split:
            return Parameters(self.subscribed, ranges, timing)
        self._split = split
        return Parameters(self.subscribed, ranges, timing, split)

    async def _say_goodbye(self, limit_s: float) -> None:
        """Leave the other side the time to read the last message before the connection ends."""
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.shield(self._over)
        except TimeoutError:
            self.channel.abort()


def _downlink(subscription: Subscription, grid: Grid, has: Sequence[Range]) -> Dispatcher:
    """Return the rule that a worker has asked for, without what it has already.

    Raises:
        PlanError: it is none, or does not cover every parameter cell once.
    """
    n_cells = grid.n_parameter_cells
    if any(first + count > n_cells for first, count in has):
        raise PlanError(f"the worker has cells that the model has not: {n_cells} hold parameters")
    if subscription.policy is not None:
        layout = Layout(4 * layer.count for layer in grid.layers)
        return PriorityDispatcher(Policy(*subscription.policy), layout, has)
    dispatcher = OrderedDispatcher(
        subscription.messages, n_cells=n_cells, barrier=subscription.barrier, skip=has
    )
    covered = sum(cells.count for message in subscription.messages for cells in message)
    if covered != n_cells:
        raise PlanError(f"it covers {covered} cells, expected {n_cells}")
    return dispatcher
