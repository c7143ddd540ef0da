"""Addresses as people write them."""

from __future__ import annotations

import pytest

from dynacomm_async.addresses import Address, check_listen, is_loopback, parse_address
from dynacomm_async.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7070", Address("127.0.0.1", 7070)),
        ("example.org:1", Address("example.org", 1)),
        ("[::1]:65535", Address("::1", 65535)),
        ("[fe80::1%eth0]:0", Address("fe80::1%eth0", 0)),
    ],
)
def test_an_address_is_read_and_written_in_the_same_form(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(text, port=9) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "host"), [("example.org", "example.org"), ("10.0.0.1", "10.0.0.1"), ("[::1]", "::1")]
)
def test_a_port_that_is_left_out_is_the_default_one(text: str, host: str) -> None:
    assert parse_address(text, port=7070) == Address(host, 7070)
    with pytest.raises(ConfigError, match="is not an address"):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":80", "host:", "host:x", "host:-1", "host:65536", "host:99999999999", "host:1.5",
        "host: 80", "host:٣", "host:" + "1" * 5000, "::1", "::1:80", "[::1", "[]:80", "[::1]80",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an address: expected HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    ("host", "stays"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.1", False),
        ("fe80::1%eth0", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_only_loopback_stays_on_this_machine(host: str, stays: bool) -> None:
    assert is_loopback(host) is stays


def test_listening_beyond_this_machine_must_be_allowed() -> None:
    check_listen(Address("127.0.0.1", 1), insecure=False)
    check_listen(Address("0.0.0.0", 1), insecure=True)
    with pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0:1 .*pass --insecure"):
        check_listen(Address("0.0.0.0", 1), insecure=False)
