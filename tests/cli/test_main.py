"""Finding a command, its help, and what is said of a wrong one."""

from __future__ import annotations

import importlib

import pytest

from dynacomm_async import __version__

COMMANDS = ["demo", "serve", "work", "train", "compare", "plan", "sweep", "profile", "models"]
COMMANDS += ["link", "launch", "export", "trace"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_it_understands(call, name):
    outcome = call(name, "--help")

    assert outcome.code == 0
    assert outcome.err == ""
    words = " ".join(outcome.out.split())
    assert f"example: dynacomm {name} " in words + " "
    assert f"usage: dynacomm {name}" in words


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_can_be_parsed(name):
    from dynacomm_async.cli.parser import Parser

    module = importlib.import_module(f"dynacomm_async.cli.{name}")
    parser = Parser(prog=name, description="", epilog="")
    module.add_arguments(parser)
    parser.parse_args(module.EXAMPLE.split()[2:])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(call, flag):
    outcome = call(flag)

    assert outcome.code == 0
    for name in COMMANDS:
        assert f"  {name} " in outcome.out
    assert "example: dynacomm demo" in outcome.out


def test_no_command_at_all_shows_the_help_and_is_no_success(call):
    outcome = call()
    assert outcome.code == 2
    assert "commands:" in outcome.out


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version_is_told(call, flag):
    outcome = call(flag)
    assert (outcome.code, outcome.out) == (0, f"dynacomm {__version__}\n")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("trian", "did you mean train?"), ("serv", "did you mean serve?"), ("xyz", "expected one of")],
)
def test_an_unknown_command_is_refused_with_a_hint(call, typed, hint):
    outcome = call(typed)
    assert outcome.code == 2
    assert repr(typed) in outcome.complaint
    assert hint in outcome.complaint


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_refused_with_a_hint(call, name):
    required = {
        "work": ["--server", "a:1"],
        "plan": ["costs.json"],
        "sweep": ["costs.json"],
        "link": ["--listen", "a:1", "--to", "b:1"],
        "export": ["run.npz", "--output", "run.safetensors"],
        "trace": ["a.json", "--output", "b.json"],
    }
    outcome = call(name, *required.get(name, []), "--no-such-option")
    assert outcome.code == 2
    assert "--no-such-option" in outcome.complaint
    assert f"see dynacomm {name} --help" in outcome.complaint


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--stpes", "3"], "unrecognized arguments: --stpes 3; did you mean --steps?; see"),
        (["--rates=3", "--worker", "2"], "did you mean --rate and --workers?; see"),
        (["3"], "unrecognized arguments: 3; see dynacomm train --help"),
    ],
)
def test_a_misspelt_option_is_refused_with_what_was_meant(call, options, hint):
    outcome = call("train", *options)
    assert outcome.code == 2
    assert hint in outcome.complaint


def test_the_help_lists_the_exit_codes(call):
    outcome = call("--help")
    for code in ("0 success", "1 a failure", "2 options that", "130 after", "143 after"):
        assert code in outcome.out


def test_options_cannot_be_abbreviated(call):
    outcome = call("serve", "--work", "3")  # a later --work... would change what it means
    assert outcome.code == 2
    assert "--work" in outcome.complaint


@pytest.mark.parametrize("name", ["plan", "sweep", "link"])
def test_a_missing_option_is_named(call, name):
    outcome = call(name)
    assert outcome.code == 2
    assert "required" in outcome.complaint


def test_the_program_ends_with_the_code_of_its_command(run):
    assert run("models").code == 0
    assert run("plan", "no-such-file.json").code == 1
    assert run("plan").code == 2
