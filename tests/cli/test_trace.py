"""Traces from the command line: of all processes at once, and joined from several files."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

SLOW = ("--bandwidth", "200mbit", "--delay", "1ms")


def processes(trace):
    return [
        event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"
    ]


def categories(trace):
    return Counter(event["cat"] for event in trace["traceEvents"] if event["ph"] == "X")


def arrows(trace):
    """How many messages were followed, by the places at which they were seen."""
    paths: dict[int, str] = {}
    for event in trace["traceEvents"]:
        if event["ph"] in "stf":
            paths[event["id"]] = paths.get(event["id"], "") + event["ph"]
    return Counter(paths.values())


def test_train_traces_server_links_and_workers_on_one_clock(run, quick, tmp_path):
    path = tmp_path / "run.json"
    outcome = run("train", *quick, "--steps", "4", *SLOW, "--trace", path)
    assert outcome.code == 0, outcome.err

    trace = json.loads(path.read_text())
    expected = ["server", "link of worker 0", "link of worker 1", "worker 0", "worker 1"]
    assert processes(trace) == expected
    assert min(event["ts"] for event in trace["traceEvents"] if "ts" in event) == 0
    # Seen at both ends and on the link, which may have made up for a late wake-up of its own.
    assert {"stf"} <= set(arrows(trace)) <= {"stf", "sf"}
    assert categories(trace)["forward"] == categories(trace)["backward"] == 2 * 4 * 5
    assert {entry["clock_uncertainty_us"] for entry in trace["otherData"]["processes"]} == {0}
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_serve_work_and_link_are_traces_themselves_and_can_be_joined(
    start, run, quick, tmp_path
):
    files = [tmp_path / f"{name}.json" for name in ("server", "worker")]
    options = ("--workers", "1", "--steps", "3", "--listen", "127.0.0.1:0", "--trace", files[0])
    server = start("serve", *quick, *options)
    address = server.read_error_line().partition("listening on ")[2].partition(",")[0]
    worker = run("work", "--server", address, "--trace", files[1])
    assert worker.code == 0, worker.err
    assert server.finish().code == 0

    alone = [json.loads(path.read_text()) for path in files]
    assert [processes(trace) for trace in alone] == [["server"], ["worker 0"]]
    assert [set(arrows(trace)) for trace in alone] == [set(), set()]
    joined = run("trace", *reversed(files), "-o", tmp_path / "all.json")
    assert joined.code == 0, joined.err
    assert "the clock that counts" in joined.err
    trace = json.loads((tmp_path / "all.json").read_text())
    assert processes(trace) == ["server", "worker 0"]
    assert set(arrows(trace)) == {"sf"}
    # Both ends of every message, and nothing lost on the way.
    together = categories(alone[0]) + categories(alone[1])
    assert categories(trace) == together
    assert arrows(trace)["sf"] == sum(together[kind] for kind in ("pull", "push", "control")) / 2


def test_compare_draws_and_traces_each_strategy(run, quick, tmp_path):
    trace_path, plot_path = tmp_path / "run.json", tmp_path / "steps.png"
    outcome = run(
        *("compare", *quick, "--steps", "12", "--workers", "1", *SLOW),
        *("--strategies", "sequential,dynacomm", "--trace", trace_path, "--plot", plot_path),
    )
    assert outcome.code == 0, outcome.err

    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert processes(json.loads(trace_path.read_text())) == [
        f"{who} ({strategy})"
        for strategy in ("sequential", "dynacomm")
        for who in ("server", "link of worker 0", "worker 0")
    ]


@pytest.mark.parametrize("where", ["nowhere/x.json", "."])
@pytest.mark.parametrize(
    "command",
    [
        ("train",),
        ("compare",),
        ("demo",),
        ("serve",),
        ("work", "--server", "127.0.0.1:1"),
        ("link", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:1"),
    ],
    ids=lambda command: command[0],
)
def test_a_trace_that_cannot_be_written_is_refused_at_once(call, tmp_path, command, where):
    complaint = call(*command, "--trace", tmp_path / where).complaint
    assert complaint.startswith(f"dynacomm {command[0]}: error: cannot write ")


def test_a_picture_that_cannot_be_written_is_refused_at_once(call, tmp_path):
    complaint = call("compare", "--plot", tmp_path / "nowhere" / "x.png").complaint
    assert "cannot write" in complaint


def test_what_is_no_recording_is_refused_by_name(call, tmp_path):
    odd = tmp_path / "odd.json"
    odd.write_text('{"traceEvents": []}')
    complaint = call("trace", odd, "-o", tmp_path / "all.json").complaint
    assert f"{odd} has no recordings" in complaint
    assert "cannot read" in call("trace", tmp_path / "no.json", "-o", tmp_path / "a").complaint
