"""Child processes: their events, their last words, and that none is left behind."""

from __future__ import annotations

import asyncio

import pytest

from dynacomm_async.cli.children import ChildFailed, Children

EMIT = "import json, sys; print(json.dumps({'event': 'hello', 'n': 1}), flush=True)"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Make an importable module of a line of Python; returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name, code):
        (tmp_path / f"{name}.py").write_text(code.replace("; ", "\n") + "\n")
        return name

    return make


async def test_events_are_handed_on_until_the_child_ends(module):
    events = []
    async with Children() as children:
        await children.start("a", module("speaks", EMIT), on_event=events.append)
        await children.wait_all()
    assert events == [{"event": "hello", "n": 1}]


async def test_a_child_that_fails_is_quoted(module):
    async with Children() as children:
        code = "import sys; sys.exit('dynacomm x: error: out of ideas')"
        await children.start("worker 7", module("fails", code), on_event=print)
        with pytest.raises(ChildFailed, match=r"^worker 7: out of ideas$"):
            await children.wait_all()


async def test_a_child_that_dies_without_a_word_is_reported_with_its_code(module):
    async with Children() as children:
        await children.start("a", module("dies", "import os; os._exit(9)"), on_event=print)
        with pytest.raises(ChildFailed, match="a: ended with code 9 and no message"):
            await children.wait_all()


@pytest.mark.parametrize(
    "words",
    ["worker 0 (127.0.0.1:1) left in step 5", "the server was stopped before the run ended"],
)
async def test_the_cause_is_reported_rather_than_its_consequences(module, words):
    consequence = f"import sys; sys.exit('x: error: {words}')"
    cause = "import sys, time; time.sleep(0.1); sys.exit('x: error: no room')"
    async with Children() as children:
        await children.start("server", module("told", consequence), on_event=print)
        await children.start("worker 0", module("fell", cause), on_event=print)
        with pytest.raises(ChildFailed, match="worker 0: no room"):
            await children.wait_all()


async def test_waiting_for_an_answer_ends_when_all_children_have(module):
    answer = asyncio.get_running_loop().create_future()
    async with Children() as children:
        await children.start("a", module("mute", "pass"), on_event=print)
        with pytest.raises(ChildFailed, match="ended without a result"):
            await children.wait_for(answer)


async def test_leaving_ends_a_child_that_would_rather_stay(module):
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        + EMIT
        + "; time.sleep(60)"
    )
    heard = asyncio.Event()
    async with asyncio.timeout(10):
        async with Children() as children:
            name = module("stays", code)
            await children.start("a", name, on_event=lambda event: heard.set())
            await heard.wait()


async def test_a_child_learns_from_its_input_what_to_do(module):
    code = "import sys; print(sys.stdin.readline(), end='')"
    events = []
    async with Children() as children:
        child = await children.start("a", module("echo", code), on_event=events.append)
        child.tell({"event": "echo"})
        await children.wait_all()
    assert events == [{"event": "echo"}]


async def test_what_a_users_own_code_prints_is_passed_on_and_is_no_event(module, capsys):
    events = []
    code = "print('hello'); print('{'); print('[1]'); print('{}'); " + EMIT
    async with Children() as children:
        await children.start("a", module("chatty", code), on_event=events.append)
        await children.wait_all()
    assert events == [{"event": "hello", "n": 1}]
    assert capsys.readouterr().err == "hello\n{\n[1]\n{}\n"


WARN = "import sys, time; sys.stderr.write('careful\\nvery careful\\n'); sys.stderr.flush()"


async def test_what_a_users_own_code_warns_of_is_passed_on_with_the_childs_name(module, capsys):
    async with Children() as children:
        await children.start("worker 1", module("warns", WARN), on_event=print)
        await children.wait_all()
    assert capsys.readouterr().err == "worker 1: careful\nworker 1: very careful\n"


async def test_a_warning_is_passed_on_while_the_child_works_on(module, capsys):
    async with asyncio.timeout(20), Children() as children:
        await children.start("a", module("warns", WARN + "; time.sleep(60)"), on_event=print)
        err = ""
        while err.count("\n") < 2:
            await asyncio.sleep(0.05)
            err += capsys.readouterr().err
    assert err == "a: careful\na: very careful\n"


@pytest.mark.parametrize("end", ["sys.exit('x: error: no room')", "raise KeyError('no room')"])
async def test_the_error_that_ends_a_child_is_quoted_once_and_without_a_traceback(
    module, capsys, end
):
    async with Children() as children:
        await children.start("a", module("falls", f"{WARN}; {end}"), on_event=print)
        with pytest.raises(ChildFailed, match=r"^a: .*no room"):
            await children.wait_all()
    assert capsys.readouterr().err == "a: careful\na: very careful\n"


async def test_what_a_child_says_when_it_is_ended_is_not_passed_on(module, capsys):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: "
        "(print('ouch', 'ouch', sep='\\n', file=sys.stderr), sys.exit(1))); "
        + EMIT
        + "; time.sleep(60)"
    )
    heard = asyncio.Event()
    async with asyncio.timeout(10), Children() as children:
        name = module("complains", code)
        await children.start("a", name, on_event=lambda event: heard.set())
        await heard.wait()
    assert capsys.readouterr().err == ""
