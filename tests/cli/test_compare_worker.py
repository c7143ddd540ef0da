"""A worker process of a comparison, run in this process."""

from __future__ import annotations

import json
import threading

import pytest

from dynacomm_async.cli import compare_worker
from dynacomm_async.cli.workload import load_workload
from dynacomm_async.schedule import Estimator
from dynacomm_async.server import ParameterServer
from dynacomm_async.transport import LoopThread
from dynacomm_async.worker import layer_specs

SETTINGS = {
    "model": "mlp",
    "data": "synthetic:64:16",
    "data_dir": None,
    "augment": "none",
    "batch": 8,
    "seed": 0,
    "workers": 1,
}


@pytest.fixture
def server():
    """A server for one strategy; its own loop is in another thread."""
    network = load_workload(SETTINGS).network
    server = ParameterServer(
        layer_specs(network),
        workers=1,
        steps=compare_worker.LEAST_STEPS,
        initial=network.initialise(0),
        settings=SETTINGS,
        run="compare-layerwise",
    )
    with LoopThread() as io:
        io.submit(server.__aenter__()).result()
        yield server
        io.submit(server.__aexit__(None, None, None)).result()


def test_measured_costs_stay_with_the_thread_that_measures(server, monkeypatch, capsys):
    threads = set()

    class Watched(Estimator):
        """Says which threads have touched it."""

        def __getattribute__(self, name):
            threads.add(threading.current_thread().name)
            return super().__getattribute__(name)

    def make(layers):
        made = Watched(layers)
        threads.clear()  # nobody else knows of it yet
        return made

    monkeypatch.setattr(compare_worker, "Estimator", make)
    specification = {
        "settings": SETTINGS,
        "steps": compare_worker.LEAST_STEPS,
        "addresses": {"layerwise": str(server.address)},
        "slowdown": 1.0,
        "trace": None,
    }

    assert compare_worker._work(specification) == 0

    assert threads == {"dynacomm-io"}
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["event"] for each in events if each["event"] != "progress"] == [
        "costs",
        "measured",
    ]
