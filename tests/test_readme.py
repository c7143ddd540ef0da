"""The README says nothing that is not so: its commands, options, files and names exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import dynacomm_async
from dynacomm_async.cli.main import main
from dynacomm_async.cli.parser import Parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(
    r"^    (\S.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE
)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def commands_in(text):
    """The words after ``dynacomm`` of every command in a line of shell or a mention of one."""
    for part in text.split("&&"):
        program, *words = shlex.split(part) or [""]
        if words and program.rpartition("/")[2] == "dynacomm":
            yield tuple(words)


COMMANDS = sorted({words for text in (*BLOCKS, *INLINE) for words in commands_in(text)})
NAMED = sorted({words[0] for words in COMMANDS} - {"COMMAND"})


def help_of(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def has_option(option, text):
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text) is not None


def test_nothing_is_left_to_be_filled_in():
    assert "@@" not in README


def test_it_installs_and_runs_the_demo_with_one_command_and_the_tests_with_another():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    installing = [line for line in BLOCKS if "pip install" in line]
    assert [line.split()[-2:] for line in installing] == [
        [".venv/bin/dynacomm", "demo"],
        ["&&", ".venv/bin/pytest"],
    ]
    for line in installing:
        (extra,) = re.findall(r"'\.\[(\w+)\]'", line)
        assert extra in extras


def test_the_commands_that_people_need_first_are_named():
    assert {"demo", "serve", "work", "train", "compare", "profile", "plan"} <= set(NAMED)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_line_can_be_typed_as_it_stands(words, capsys):
    name, *options = words
    if name == "COMMAND":
        assert options == ["--help"]
        return
    text = help_of(name, capsys)
    assert f"usage: dynacomm {name}" in text
    for option in options:
        if option.startswith("-"):
            assert has_option(option.partition("=")[0], text)
    if options:
        parser = Parser(prog=name, description="", epilog="")
        importlib.import_module(f"dynacomm_async.cli.{name}").add_arguments(parser)
        parser.parse_args(options)


def test_every_option_mentioned_by_itself_is_one_of_a_command_that_is_named(capsys):
    helps = "".join(help_of(name, capsys) for name in NAMED)
    mentioned = {text.split()[0] for text in INLINE if text.startswith("--")}
    assert [option for option in sorted(mentioned) if not has_option(option, helps)] == []


def test_every_strategy_of_the_table_is_one_and_none_is_left_out():
    (section,) = re.findall(r"^## Choosing a strategy$(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    table = re.findall(r"^\| `(\w+)`.*\|$", section, re.MULTILINE)
    assert sorted(table) == sorted(dynacomm_async.PLANNERS)


def test_every_demo_named_is_there_and_is_python():
    paths = set(re.findall(r"demos/[\w/]+\.py", README))
    assert paths
    for path in paths:
        ast.parse((ROOT / path).read_text(encoding="utf-8"))


def test_every_file_linked_to_is_there():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("code", PYTHON)
def test_the_examples_in_python_compile_and_use_names_that_exist(code):
    compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for name in re.findall(r"(?<!from )dynacomm_async\.(\w+)", code):
        assert name in dynacomm_async.__all__
    for module, name in re.findall(r"from (dynacomm_async[\w.]*) import (\w+)", code):
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()
        assert f'"{name}"' in source  # in its __all__; importing it may need PyTorch
