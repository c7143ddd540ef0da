"""Messages to headers and back: msgpack.

:func:`encode` and :func:`decode` are exact inverses. Everything that comes from the network is
checked field by field; what does not fit raises :class:`RemoteProtocolError` and nothing of it is
used.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, TypeAlias

import msgpack

from dynacomm_async.errors import ConfigError, RemoteProtocolError, ShapeError
from dynacomm_async.ranges import Range
from dynacomm_async.split import Split
from dynacomm_async.wire.frame import MessageKind, Prefix
from dynacomm_async.wire.grid import MAX_FLOATS, LayerSpec
from dynacomm_async.wire.messages import (
    DownPolicy,
    End,
    Error,
    Gradients,
    Have,
    Heartbeat,
    Hello,
    Initial,
    Join,
    Leave,
    Membership,
    Message,
    Parameters,
    Ranges,
    Report,
    Resume,
    Skip,
    Subscribe,
    Subscription,
    Timing,
    Welcome,
)

__all__ = ["MAX_ITEMS", "decode", "encode"]

MAX_ITEMS = 1 << 16
"""Items of the longest list or map in a header. Memory for a list is taken when its length is
read, so nested lists that only claim to be long must not cost much."""

_MAX_ERROR_TEXT = 800
"""Characters; at four bytes each they fit into the limit on an error's header."""

_SUBSCRIPTION = "[version, barrier, messages] or [version, policy]"
_SPLIT = "[blocks, members, step, epoch, position]"
_POLICY = "[cap or nil, threshold, whole layers, one layer]"

Header: TypeAlias = dict[str, Any]


def encode(message: Message, payload_nbytes: int = 0, flags: int = 0) -> bytes:
    """Return prefix and header of a message; its payload follows on the wire."""
    step, header = _ENCODERS[message.kind](message)
    packed: bytes = msgpack.packb(header)
    prefix = Prefix(message.kind, flags, len(packed), payload_nbytes, step)
    return prefix.pack() + packed


def decode(prefix: Prefix, header: bytes | bytearray | memoryview) -> Message:
    """Return the message of a prefix and its header.

    Raises:
        RemoteProtocolError: the header is not what such a message has.
    """
    most = min(len(header), MAX_ITEMS)
    try:
        fields = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            use_list=True,
            max_array_len=most,
            max_map_len=most,
        )
        if not isinstance(fields, dict):
            raise _wrong("header", fields, "a map")
        return _DECODERS[prefix.kind](prefix, fields)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{prefix.kind.name}: {error}") from None
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise RemoteProtocolError(f"{prefix.kind.name}: unreadable header ({reason})") from None


# -- encoding: message -> (step, header) ---------------------------------------------------------


def _encode_hello(m: Hello) -> tuple[int, Header]:
    return 0, {
        "protocol": m.protocol,
        "run": m.run,
        "fingerprint": m.fingerprint,
        "member": m.member,
    }


def _encode_welcome(m: Welcome) -> tuple[int, Header]:
    return m.version, {
        "protocol": m.protocol,
        "run": m.run,
        "slot": m.slot,
        "term": m.term,
        "workers": m.workers,
        "layers": _layer_rows(m.layers),
        "steps": m.steps,
        "upload": m.upload,
        "settings": dict(m.settings),
        "incarnation": m.incarnation,
        "resumed": m.resumed,
        "silence_ms": m.silence_ms,
        "split": _split_row(m.split),
    }


def _encode_join(m: Join) -> tuple[int, Header]:
    return m.subscription.version, {
        "fingerprint": m.fingerprint,
        "subscribe": _subscription_rows(m.subscription),
        "kernels": m.kernels,
        "layers": _layer_rows(m.layers),
    }


def _encode_resume(m: Resume) -> tuple[int, Header]:
    rows = _subscription_rows(m.subscription)
    return m.subscription.version, {"subscribe": rows, "has": m.has}


def _encode_have(m: Have) -> tuple[int, Header]:
    return m.step, {"has": m.has}


def _encode_initial(m: Initial) -> tuple[int, Header]:
    return 0, {"ranges": m.ranges}


def _encode_parameters(m: Parameters) -> tuple[int, Header]:
    header: Header = {"ranges": m.ranges}
    if m.timing is not None:
        timing = m.timing
        header["timing"] = [timing.arrivals, timing.wait_ns, timing.apply_ns, timing.last_slot]
    if m.split is not None:
        header["split"] = _split_row(m.split)
    return m.version, header


def _encode_gradients(m: Gradients) -> tuple[int, Header]:
    header: Header = {"ranges": m.ranges}
    if m.subscription is not None:
        header["subscribe"] = _subscription_rows(m.subscription)
    if m.report is not None:
        header["report"] = [m.report.loss, m.report.images]
    return m.step, header


def _encode_heartbeat(m: Heartbeat) -> tuple[int, Header]:
    return 0, {"number": m.number, "reply": m.reply, "clock_ns": m.clock_ns}


def _encode_end(m: End) -> tuple[int, Header]:
    return m.version, {}


def _encode_error(m: Error) -> tuple[int, Header]:
    return 0, {"code": m.code, "text": _sendable(m.text)}


def _encode_leave(m: Leave) -> tuple[int, Header]:
    return 0, {}


def _encode_skip(m: Skip) -> tuple[int, Header]:
    return m.step, {"code": m.code, "text": _sendable(m.text)}


def _encode_subscribe(m: Subscribe) -> tuple[int, Header]:
    return m.subscription.version, {"subscribe": _subscription_rows(m.subscription)}


def _sendable(text: str) -> str:
    """Return a text for people as it can be sent: cut to the limit, without lone surrogates."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) > _MAX_ERROR_TEXT:
        text = text[: _MAX_ERROR_TEXT - 3] + "..."
    return text


def _layer_rows(layers: tuple[LayerSpec, ...] | None) -> list[list[str | int]] | None:
    if layers is None:
        return None
    return [[spec.name, spec.count, spec.decay, spec.statistics] for spec in layers]


def _split_row(split: Split | None) -> list[Any] | None:
    if split is None:
        return None
    return [split.blocks, list(split.members), split.step, split.epoch, split.position]


def _subscription_rows(subscription: Subscription) -> list[Any]:
    if subscription.policy is not None:
        return [subscription.version, list(subscription.policy)]
    return [subscription.version, subscription.barrier, subscription.messages]


# -- decoding: (prefix, header) -> message, every field checked ----------------------------------


def _decode_hello(prefix: Prefix, header: Header) -> Hello:
    return Hello(
        _count(header, "protocol"),
        _optional_text(header, "run"),
        _optional_text(header, "fingerprint"),
        _membership(header),
    )


def _decode_welcome(prefix: Prefix, header: Header) -> Welcome:
    settings = header.get("settings")
    if not isinstance(settings, dict):
        raise _wrong("settings", settings, "a map")
    return Welcome(
        protocol=_count(header, "protocol"),
        run=_text(header, "run"),
        slot=_count(header, "slot"),
        term=_count(header, "term"),
        workers=_count(header, "workers"),
        layers=_layers(header),
        version=prefix.step,
        steps=_count(header, "steps"),
        upload=_truth(header, "upload"),
        settings=settings,
        incarnation=_count(header, "incarnation"),
        resumed=_truth(header, "resumed"),
        silence_ms=_count(header, "silence_ms"),
        split=_split(header),
    )


def _decode_join(prefix: Prefix, header: Header) -> Join:
    return Join(
        fingerprint=_text(header, "fingerprint"),
        subscription=_certain_subscription(header, "first parameters"),
        kernels=_text(header, "kernels"),
        layers=_layers(header),
    )


def _decode_resume(prefix: Prefix, header: Header) -> Resume:
    subscription = _certain_subscription(header, "parameters that are missing")
    return Resume(subscription, _has(header))


def _decode_have(prefix: Prefix, header: Header) -> Have:
    return Have(prefix.step, _has(header))


def _decode_initial(prefix: Prefix, header: Header) -> Initial:
    return Initial(_ranges(header.get("ranges")))


def _decode_parameters(prefix: Prefix, header: Header) -> Parameters:
    timing = None
    if "timing" in header:
        row = header["timing"]
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[0], list):
            raise _wrong("timing", row, "[arrivals, wait_ns, apply_ns, last_slot]")
        timing = Timing(
            tuple(_whole_numbers(arrival, 3, "arrivals") for arrival in row[0]),  # type: ignore[misc]
            *_whole_numbers(row[1:], 3, "timing"),
        )
    return Parameters(prefix.step, _ranges(header.get("ranges")), timing, _split(header))


def _decode_gradients(prefix: Prefix, header: Header) -> Gradients:
    ranges = _ranges(header.get("ranges"))
    if len(header) == 1:  # most of them; only the first of a step says more
        return Gradients(prefix.step, ranges)
    report = None
    if "report" in header:
        row = header["report"]
        if not isinstance(row, list) or len(row) != 2:
            raise _wrong("report", row, "[loss, images]")
        loss = row[0]
        if loss is not None and not isinstance(loss, float):
            raise _wrong("loss", loss, "a number")
        report = Report(loss, *_whole_numbers(row[1:], 1, "images"))
    return Gradients(prefix.step, ranges, _subscription(header), report)


def _decode_heartbeat(prefix: Prefix, header: Header) -> Heartbeat:
    return Heartbeat(_count(header, "number"), _truth(header, "reply"), _count(header, "clock_ns"))


def _decode_end(prefix: Prefix, header: Header) -> End:
    return End(prefix.step)


def _decode_error(prefix: Prefix, header: Header) -> Error:
    return Error(_text(header, "code"), _text(header, "text"))


def _decode_leave(prefix: Prefix, header: Header) -> Leave:
    return Leave()


def _decode_skip(prefix: Prefix, header: Header) -> Skip:
    return Skip(prefix.step, _text(header, "code"), _text(header, "text"))


def _decode_subscribe(prefix: Prefix, header: Header) -> Subscribe:
    return Subscribe(_certain_subscription(header, "next parameters"))


def _wrong(name: str, value: object, expected: str) -> RemoteProtocolError:
    shown = reprlib.repr(value)  # bounded work however large or deep the value is
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return RemoteProtocolError(f"{name} is {shown}, expected {expected}")


def _count(header: Header, name: str) -> int:
    value = header.get(name)
    if type(value) is not int or value < 0:
        raise _wrong(name, value, "a whole number from 0")
    return value


def _truth(header: Header, name: str) -> bool:
    value = header.get(name)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(header: Header, name: str) -> str:
    value = header.get(name)
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return value


def _optional_text(header: Header, name: str) -> str | None:
    return None if header.get(name) is None else _text(header, name)


def _membership(header: Header) -> Membership | None:
    row = header.get("member")
    return None if row is None else Membership(*_whole_numbers(row, 4, "member"))


def _whole_numbers(row: object, length: int, name: str) -> tuple[int, ...]:
    if (
        not isinstance(row, list)
        or len(row) != length
        or not all(type(value) is int and value >= 0 for value in row)
    ):
        raise _wrong(name, row, f"{length} whole numbers from 0")
    return tuple(row)


def _ranges(rows: object) -> Ranges:
    if not isinstance(rows, list) or not rows:
        raise _wrong("ranges", rows, "a list of [first cell, cells]")
    ranges = []
    for row in rows:
        if type(row) is not list or len(row) != 2:
            raise _wrong("range", row, "[first cell, cells]")
        first, count = row
        if type(first) is not int or type(count) is not int or first < 0 or count < 1:
            raise _wrong("range", row, "[first cell, cells]")
        ranges.append(Range(first, count))
    return tuple(ranges)


def _has(header: Header) -> Ranges:
    rows = header.get("has")
    return () if rows == [] else _ranges(rows)


def _certain_subscription(header: Header, to_what: str) -> Subscription:
    subscription = _subscription(header)
    if subscription is None:
        raise _wrong("subscribe", None, f"the plan of the {to_what}")
    return subscription


def _subscription(header: Header) -> Subscription | None:
    row = header.get("subscribe")
    if row is None:
        return None
    if not isinstance(row, list) or len(row) not in (2, 3):
        raise _wrong("subscribe", row, _SUBSCRIPTION)
    version = row[0]
    if type(version) is not int or version < 0:
        raise _wrong("subscribe", row, _SUBSCRIPTION)
    if len(row) == 2:
        return Subscription(version, policy=_policy(row[1]))
    barrier, messages = row[1:]
    if not isinstance(barrier, bool) or not isinstance(messages, list):
        raise _wrong("subscribe", row, _SUBSCRIPTION)
    return Subscription(version, tuple(_ranges(message) for message in messages), barrier)


def _split(header: Header) -> Split | None:
    row = header.get("split")
    if row is None:
        return None
    if not isinstance(row, list) or len(row) != 5 or not isinstance(row[1], list):
        raise _wrong("split", row, _SPLIT)
    blocks, step, epoch, position = _whole_numbers([row[0], *row[2:]], 4, "split")
    try:
        return Split(blocks, _whole_numbers(row[1], len(row[1]), "members"), step, epoch, position)
    except ConfigError as error:
        raise RemoteProtocolError(f"split: {error}") from None


def _policy(row: object) -> DownPolicy:
    if not isinstance(row, list) or len(row) != 4:
        raise _wrong("policy", row, _POLICY)
    cap, threshold, whole_layers, one_layer = row
    if cap is not None and (type(cap) is not int or cap < 1):
        raise _wrong("policy", row, _POLICY)
    if type(threshold) is not int or threshold < 0:
        raise _wrong("policy", row, _POLICY)
    if not isinstance(whole_layers, bool) or not isinstance(one_layer, bool):
        raise _wrong("policy", row, _POLICY)
    return DownPolicy(cap, threshold, whole_layers, one_layer)


def _layers(header: Header) -> tuple[LayerSpec, ...] | None:
    rows = header.get("layers")
    if rows is None:
        return None
    if not isinstance(rows, list):
        raise _wrong("layers", rows, "a list of [name, count, decay, statistics]")
    specs = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[0], str):
            raise _wrong("layer", row, "[name, count, decay, statistics]")
        try:
            specs.append(LayerSpec(row[0], *_whole_numbers(row[1:], 3, "layer")))
        except ShapeError as error:
            raise RemoteProtocolError(str(error)) from None
    n_floats = sum(spec.count + spec.statistics for spec in specs)
    if n_floats > MAX_FLOATS:
        raise RemoteProtocolError(f"layers hold {n_floats} values, expected at most {MAX_FLOATS}")
    return tuple(specs)


_ENCODERS: dict[MessageKind, Callable[[Any], tuple[int, Header]]] = {
    MessageKind.HELLO: _encode_hello,
    MessageKind.WELCOME: _encode_welcome,
    MessageKind.JOIN: _encode_join,
    MessageKind.RESUME: _encode_resume,
    MessageKind.HAVE: _encode_have,
    MessageKind.SKIP: _encode_skip,
    MessageKind.SUBSCRIBE: _encode_subscribe,
    MessageKind.INITIAL: _encode_initial,
    MessageKind.PARAMETERS: _encode_parameters,
    MessageKind.GRADIENTS: _encode_gradients,
    MessageKind.HEARTBEAT: _encode_heartbeat,
    MessageKind.END: _encode_end,
    MessageKind.ERROR: _encode_error,
    MessageKind.LEAVE: _encode_leave,
}

_DECODERS: dict[MessageKind, Callable[[Prefix, Header], Message]] = {
    MessageKind.HELLO: _decode_hello,
    MessageKind.WELCOME: _decode_welcome,
    MessageKind.JOIN: _decode_join,
    MessageKind.RESUME: _decode_resume,
    MessageKind.HAVE: _decode_have,
    MessageKind.SKIP: _decode_skip,
    MessageKind.SUBSCRIBE: _decode_subscribe,
    MessageKind.INITIAL: _decode_initial,
    MessageKind.PARAMETERS: _decode_parameters,
    MessageKind.GRADIENTS: _decode_gradients,
    MessageKind.HEARTBEAT: _decode_heartbeat,
    MessageKind.END: _decode_end,
    MessageKind.ERROR: _decode_error,
    MessageKind.LEAVE: _decode_leave,
}
