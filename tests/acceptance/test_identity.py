"""The whole system is exact: under every plan, cut and split it ends with the very same bits."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import threadpoolctl  # comes with scikit-learn

from dynacomm_async.ranges import CELL_NBYTES
from dynacomm_async.schedule import PLANNERS

STEPS, LAYERS = 12, 5
NO_LAYERS = {"statistics", "model.name"}  # of what a saved run holds
N_WORKERS = (1, 2, 3)
OPTIONS = {
    "model": "lenet",
    "data": "synthetic:256:64",
    "batch": 8,
    "seed": 3,
    "steps": STEPS,
    "rate": 0.05,
    "rate_schedule": "cosine",
    "rule": "nesterov:0.9",
    "weight_decay": 0.01,
}


def run_python(module, *arguments):
    """Run a module of the library; what it prints is JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def options(**changes):
    chosen = {**OPTIONS, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]


@pytest.fixture(scope="module", params=N_WORKERS)
def comparison(request):
    """All strategies with a number of workers: what was found, and that number."""
    from dynacomm_async.cli import compare
    from dynacomm_async.cli.links import Fleet
    from dynacomm_async.cli.parser import Parser
    from dynacomm_async.link import LinkSettings

    parser = Parser(prog="", description="", epilog="")
    compare.add_arguments(parser)
    args = parser.parse_args([*options(), f"--workers={request.param}", "--json"])
    link = LinkSettings(rate_down_bytes_per_s=50e6, rate_up_bytes_per_s=50e6)
    fleet = Fleet((link,) * request.param, (1.0,) * request.param)
    return request.param, compare.compare(args, list(PLANNERS), fleet)


def replay(n_workers, **changes):
    """See :func:`replay_on_one_thread`; with the thread count that workers have."""
    with threadpoolctl.threadpool_limits(1):
        return replay_on_one_thread(n_workers, **changes)


def replay_on_one_thread(n_workers, **changes):
    """The same training in one process, written anew from the engine's and the rules' parts."""
    from dynacomm_async.data import Batches, load
    from dynacomm_async.models import build
    from dynacomm_async.optim import parse_rule, parse_schedule

    chosen = argparse.Namespace(**{**OPTIONS, **changes})
    network = build(chosen.model)
    train, _ = load(chosen.data, input_shape=network.input_shape, classes=10, seed=chosen.seed)
    batches = Batches(len(train), workers=n_workers, batch=chosen.batch, seed=chosen.seed)
    rule = parse_rule(chosen.rule)
    rates = parse_schedule(chosen.rate_schedule, base=chosen.rate, steps=chosen.steps)
    engine = network.bind(chosen.batch)
    engine.parameters[:] = network.initialise(chosen.seed)
    running = network.initial_statistics()
    states = [np.zeros_like(engine.parameters) for _ in range(rule.n_states)]
    losses = []
    for step in range(chosen.steps):
        gradients, statistics, step_losses = [], [], []
        for slot in range(n_workers):
            indices = batches.indices(slot, step)
            step_losses.append(engine.step(train.images[indices], train.labels[indices]))
            gradients.append(engine.gradients.copy())
            statistics.append(engine.batch_statistics.copy())
        losses.append(sum(step_losses) / n_workers)
        gradient, moments = mean_in_rank_order(gradients), mean_in_rank_order(statistics)
        start = 0
        for layer in network.layers:
            for first, last, decay in (
                (start, start + layer.decay, chosen.weight_decay),
                (start + layer.decay, start + layer.count, 0.0),
            ):
                part = slice(first, last)
                own = tuple(state[part] for state in states)
                rule.update(
                    engine.parameters[part],
                    gradient[part],
                    own,
                    step=step,
                    rate=rates.rate(step),
                    decay=decay,
                )
            start += layer.count
        running = running * np.float32(1 - np.float32(0.1)) + moments * np.float32(0.1)
    return engine.parameters, running, losses


def mean_in_rank_order(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / np.float32(len(parts))


def sha256(parameters):
    return hashlib.sha256(parameters.astype("<f4").tobytes()).hexdigest()


def test_every_strategy_gives_the_same_parameters_and_losses(comparison):
    _, found = comparison
    assert set(found.strategies) == set(PLANNERS)
    assert len({entry["parameters_sha256"] for entry in found.strategies.values()}) == 1
    losses = [entry["loss"] for entry in found.strategies.values()]
    assert losses == [losses[0]] * len(losses)


def test_the_parameters_are_those_of_a_single_process_bit_for_bit(comparison):
    n_workers, found = comparison
    parameters, _, losses = replay(n_workers)
    for entry in found.strategies.values():
        assert entry["parameters_sha256"] == sha256(parameters)
        assert entry["loss"] == losses


def plan_of(changes, step):
    return next(plan for first, plan in reversed(changes) if first <= step)


def check_messages_of_plans(counted, changes, direction, nbytes):
    """By step; the final parameters are pulled, too, but nothing is pushed for them."""
    assert list(counted) == [str(step) for step in range(STEPS + (direction == "pull"))]
    for step, n_messages in counted.items():
        planned = plan_of(changes, int(step))[direction]
        if isinstance(planned, list):
            assert n_messages == len(planned)
        else:  # a policy: as many as its cap asks for, at most one for each cell
            least = -(-nbytes // max(planned["cap_nbytes"] or nbytes, CELL_NBYTES))
            assert least <= n_messages <= -(-nbytes // CELL_NBYTES) + LAYERS


@pytest.mark.parametrize("strategy", PLANNERS)
def test_the_links_own_count_of_messages_is_that_of_the_plans(comparison, strategy):
    n_workers, found = comparison
    plans, links = found.plans[strategy], found.links[strategy]
    assert len(plans) == len(links) == n_workers
    nbytes = sum(layer["nbytes"] for layer in found.costs["layers"])

    for changes, counters in zip(plans, links, strict=True):
        up, down = counters["up"]["kinds"], counters["down"]["kinds"]
        check_messages_of_plans(up["GRADIENTS"]["steps"], changes, "push", nbytes)
        check_messages_of_plans(down["PARAMETERS"]["steps"], changes, "pull", nbytes)


@pytest.mark.parametrize("strategy", PLANNERS)
def test_nothing_else_travels_in_training(comparison, strategy):
    _, found = comparison
    for counters in found.links[strategy]:
        check_that_nothing_else_travelled(counters)


def check_that_nothing_else_travelled(counters):
    kinds = {way: counters[way]["kinds"] for way in ("up", "down")}
    counts = {
        way: Counter({name: tally["messages"] for name, tally in own.items()})
        for way, own in kinds.items()
    }
    # Beside parameters and gradients: meeting, timing the path, parting. No acks, no requests.
    del counts["up"]["GRADIENTS"], counts["down"]["PARAMETERS"]
    beats = counts["up"].pop("HEARTBEAT", 0)
    assert counts["down"].pop("HEARTBEAT", 0) == beats <= 8
    assert counts["up"].keys() <= {"HELLO", "JOIN", "LEAVE"}
    assert counts["down"].keys() <= {"WELCOME", "END"}
    assert max(*counts["up"].values(), *counts["down"].values()) == 1


def test_the_plans_are_those_that_the_saved_costs_give(comparison):
    from dynacomm_async.schedule import Costs, make_plan

    _, found = comparison
    costs = Costs.from_json(json.loads(json.dumps(found.costs)))
    for strategy in PLANNERS:
        _, last = found.plans[strategy][0][-1]
        plan = make_plan(strategy, costs).to_json()
        assert (last["pull"], last["push"]) == (plan["pull"], plan["push"])


@pytest.mark.parametrize(
    ("model", "n_workers", "rule"), [("resnet20", 2, "adamw"), ("lenet_smooth", 3, "momentum:0.9")]
)
def test_train_ends_with_the_bits_of_a_single_process(tmp_path, model, n_workers, rule):
    changes = {"model": model, "batch": 4, "steps": 4, "rule": rule, "data": "synthetic:64:16"}
    saved = tmp_path / "model.npz"

    result = run_python(
        "dynacomm_async.cli.main",
        "train",
        *options(**changes),
        f"--workers={n_workers}",
        f"--save={saved}",
        "--json",
    )

    parameters, running, losses = replay(n_workers, **changes)
    assert result["parameters_sha256"] == sha256(parameters)
    assert result["loss"] == losses[-1]
    with np.load(saved) as layers:
        assert layers["statistics"].tobytes() == running.tobytes()
        rest = [layers[name] for name in layers.files if name not in NO_LAYERS]
        assert np.concatenate(rest).tobytes() == parameters.tobytes()


@pytest.mark.parametrize(("n_workers", "data"), [(2, "digits"), (3, "synthetic:512:16")])
def test_workers_agree_with_one_that_takes_all_their_images_at_once(tmp_path, n_workers, data):
    changes = {"model": "lenet_smooth", "steps": 20, "data": data, "rule": "momentum:0.9"}
    saved = tmp_path / "model.npz"
    run_python(
        "dynacomm_async.cli.main",
        "train",
        *options(**changes),
        f"--workers={n_workers}",
        "--augment=none",
        f"--save={saved}",
        "--json",
    )

    whole, _, _ = replay(1, **{**changes, "batch": OPTIONS["batch"] * n_workers})
    with np.load(saved) as layers:
        parted = np.concatenate([layers[name] for name in layers.files if name not in NO_LAYERS])
    assert np.abs(parted - whole).max() / np.abs(whole).max() <= 1e-5
