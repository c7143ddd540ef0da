"""PROTOCOL.md says what the code does: its tables are compared with it."""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import dynacomm_async.wire
from dynacomm_async.ranges import Range
from dynacomm_async.split import Split
from dynacomm_async.wire import (
    BACK_TO_BACK,
    CELL_FLOATS,
    CELL_NBYTES,
    MAGIC,
    MAX_FLOATS,
    MAX_HEADER_NBYTES,
    MAX_ITEMS,
    PREFIX_NBYTES,
    PROTOCOL_VERSION,
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
    MessageKind,
    Parameters,
    Report,
    Resume,
    Role,
    Skip,
    State,
    Subscribe,
    Subscription,
    Timing,
    Welcome,
)
from dynacomm_async.wire.codec import _ENCODERS
from dynacomm_async.wire.states import _TABLE

PACKAGE = Path(dynacomm_async.wire.__file__).parent.parent
PAGE = (PACKAGE / "wire" / "PROTOCOL.md").read_text(encoding="utf-8")
RANGES = (Range(0, 1),)
FULL = [
    Hello(1, "r", "f", Membership(0, 1, 2, 3)),
    Welcome(1, "r", 0, 1, 1, None, 0, 1, False),
    Join("f", Subscription(0, (RANGES,))),
    Initial(RANGES),
    Parameters(1, RANGES, Timing(), Split(1, (0,))),
    Gradients(0, RANGES, Subscription(1, (RANGES,)), Report()),
    Heartbeat(1, True, 2),
    End(1),
    Error("c", "t"),
    Leave(),
    Resume(Subscription(0, (RANGES,)), RANGES),
    Have(0, RANGES),
    Skip(0, "c", "t"),
    Subscribe(Subscription(0, (RANGES,))),
]


def section(title: str) -> str:
    """The text under a heading, up to the next one of its rank or above."""
    [start] = [m for m in re.finditer(r"^(#+) (.*)$", PAGE, re.M) if m[2].startswith(title)]
    rank = len(start[1])
    following = re.compile(rf"^#{{1,{rank}}} ", re.M).search(PAGE, start.end())
    return PAGE[start.end() : following.start() if following else None]


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without those of headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {i - 1 for i, row in enumerate(cells) if not row[0].strip("-:")}
    return [row for i, row in enumerate(cells) if i not in heads and row[0].strip("-:")]


def test_the_table_of_states_is_the_one_that_is_kept() -> None:
    documented = {}
    for sender, state, kind, others, leads_to in rows(section("Who may send what, when")):
        key = (Role(sender), State(state), MessageKind[kind])
        assert key not in documented
        named = State if others == "any" else [State(other) for other in others.split(", ")]
        documented[key] = (frozenset(named), State(leads_to))
    assert documented == _TABLE


def test_every_message_is_described_with_its_number_its_senders_and_its_fields() -> None:
    headings = re.findall(r"^### (\w+): kind (\d+), from (.*)$", PAGE, re.M)
    assert [(name, int(number)) for name, number, _ in headings] == [
        (kind.name, int(kind)) for kind in MessageKind
    ]
    for (name, _, senders), message in zip(headings, FULL, strict=True):
        roles = {role.value for role, _, kind in _TABLE if kind is message.kind}
        assert senders == ("both" if len(roles) == 2 else f"the {roles.pop()}")
        _, header = _ENCODERS[message.kind](message)
        fields = [row[0].strip("`") for row in rows(section(f"{name}: kind"))]
        assert fields == list(header), name


def test_the_prefix_is_laid_out_as_the_table_says() -> None:
    table = [[int(row[0]), int(row[1])] for row in rows(section("Prefix"))]
    offset = 0
    for start, nbytes in table:
        assert start == offset
        offset += nbytes
    assert offset == PREFIX_NBYTES
    formats = {1: "B", 2: "2s", 4: "I", 8: "Q"}
    layout = "<" + "".join(formats[nbytes] for _, nbytes in table)
    values = (MAGIC, 6, BACK_TO_BACK, 3, 4, 5)
    prefix = dynacomm_async.wire.Prefix(MessageKind(6), BACK_TO_BACK, 3, 4, 5)
    assert struct.pack(layout, *values) == prefix.pack()
    assert MAGIC == b"DC"
    assert BACK_TO_BACK == 1


def test_the_limits_are_those_that_are_kept() -> None:
    text = section("Limits")
    documented = {MessageKind[kind]: int(nbytes) for kind, nbytes in rows(text)}
    assert documented == MAX_HEADER_NBYTES
    assert f"at most {MAX_ITEMS} items" in text
    assert f"at most {MAX_FLOATS}" in text
    assert f"A cell is {CELL_FLOATS} float32 values ({CELL_NBYTES} bytes)" in section("Cells")


def test_the_page_and_the_code_are_of_the_same_version() -> None:
    assert PAGE.splitlines()[0].endswith(f", version {PROTOCOL_VERSION}")
    assert f"the version of this page: {PROTOCOL_VERSION}." in section("Versions")


def said_codes() -> Iterator[tuple[str, str]]:
    """Every code that the server says, as (where, pattern); parts filled in later match any."""
    for path in sorted((PACKAGE / "server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in {"Refusal", "Error"}:
                continue
            code, where = node.args[0], f"{path.name}:{node.lineno}"
            if isinstance(code, ast.JoinedStr):
                parts = [
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"\w+"
                    for part in code.values
                ]
                yield where, "".join(parts)
            elif isinstance(code, ast.Constant):
                yield where, re.escape(str(code.value))
            else:
                assert "refusal.code" in ast.unparse(code), f"{where}: {ast.unparse(code)}"


def test_the_error_codes_are_those_that_the_server_says() -> None:
    documented = {row[0].strip("`") for row in rows(section("Error codes"))}
    said = list(said_codes())
    assert len(said) > 5
    for where, pattern in said:
        assert [code for code in documented if re.fullmatch(pattern, code)], f"{where}: {pattern}"
    for code in documented:
        assert [where for where, pattern in said if re.fullmatch(pattern, code)], code


def test_the_package_brings_the_page_along() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert "wire/PROTOCOL.md" in pyproject.read_text(encoding="utf-8")
