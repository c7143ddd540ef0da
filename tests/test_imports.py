"""Who imports whom: the arrows between the pieces point inward, and the pure pieces are pure."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynacomm_async

ROOT = Path(dynacomm_async.__file__).parent
NAME = ROOT.name
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

# For each piece of the package: what of the package it may import.
ARROWS = {
    "errors": set(),
    "ranges": set(),
    "split": {"errors"},
    "addresses": {"errors"},
    "cluster": {"errors", "addresses"},
    "recording": {"errors"},
    "failpoints": {"errors"},
    "schedule": {"errors", "ranges"},
    "nn": {"errors"},
    "optim": {"errors"},
    "data": {"errors", "split"},
    "models": {"nn", "schedule", "errors"},
    "wire": {"errors", "ranges", "split"},
    "transport": {"wire", "errors", "addresses", "recording"},
    "link": {"errors", "addresses", "recording", "wire.frame"},
    "server": {
        *("transport", "wire", "schedule", "optim"),
        *("errors", "ranges", "split", "recording", "failpoints"),
    },
    "worker": {
        *("transport", "wire", "schedule", "nn", "models", "data"),
        *("errors", "ranges", "split", "recording", "failpoints"),
    },
    "adapters": {"server", "worker", "transport", "wire", "schedule", "errors", "ranges"},
    "observe": {"schedule", "errors", "ranges", "recording"},
}
INNER = {*ARROWS, "testing"}
ARROWS |= {
    "testing": INNER - {"adapters"},
    "__init__": INNER,  # the public names
    "cli": {*INNER, "__init__", "cli"},
}

CLOCKS = {"time", "datetime"}
IO = {"asyncio", "socket", "select", "threading", "concurrent", "multiprocessing", "subprocess"}
ARRAYS = {"numpy", "msgpack", "uvloop"}

# What must not be imported by everything in a folder, or by a file.
PURITY = {
    "schedule": CLOCKS | IO | ARRAYS,
    "wire": CLOCKS | IO | {"numpy"},
    "nn": IO - {"threading"},  # shards of a batch are computed side by side
    "addresses.py": CLOCKS | IO | ARRAYS,
    "split.py": CLOCKS | IO | ARRAYS,
    "cluster.py": CLOCKS | IO | ARRAYS | {"os"},
    "recording.py": CLOCKS | IO | ARRAYS,
    "optim.py": CLOCKS | IO,
    "link": {"numpy"},
    "server/modes.py": CLOCKS | IO | ARRAYS,
    "server/clocks.py": CLOCKS | IO,
    "server/rounds.py": CLOCKS | IO,
    "server/store.py": CLOCKS | IO,
    "worker/step.py": CLOCKS | IO | ARRAYS,
}


def piece_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def list_imports(path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, as (line, dotted name); names from a package as modules."""
    text = (ROOT / path).read_text(encoding="utf-8") if source is None else source
    package = [NAME, *path.parent.parts]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def wrong_arrows(path: Path, source: str | None = None) -> list[str]:
    piece = piece_of(path)
    allowed = ARROWS[piece] | {piece}
    wrong = []
    for line, name in list_imports(path, source):
        first, *rest = name.split(".")
        if first != NAME:
            continue
        to = ".".join(rest) if rest and rest[0] in ARROWS else "__init__"
        if not any(f"{to}.".startswith(f"{target}.") for target in allowed):
            wrong.append(f"{path}:{line} imports {name}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_arrows_point_inward(path: Path) -> None:
    assert piece_of(path) in ARROWS, "a new piece: say in ARROWS what it may import"
    assert wrong_arrows(path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("wire/a.py", "import dynacomm_async.transport.tcp"),
        ("wire/a.py", "from dynacomm_async import transport"),
        ("wire/a.py", "from dynacomm_async import ParameterServer"),
        ("wire/a.py", "from ..transport import tcp"),
        ("wire/a.py", "def f():\n    from dynacomm_async.server.store import Store"),
        ("link/a.py", "from dynacomm_async.wire.messages import Hello"),
        ("link/a.py", "from dynacomm_async.wire import Hello"),
        ("errors.py", "from dynacomm_async.ranges import Range"),
        ("server/a.py", "from dynacomm_async.worker import Session"),
    ],
)
def test_a_wrong_arrow_is_seen_however_it_is_written(path: str, source: str) -> None:
    assert len(wrong_arrows(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("wire/a.py", "from dynacomm_async.errors import ConfigError"),
        (
            "wire/a.py",
            "from . import frame\nfrom .frame import Prefix\nimport dynacomm_async.ranges",
        ),
        ("link/a.py", "from dynacomm_async.wire.frame import Prefix\nimport asyncio"),
        ("cli/a.py", "from dynacomm_async import ParameterServer, connect"),
    ],
)
def test_a_right_arrow_is_left_alone(path: str, source: str) -> None:
    assert wrong_arrows(Path(path), source) == []


def test_no_two_pieces_import_each_other() -> None:
    def reach(piece: str, seen: frozenset[str]) -> None:
        assert piece not in seen, f"a circle through {piece}"
        for target in ARROWS[piece] - {piece}:
            reach(target.split(".")[0], seen | {piece})

    for piece in ARROWS:
        reach(piece, frozenset())


@pytest.mark.parametrize("where", PURITY)
def test_pure_pieces_import_nothing_impure(where: str) -> None:
    inside = [path for path in MODULES if path.as_posix() == where or path.parts[0] == where]
    assert inside, f"there is no {where} any more"
    imported = [
        (path, line, name)
        for path in inside
        for line, name in list_imports(path)
        if name.split(".")[0] in PURITY[where]
    ]
    assert imported == []


def test_scheduling_needs_the_standard_library_alone() -> None:
    outside = [
        (path, name)
        for path in MODULES
        if piece_of(path) == "schedule"
        for _, name in list_imports(path)
        if name.split(".")[0] not in {*sys.stdlib_module_names, NAME}
    ]
    assert outside == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (NAME, {"numpy", "msgpack", "asyncio"}),
        (f"{NAME}.schedule", {"numpy", "msgpack", "asyncio", "uvloop"}),
        (f"{NAME}.link", {"numpy"}),
        (f"{NAME}.wire", {"numpy", "asyncio"}),
    ],
)
def test_importing_a_pure_piece_loads_nothing_impure(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({absent!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def code_of(tree: ast.Module) -> list[ast.stmt]:
    """A module's statements beside its docstring, imports and list of exports."""
    return [
        node
        for node in tree.body[1:]
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    ]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_says_what_it_is_and_postpones_annotations(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    if code_of(tree):
        assert ast.unparse(tree.body[1]) == "from __future__ import annotations"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.name == "__init__.py" and path.parent.parts],
    ids=str,
)
def test_the_front_of_a_package_has_no_logic(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert [ast.unparse(node) for node in code_of(tree)] == []


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=str)
def test_every_package_exports_what_it_lists(path: Path) -> None:
    module = importlib.import_module(".".join([NAME, *path.parent.parts]))
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(module, name) is not None, name
