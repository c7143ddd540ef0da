"""The 24 bytes that open every message."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.wire import (
    BACK_TO_BACK,
    MAGIC,
    MAX_HEADER_NBYTES,
    PREFIX_NBYTES,
    MessageKind,
    Prefix,
)

prefixes = st.builds(
    Prefix,
    kind=st.sampled_from(MessageKind),
    flags=st.sampled_from([0, BACK_TO_BACK]),
    header_nbytes=st.integers(0, 256),
    payload_nbytes=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
)


def test_a_prefix_has_the_bytes_that_the_protocol_page_gives() -> None:
    prefix = Prefix(MessageKind.GRADIENTS, BACK_TO_BACK, 0x00020304, 0x1122334455667788, 7)
    assert prefix.pack() == bytes.fromhex(
        "4443 06 01 04030200 8877665544332211 0700000000000000".replace(" ", "")
    )
    assert PREFIX_NBYTES == 24


@given(prefixes, st.binary(max_size=9))
def test_unpacking_at_any_offset_is_the_inverse_of_packing(prefix: Prefix, before: bytes) -> None:
    assert Prefix.unpack(before + prefix.pack() + b"more", len(before)) == prefix


@pytest.mark.parametrize("magic", [b"GE", b"\x00\x00", b"Dc", b"CD"])
def test_another_magic_is_refused_by_name(magic: bytes) -> None:
    data = magic + Prefix(MessageKind.LEAVE, 0, 0, 0, 0).pack()[2:]
    with pytest.raises(RemoteProtocolError, match=r"not a dynacomm message.*expected b'DC'"):
        Prefix.unpack(data)


@pytest.mark.parametrize("kind", [0, 15, 16, 128, 255])
def test_unknown_kinds_are_refused_by_number(kind: int) -> None:
    data = struct.pack("<2sBBIQQ", MAGIC, kind, 0, 0, 0, 0)
    with pytest.raises(RemoteProtocolError, match=f"unknown message kind {kind}, expected 1 to 14"):
        Prefix.unpack(data)


@pytest.mark.parametrize("flags", [2, 3, 0x80, 0xFF])
def test_unknown_flags_are_refused(flags: int) -> None:
    data = struct.pack("<2sBBIQQ", MAGIC, MessageKind.JOIN, flags, 0, 0, 0)
    with pytest.raises(RemoteProtocolError, match=rf"unknown flags {flags:#04x} in a JOIN message"):
        Prefix.unpack(data)


@pytest.mark.parametrize("kind", MessageKind)
def test_a_header_of_any_kind_has_a_largest_length(kind: MessageKind) -> None:
    limit = MAX_HEADER_NBYTES[kind]
    assert Prefix.unpack(Prefix(kind, 0, limit, 0, 0).pack()).header_nbytes == limit
    for nbytes in (limit + 1, 2**32 - 1):
        expected = f"{kind.name} declares a header of {nbytes} bytes, expected at most {limit}"
        with pytest.raises(RemoteProtocolError, match=expected):
            Prefix.unpack(Prefix(kind, 0, nbytes, 0, 0).pack())


def test_walking_a_stream_needs_neither_numpy_nor_an_event_loop() -> None:
    code = (
        "import sys; import dynacomm_async.wire.frame; "
        "sys.exit(' '.join({'numpy', 'asyncio'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
