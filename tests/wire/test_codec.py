"""Messages as values: exact round trips, and one documented error for everything else."""

from __future__ import annotations

import random
import time
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.wire import (
    MAX_FLOATS,
    MAX_HEADER_NBYTES,
    MAX_ITEMS,
    PREFIX_NBYTES,
    Error,
    Gradients,
    Message,
    MessageKind,
    Prefix,
    Subscription,
    decode,
    encode,
)


def decode_bytes(kind: MessageKind, header: bytes, step: int = 0) -> Message:
    return decode(Prefix(kind, 0, len(header), 0, step), header)


def decode_header(kind: MessageKind, header: object) -> Message:
    return decode_bytes(kind, msgpack.packb(header))


@settings(max_examples=400)
@given(st.data(), st.integers(0, 2**64 - 1))
def test_decoding_is_the_inverse_of_encoding(
    messages: st.SearchStrategy[Message], data: st.DataObject, payload_nbytes: int
) -> None:
    message = data.draw(messages)
    encoded = encode(message, payload_nbytes, flags=1)
    prefix = Prefix.unpack(encoded)
    assert prefix.kind is message.kind
    assert (prefix.flags, prefix.payload_nbytes) == (1, payload_nbytes)
    assert prefix.header_nbytes == len(encoded) - PREFIX_NBYTES
    assert decode(prefix, memoryview(encoded)[PREFIX_NBYTES:]) == message


WELCOME = {
    "protocol": 1,
    "run": "r",
    "slot": 0,
    "term": 1,
    "workers": 2,
    "layers": [["a", 4, 4, 0]],
    "steps": 9,
    "upload": False,
    "settings": {},
    "incarnation": 3,
    "resumed": False,
    "silence_ms": 15000,
    "split": [9, [0, 2], 5, 1, 3],
}
JOIN = {"fingerprint": "f", "subscribe": [0, True, [[[0, 1]]]], "kernels": "", "layers": None}
VALID: dict[MessageKind, dict[str, Any]] = {
    MessageKind.HELLO: {"protocol": 1, "run": None, "fingerprint": None, "member": [0, 1, 2, 3]},
    MessageKind.WELCOME: WELCOME,
    MessageKind.JOIN: JOIN,
    MessageKind.INITIAL: {"ranges": [[0, 1]]},
    MessageKind.PARAMETERS: {
        "ranges": [[0, 1]],
        "timing": [[[1, 2, 3]], 4, 5, 6],
        "split": [9, [1], 0, 0, 0],
    },
    MessageKind.GRADIENTS: {"ranges": [[0, 1]], "subscribe": None, "report": [1.5, 3]},
    MessageKind.HEARTBEAT: {"number": 1, "reply": True, "clock_ns": 5},
    MessageKind.END: {},
    MessageKind.ERROR: {"code": "c", "text": "t"},
    MessageKind.LEAVE: {},
    MessageKind.RESUME: {"subscribe": [3, True, [[[0, 1]]]], "has": [[1, 2]]},
    MessageKind.HAVE: {"has": []},
    MessageKind.SKIP: {"code": "c", "text": "t"},
    MessageKind.SUBSCRIBE: {"subscribe": [3, True, [[[0, 1]]]]},
}
NOT_COUNTS = [None, -1, 1.0, "1", True, [], {}, b"1"]
NOT_TEXTS = [None, 1, b"text", [], {}, False]
NOT_OPTIONAL_TEXTS = [1, b"text", [], {}, False]
NOT_TRUTHS = [None, 0, 1, "true", []]
NOT_RANGES = [
    None, [], 7, "", {}, [[0]], [[0, 1, 2]], [[0, 0]], [[-1, 1]], [[0, -1]], [[0.0, 1]],
    [[0, True]],
    [[False, 1]], [["0", 1]], [{}], [7], [[0, 1], None], [[0, None]], [[[0, 1]]],
]  # fmt: skip
NOT_SUBSCRIPTIONS = [
    7, "", {}, [], [0], [-1, [None, 0, True, True]], [0, True, [], 1], [-1, True, []],
    [True, True, []], [0, 1, []], [0, None, []], [0.0, True, []], [0, True, None], [0, True, {}],
]  # fmt: skip
NOT_POLICIES = [
    True, [], [None, 0, True], [None, 0, True, True, 1], [0, 0, True, True], [1.0, 0, True, True],
    [None, -1, True, True], [None, None, True, True], [None, 0, 1, True], [None, 0, True, None],
    [True, 0, True, True],
]  # fmt: skip
NOT_SPLITS = [
    7, "", {}, [], [9, [0], 0, 0], [9, [0], 0, 0, 0, 0], [9, 0, 0, 0, 0], [9, [0], 0, 0, -1],
    [9, [0], 0, 0, None], [9.0, [0], 0, 0, 0], [9, [None], 0, 0, 0], [9, [-1], 0, 0, 0],
    [9, [], 0, 0, 0], [9, [1, 0], 0, 0, 0], [9, [0, 0], 0, 0, 0], [1, [0, 1], 0, 0, 0],
]  # fmt: skip
NOT_LAYERS = [7, "a", {}]
NOT_LAYER_ROWS = [
    ["a", 1, 1], ["a", 1, 1, 0, 0], [b"a", 1, 1, 0], [1, 1, 1, 0], ["a", "1", 1, 0],
    ["a", 1, 1.0, 0],
    ["a", 1, 1, None], ["a", True, 1, 0], ["a", 0, 0, 0], ["a", 1, 2, 0], ["a", -1, 0, 0],
    ["", 1, 1, 0], 7, None, "a",
]  # fmt: skip
NOT_TIMINGS = [None, 7, [], [[], 0, 0], [[], 0, 0, 0, 0], [{}, 0, 0, 0], [None, 0, 0, 0]]
NOT_TIMES = [[[], -1, 0, 0], [[], 0, 1.0, 0], [[], 0, 0, None]]

WRONG_FIELDS: list[tuple[MessageKind, str, list[Any], str]] = [
    (MessageKind.HELLO, "protocol", NOT_COUNTS, "protocol is"),
    (MessageKind.HELLO, "run", NOT_OPTIONAL_TEXTS, "run is"),
    (MessageKind.HELLO, "fingerprint", NOT_OPTIONAL_TEXTS, "fingerprint is"),
    (MessageKind.HELLO, "member", [7, [], [0, 1, 2], [0, 1, 2, -1], [0, 1, 2, None]], "member is"),
    *[
        (MessageKind.WELCOME, name, NOT_COUNTS, f"{name} is")
        for name in ("protocol", "slot", "term", "workers", "steps")
    ],
    (MessageKind.WELCOME, "incarnation", NOT_COUNTS, "incarnation is"),
    (MessageKind.WELCOME, "silence_ms", NOT_COUNTS, "silence_ms is"),
    (MessageKind.WELCOME, "resumed", NOT_TRUTHS, "resumed is"),
    (MessageKind.WELCOME, "run", NOT_TEXTS, "run is"),
    (MessageKind.WELCOME, "upload", NOT_TRUTHS, "upload is"),
    (MessageKind.WELCOME, "settings", [None, 1, [], "a"], "settings is"),
    (MessageKind.WELCOME, "layers", NOT_LAYERS, "layers is"),
    (MessageKind.WELCOME, "layers", [[row] for row in NOT_LAYER_ROWS], "layer"),
    (MessageKind.JOIN, "layers", NOT_LAYERS, "layers is"),
    (MessageKind.JOIN, "layers", [[row] for row in NOT_LAYER_ROWS], "layer"),
    (MessageKind.JOIN, "layers", [[["a", MAX_FLOATS, 0, 1]], [["a", 2**63, 0, 0]]], "layers hold"),
    (MessageKind.JOIN, "fingerprint", NOT_TEXTS, "fingerprint is"),
    (MessageKind.JOIN, "kernels", NOT_TEXTS, "kernels is"),
    (MessageKind.JOIN, "subscribe", [None, *NOT_SUBSCRIPTIONS], "subscribe is"),
    (MessageKind.JOIN, "subscribe", [[0, True, [rows]] for rows in NOT_RANGES], "range"),
    (MessageKind.JOIN, "subscribe", [[0, policy] for policy in NOT_POLICIES], "policy is"),
    (MessageKind.RESUME, "subscribe", [None, *NOT_SUBSCRIPTIONS], "subscribe is"),
    (MessageKind.RESUME, "has", [rows for rows in NOT_RANGES if rows != []], "range"),
    (MessageKind.HAVE, "has", [rows for rows in NOT_RANGES if rows != []], "range"),
    (MessageKind.INITIAL, "ranges", NOT_RANGES, "range"),
    (MessageKind.PARAMETERS, "ranges", NOT_RANGES, "range"),
    (MessageKind.PARAMETERS, "timing", NOT_TIMINGS, "timing is"),
    (MessageKind.PARAMETERS, "timing", NOT_TIMES, "timing is"),
    (MessageKind.PARAMETERS, "timing", [[[[1, 2]], 0, 0, 0], [[7], 0, 0, 0]], "arrivals is"),
    (MessageKind.GRADIENTS, "ranges", NOT_RANGES, "range"),
    (MessageKind.GRADIENTS, "subscribe", NOT_SUBSCRIPTIONS, "subscribe is"),
    (MessageKind.GRADIENTS, "report", [None, 7, [], [1.0], [1.0, 2, 3], {}], "report is"),
    (MessageKind.GRADIENTS, "report", [["1", 2], [True, 2], [1, 2], [[], 2]], "loss is"),
    (MessageKind.GRADIENTS, "report", [[1.0, n] for n in NOT_COUNTS], "images is"),
    (MessageKind.HEARTBEAT, "number", NOT_COUNTS, "number is"),
    (MessageKind.HEARTBEAT, "reply", NOT_TRUTHS, "reply is"),
    (MessageKind.HEARTBEAT, "clock_ns", NOT_COUNTS, "clock_ns is"),
    (MessageKind.ERROR, "code", NOT_TEXTS, "code is"),
    (MessageKind.ERROR, "text", NOT_TEXTS, "text is"),
    (MessageKind.SKIP, "code", NOT_TEXTS, "code is"),
    (MessageKind.SKIP, "text", NOT_TEXTS, "text is"),
    (MessageKind.SUBSCRIBE, "subscribe", [None, *NOT_SUBSCRIPTIONS], "subscribe is"),
    (MessageKind.WELCOME, "split", NOT_SPLITS, "(split|members)"),
    (MessageKind.PARAMETERS, "split", NOT_SPLITS, "(split|members)"),
]


@pytest.mark.parametrize("kind", MessageKind)
def test_the_headers_that_the_malformed_ones_are_made_from_are_good(kind: MessageKind) -> None:
    assert decode_header(kind, VALID[kind]).kind is kind


@pytest.mark.parametrize(("kind", "name", "values", "complaint"), WRONG_FIELDS)
def test_a_malformed_field_is_refused_by_name(
    kind: MessageKind, name: str, values: list[Any], complaint: str
) -> None:
    for value in values:
        with pytest.raises(RemoteProtocolError, match=rf"^{kind.name}: .*{complaint}"):
            decode_header(kind, VALID[kind] | {name: value})


MISNAMED = {"has": "ranges"}
OPTIONAL = {"run", "fingerprint", "member", "layers", "timing", "report", "subscribe", "split"}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in VALID for name in VALID[kind]])
def test_a_missing_field_is_refused_by_name_unless_it_is_optional(
    kind: MessageKind, name: str
) -> None:
    header = {key: value for key, value in VALID[kind].items() if key != name}
    optional = {
        MessageKind.WELCOME: {"layers", "split"},
        MessageKind.JOIN: {"layers"},
        MessageKind.RESUME: set(),
        MessageKind.SUBSCRIBE: set(),
    }.get(kind, OPTIONAL)
    if name in optional:
        assert decode_header(kind, header).kind is kind
    else:
        with pytest.raises(
            RemoteProtocolError, match=rf"^{kind.name}: {MISNAMED.get(name, name)} is None"
        ):
            decode_header(kind, header)


@pytest.mark.parametrize("kind", MessageKind)
def test_unknown_keys_are_ignored_so_that_headers_can_grow(kind: MessageKind) -> None:
    grown = VALID[kind] | {"later": [1, {"deep": b"bytes"}]}
    assert decode_header(kind, grown) == decode_header(kind, VALID[kind])


NESTED = 1 << 20
BOMBS = {
    "empty": b"",
    "no map": b"\x90",
    "nothing": b"\xc0",
    "a reserved byte": b"\xc1",
    "cut off": msgpack.packb(WELCOME)[:-1],
    "bytes too many": msgpack.packb(WELCOME) + b"\x00",
    "deep lists": b"\x91" * NESTED,
    "deep lists that end": b"\x91" * 900 + b"\xc0",
    "deep maps": b"\x81\xa1a" * (NESTED // 3),
    "deep lists in a field": b"\x81\xa6ranges" + b"\x91" * 1020 + b"\xc0",
    "a list that claims four billion items": b"\x81\xa6ranges\xdd\xff\xff\xff\xff",
    "a map that claims four billion items": b"\xdf\xff\xff\xff\xff",
    "a text that claims four gigabytes": b"\x81\xa3run\xdb\xff\xff\xff\xff",
    "bytes that claim four gigabytes": b"\x81\xa3run\xc6\xff\xff\xff\xff",
    "an extension that claims four gigabytes": b"\x81\xa3run\xc9\xff\xff\xff\xff\x05",
    "lists in lists that all claim to be long": b"\xdc\xff\xff" * 1000 + bytes(NESTED - 3000),
    "a longer list than any": b"\x81\xa6ranges\xdd\x00\x01\x00\x01" + b"\xc0" * (MAX_ITEMS + 1),
    "a longer map than any": b"\xdf\x00\x01\x00\x01" + b"\xa0\xc0" * (MAX_ITEMS + 1),
    "a long list of empty maps": b"\x81\xa6ranges\xdd\x00\x01\x00\x00" + b"\x80" * MAX_ITEMS,
    "a list as a key": b"\x81\x90\x01",
    "a truth as a key": b"\x81\xc3\x01",
    "a time as a key": b"\x81\xd6\xff\x00\x00\x00\x01\x01",
    "a time with a wrong length": b"\x81\xa3run\xc7\x03\xff123",
    "a time that cannot be": b"\x81\xa3run\xd7\xff" + b"\xff" * 8,
    "a text that is no text": b"\x81\xa3run\xa1\xff",
    "a key that is no text": b"\x81\xa1\xff\x01",
    "an extension as a value": b"\x81\xa3run\xd4\x05\x00",
    "a time as a value": b"\x81\xa8protocol\xd6\xff\x00\x00\x00\x01",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_msgpack_bomb_costs_little_and_raises_the_one_documented_error(name: str) -> None:
    header = BOMBS[name]
    tracemalloc.start()
    started = time.process_time()
    try:
        for kind in (MessageKind.WELCOME, MessageKind.JOIN, MessageKind.PARAMETERS):
            with pytest.raises(RemoteProtocolError, match=f"^{kind.name}: "):
                decode_bytes(kind, header)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 128 * len(header) + (1 << 20)
    assert time.process_time() - started < 5.0  # a twentieth of it on an idle machine


def test_a_complaint_about_a_huge_value_stays_short() -> None:
    for value in ["x" * 500_000, list(range(50_000)), {str(i): i for i in range(50_000)}, 2**63]:
        with pytest.raises(RemoteProtocolError) as caught:
            decode_header(MessageKind.INITIAL, {"ranges": value})
        assert len(str(caught.value)) < 200


def test_an_extension_in_the_settings_is_the_owners_affair() -> None:
    header = WELCOME | {"settings": {"when": msgpack.ExtType(5, b"x")}}
    message = decode_header(MessageKind.WELCOME, header)
    assert message.settings == {"when": msgpack.ExtType(5, b"x")}  # type: ignore[union-attr]


def test_every_error_fits_into_what_the_other_side_reads() -> None:
    text = "\N{MATHEMATICAL BOLD CAPITAL A}" * 5000
    encoded = encode(Error("server-failed", text))
    assert len(encoded) - PREFIX_NBYTES <= MAX_HEADER_NBYTES[MessageKind.ERROR]
    decoded = decode(Prefix.unpack(encoded), encoded[PREFIX_NBYTES:])
    assert decoded == Error("server-failed", text[:797] + "...")


def test_an_error_whose_text_cannot_be_encoded_is_sent_all_the_same() -> None:
    encoded = encode(Error("server-failed", "bad \ud800 text"))
    assert decode(Prefix.unpack(encoded), encoded[24:]) == Error("server-failed", "bad ? text")


def test_a_plan_of_ten_thousand_segments_fits_into_a_header() -> None:
    plan = tuple((Range(100 * i, 100),) for i in range(10_000))
    message = Gradients(3, (Range(0, 1),), Subscription(4, plan))
    encoded = encode(message)
    assert len(encoded) - PREFIX_NBYTES <= MAX_HEADER_NBYTES[MessageKind.GRADIENTS]
    assert decode(Prefix.unpack(encoded), encoded[24:]) == message


@pytest.mark.parametrize("seed", range(4))
def test_mutated_headers_decode_or_raise_the_documented_error(seed: int) -> None:
    numbers = random.Random(seed)
    for _ in range(2000):
        kind = numbers.choice(list(MessageKind))
        header = bytearray(msgpack.packb(VALID[kind]))
        for _ in range(numbers.randint(1, 4)):
            match numbers.randrange(3):
                case 0:
                    header[numbers.randrange(len(header))] = numbers.randrange(256)
                case 1:
                    header.insert(numbers.randrange(len(header) + 1), numbers.randrange(256))
                case _ if len(header) > 1:
                    del header[numbers.randrange(len(header))]
        try:
            message = decode_bytes(kind, bytes(header), step=numbers.randrange(2**64))
        except RemoteProtocolError:
            continue  # the one error that a header may cause
        assert message.kind is kind
