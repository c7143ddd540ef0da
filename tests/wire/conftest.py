"""Random messages of every kind, and handlers that collect what comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import strategies as st

from dynacomm_async.ranges import Range
from dynacomm_async.split import Split
from dynacomm_async.wire import (
    Decoder,
    DownPolicy,
    End,
    Error,
    Gradients,
    Have,
    Heartbeat,
    Hello,
    Initial,
    Join,
    LayerSpec,
    Leave,
    Membership,
    Message,
    Parameters,
    Received,
    Report,
    Resume,
    Skip,
    Subscribe,
    Subscription,
    Timing,
    Welcome,
)

numbers = st.integers(0, 2**63) | st.integers(0, 200)
versions = st.integers(0, 2**64 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ranges = st.lists(st.builds(Range, numbers, st.integers(1, 2**40)), min_size=1, max_size=4).map(
    tuple
)
memberships = st.builds(Membership, numbers, numbers, numbers, numbers)
policies = st.builds(
    DownPolicy, st.none() | st.integers(1, 2**40), numbers, st.booleans(), st.booleans()
)
subscriptions = st.builds(
    Subscription, versions, st.lists(ranges, max_size=3).map(tuple), st.booleans()
) | st.builds(Subscription, versions, policy=policies)
layer_specs = st.integers(1, 10**6).flatmap(
    lambda count: st.builds(
        LayerSpec,
        texts.filter(bool),
        st.just(count),
        decay=st.integers(0, count),
        statistics=st.integers(0, 1000),
    )
)
tables = st.none() | st.lists(layer_specs, max_size=3).map(tuple)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
splits = st.sets(numbers, min_size=1, max_size=4).flatmap(
    lambda members: st.builds(
        Split,
        st.integers(len(members), 2**53),
        st.just(tuple(sorted(members))),
        versions,
        numbers,
        numbers,
    )
)
arrivals = st.lists(st.tuples(numbers, numbers, numbers), max_size=3).map(tuple)
losses = st.none() | st.floats(allow_nan=False)

MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, numbers, st.none() | texts, st.none() | texts, st.none() | memberships),
    st.builds(
        Welcome,
        protocol=numbers,
        run=texts,
        slot=numbers,
        term=numbers,
        workers=numbers,
        layers=tables,
        version=versions,
        steps=numbers,
        upload=st.booleans(),
        settings=st.dictionaries(texts, plain, max_size=3),
        incarnation=numbers,
        resumed=st.booleans(),
        silence_ms=numbers,
        split=st.none() | splits,
    ),
    st.builds(Resume, subscriptions, st.just(()) | ranges),
    st.builds(Have, versions, st.just(()) | ranges),
    st.builds(Join, texts, subscriptions, texts, tables),
    st.builds(Initial, ranges),
    st.builds(
        Parameters,
        versions,
        ranges,
        st.none() | st.builds(Timing, arrivals, numbers, numbers, numbers),
        st.none() | splits,
    ),
    st.builds(
        Gradients,
        versions,
        ranges,
        st.none() | subscriptions,
        st.none() | st.builds(Report, losses, numbers),
    ),
    st.builds(Heartbeat, numbers, st.booleans(), numbers),
    st.builds(End, versions),
    st.builds(Error, texts, texts),
    st.builds(Leave),
    st.builds(Skip, versions, texts, texts),
    st.builds(Subscribe, subscriptions),
)


@pytest.fixture(scope="session")
def messages() -> st.SearchStrategy[Message]:
    return MESSAGES


class Destination:
    """Places every payload into fresh memory, cut into the given lengths."""

    def __init__(self, cuts: Sequence[int] = ()) -> None:
        self.cuts = cuts
        self.payloads: list[bytearray] = []

    def place(self, message: Message, payload_nbytes: int) -> list[memoryview]:
        memory = bytearray(payload_nbytes)
        self.payloads.append(memory)
        views, rest = [], memoryview(memory)
        for cut in self.cuts:
            views.append(rest[:cut])
            rest = rest[cut:]
        return [*views, rest]


Feed = Callable[..., list[Received]]


def feed(
    decoder: Decoder, stream: bytes, pieces: Sequence[int] = (), now_ns: int = 0
) -> list[Received]:
    """Give a stream to a decoder, in pieces of the given sizes and then what is left."""
    received, rest, sizes = [], memoryview(stream), iter(pieces)
    while len(rest):
        piece = rest[: next(sizes, len(rest))]
        rest = rest[len(piece) :]
        while len(piece):
            buffer = decoder.get_buffer()
            assert len(buffer), "an empty buffer kills the connection"
            n = min(len(buffer), len(piece))
            buffer[:n] = piece[:n]
            piece = piece[n:]
            decoder.buffer_updated(n, now_ns)
            while (message := decoder.next_message()) is not None:
                received.append(message)
    return received


@pytest.fixture(scope="session")
def destination() -> type[Destination]:
    return Destination


@pytest.fixture(scope="session")
def feed_decoder() -> Feed:
    return feed
