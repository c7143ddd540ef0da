"""Checkpoints: what is saved comes back bit for bit, and what is torn never does."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from dynacomm_async.errors import CheckpointError, ConfigError, ShapeError
from dynacomm_async.server.checkpoint import Checkpoints
from dynacomm_async.wire.grid import LayerSpec

SEED = 20

BIT_PATTERNS = [
    *(0x7FC00001, 0xFFC12345, 0x7F800001, 0xFFBFFFFF, 0x7FFFFFFF, 0xFFFFFFFF),  # NaNs
    *(0x7F800000, 0xFF800000),  # infinities
    *(0x80000000, 0, 1, 0x807FFFFF),  # zeros and denormals
    *(0x7F7FFFFF, 0xFF7FFFFF, 0x00800000, 0x3F800000, 0xBF800001, 0x33333333),
]


def put_back(directory, pristine):
    for name in ("000001-step-10", "000002-step-20"):
        shutil.rmtree(directory / name, ignore_errors=True)
        shutil.copytree(pristine / name, directory / name)


@pytest.fixture
def two(tmp_path, draw_state):
    """An open directory of two checkpoints, their states, and a copy of the files."""
    states = [draw_state(10), draw_state(20)]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for state in states:
            checkpoints.save(state)
        shutil.copytree(checkpoints.directory, tmp_path / "pristine")
        yield checkpoints, states, tmp_path / "pristine"


def newest_files(directory):
    return sorted((directory / "000002-step-20").iterdir())


def test_a_state_comes_back_bit_for_bit(tmp_path, draw_state, content):
    state = draw_state(7, n_states=2, versions=np.arange(-2, 4, dtype=np.int64))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path) as checkpoints:
        assert content(checkpoints.load()) == content(state)


@pytest.mark.parametrize("layers", [(LayerSpec("w", 1),), (LayerSpec("w", 9000, 4, 4097),)])
@pytest.mark.parametrize("n_states", [0, 1, 2])
def test_models_without_statistics_or_optimizer_states_come_back(
    tmp_path, draw_state, content, layers, n_states
):
    state = draw_state(3, layers=layers, n_states=n_states)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        assert content(checkpoints.load()) == content(state)


def test_every_pattern_of_bits_comes_back_nan_payloads_included(tmp_path, draw_state, content):
    bits = np.array(BIT_PATTERNS, np.uint32)
    odd = bits.view(np.float32)
    state = draw_state(1, parameters=odd, optimizer=(odd[::-1].copy(),))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        loaded = checkpoints.load()
    assert content(loaded) == content(replace(state, healthy=False))


def test_vectors_that_are_strided_views_are_saved_as_their_values(tmp_path, draw_state, content):
    wide = np.arange(36, dtype=np.float32)
    state = draw_state(1, parameters=wide[::2])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        assert content(checkpoints.load()) == content(state)


def test_a_copy_shares_no_memory(draw_state, content):
    state = draw_state(1, versions=np.zeros(3, np.int64))
    copied = state.copy()
    assert content(copied) == content(state)
    for vector in (state.parameters, state.statistics, *state.optimizer, state.versions):
        vector[:] = 9
    assert content(copied) == content(draw_state(1, versions=np.zeros(3, np.int64)))


def test_other_tools_read_the_files_and_find_the_layers(tmp_path, draw_state):
    state = draw_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        path = checkpoints.save(state)
    tensors = load_file(path / "parameters.safetensors")
    assert set(tensors) == {"conv1", "norm", "dense/ü"}
    np.testing.assert_array_equal(tensors["conv1"], state.parameters[:7])
    np.testing.assert_array_equal(tensors["dense/ü"], state.parameters[9:])
    assert load_file(path / "statistics.safetensors")["norm"].shape == (0,)


def test_an_empty_directory_has_nothing_to_load(tmp_path):
    with Checkpoints(tmp_path / "not" / "yet" / "there") as checkpoints:
        assert checkpoints.load() is None
        assert checkpoints.list() == ()


def assert_falls_back(two, content, caplog, what):
    checkpoints, states, _ = two
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dynacomm_async.server"):
        loaded = checkpoints.load()
    assert content(loaded) == content(states[0]), what
    assert len(caplog.records) == 1, what
    assert "000002-step-20 skipped: " in caplog.text


@pytest.mark.parametrize(
    "every", [5, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_a_file_cut_at_any_offset_is_never_loaded(two, content, caplog, every):
    checkpoints, _, pristine = two
    cuts = 0
    for path in newest_files(checkpoints.directory):
        whole = path.read_bytes()
        for length in range(0, len(whole), every):
            path.write_bytes(whole[:length])
            assert_falls_back(two, content, caplog, (path.name, length))
            cuts += 1
        path.write_bytes(whole)
    assert cuts > 1000 // every
    put_back(checkpoints.directory, pristine)
    assert checkpoints.load().step == 20


def test_a_flipped_bit_in_any_fifth_byte_is_never_loaded(two, content, caplog):
    checkpoints, _, _ = two
    numbers = random.Random(SEED)
    for path in newest_files(checkpoints.directory):
        whole = path.read_bytes()
        for place in range(numbers.randrange(5), len(whole), 5):
            torn = bytearray(whole)
            torn[place] ^= 1 << numbers.randrange(8)
            path.write_bytes(torn)
            assert_falls_back(two, content, caplog, (SEED, path.name, place))
        path.write_bytes(whole)
    assert checkpoints.load().step == 20


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_any_flipped_bit_of_any_byte_is_never_loaded(two, content, caplog):
    """The long form: every bit."""
    checkpoints, _, _ = two
    flips = 0
    for path in newest_files(checkpoints.directory):
        whole = path.read_bytes()
        for place in range(len(whole)):
            for bit in range(8):
                torn = bytearray(whole)
                torn[place] ^= 1 << bit
                path.write_bytes(torn)
                assert_falls_back(two, content, caplog, (path.name, place, bit))
                flips += 1
        path.write_bytes(whole)
    assert flips > 8000
    assert checkpoints.load().step == 20


def test_zeros_or_garbage_behind_any_offset_are_never_loaded(two, content, caplog):
    # What a file system may leave of a file that was not flushed: the length without the bytes.
    checkpoints, _, _ = two
    numbers = random.Random(SEED)
    for path in newest_files(checkpoints.directory):
        whole = path.read_bytes()
        for place in sorted(numbers.sample(range(len(whole) - 4), 20)):
            for rest in (bytes(len(whole) - place), numbers.randbytes(len(whole) - place + 5)):
                path.write_bytes(whole[:place] + rest)
                assert_falls_back(two, content, caplog, (SEED, path.name, place))
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "times", [60, pytest.param(3000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_a_larger_one_cut_or_flipped_at_random_is_never_loaded(
    tmp_path, draw_state, content, caplog, times
):
    numbers = random.Random(SEED)
    layers = (LayerSpec("a", 40_000, 10, 0), LayerSpec("b", 70_001, 0, 333))
    states = [draw_state(step, layers=layers, n_states=2) for step in (10, 20)]
    with Checkpoints(tmp_path) as checkpoints:
        for state in states:
            checkpoints.save(state)
        for _ in range(times):
            path = numbers.choice(newest_files(tmp_path))
            whole = path.read_bytes()
            place = numbers.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[place] ^= 1 << numbers.randrange(8)
            for torn in (whole[:place], flipped):
                path.write_bytes(torn)
                assert_falls_back((checkpoints, states, None), content, caplog, (SEED, place))
            path.write_bytes(whole)
        assert content(checkpoints.load()) == content(states[1])


def test_a_missing_file_is_noticed_whichever_it_is(two, content, caplog):
    checkpoints, _, _ = two
    for path in newest_files(checkpoints.directory):
        whole = path.read_bytes()
        path.unlink()
        assert_falls_back(two, content, caplog, path.name)
        path.write_bytes(whole)


def test_files_of_two_checkpoints_never_pass_for_one(two, content, caplog):
    checkpoints, states, pristine = two
    names = [path.name for path in newest_files(checkpoints.directory)]
    for chosen in range(1, 2 ** len(names)):
        foreign = [name for bit, name in enumerate(names) if chosen >> bit & 1]
        for name in foreign:
            source = pristine / "000001-step-10" / name
            shutil.copy(source, checkpoints.directory / "000002-step-20" / name)
        assert_falls_back(two, content, caplog, foreign)
        put_back(checkpoints.directory, pristine)
    assert content(checkpoints.load()) == content(states[1])


def test_the_whole_of_another_checkpoint_under_a_false_name_is_refused(two, content, caplog):
    checkpoints, _, pristine = two
    shutil.rmtree(checkpoints.directory / "000002-step-20")
    shutil.copytree(pristine / "000001-step-10", checkpoints.directory / "000002-step-20")
    assert_falls_back(two, content, caplog, "false name")
    assert "is that of 000001-step-10" in caplog.text


def test_a_save_without_its_rename_is_not_there_and_is_cleaned_up(two, content):
    checkpoints, states, pristine = two
    directory = checkpoints.directory
    shutil.rmtree(directory / "000002-step-20")
    left = directory / ".saving-000002-step-20"
    shutil.copytree(pristine / "000002-step-20", left)
    assert content(checkpoints.load()) == content(states[0])
    checkpoints.close()
    with Checkpoints(directory):
        assert not left.exists()


def test_if_none_is_good_it_is_an_error_and_not_a_fresh_start(two):
    checkpoints, _, _ = two
    for path in checkpoints.directory.glob("*/checkpoint.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* move them away"):
        checkpoints.load()


def test_after_falling_back_the_next_save_is_the_newest(two, content, draw_state):
    checkpoints, states, _ = two
    (checkpoints.directory / "000002-step-20" / "parameters.safetensors").write_bytes(b"")
    assert content(checkpoints.load()) == content(states[0])
    again = draw_state(15)
    assert checkpoints.save(again).name == "000003-step-15"
    assert content(checkpoints.load()) == content(again)


def test_the_last_ones_are_kept(tmp_path, draw_state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(draw_state(step))
        assert [found.step for found in checkpoints.list()] == [3, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["parameters", "statistics", "optimizer"])
def test_a_value_that_is_not_finite_is_never_healthy(tmp_path, draw_state, value, where):
    state = draw_state(1)
    vector = state.optimizer[0] if where == "optimizer" else getattr(state, where)
    vector[-1] = value
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        (found,) = checkpoints.list()
    assert state.healthy
    assert found.healthy is False


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_healthy_one_is_never_rotated_away(tmp_path, draw_state, content, keep):
    poison = np.full(18, np.nan, np.float32)
    with Checkpoints(tmp_path, keep=keep) as checkpoints:
        checkpoints.save(draw_state(1))
        good = draw_state(2)
        checkpoints.save(good)
        for step in range(3, 10):
            checkpoints.save(draw_state(step, parameters=poison, healthy=step % 2 == 0))
        steps = [found.step for found in checkpoints.list()]
        assert steps == [2, *range(10 - keep, 10)]
        assert content(checkpoints.load(healthy=True)) == content(good)
        assert checkpoints.load().step == 9
        checkpoints.save(draw_state(10))
        assert 2 not in [found.step for found in checkpoints.list()], "a newer one is healthy"


def test_torn_ones_do_not_count_and_go_with_time(tmp_path, draw_state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            path = checkpoints.save(draw_state(step))
        (path / "checkpoint.json").write_text("{}")
        checkpoints.save(draw_state(4))
        assert [found.step for found in checkpoints.list()] == [2, 3, 4]
        checkpoints.save(draw_state(5))
        assert [found.step for found in checkpoints.list()] == [4, 5]


def test_one_that_may_be_the_last_healthy_one_stays_while_it_cannot_be_read(tmp_path, draw_state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        path = checkpoints.save(draw_state(1))
        text = (path / "checkpoint.json").read_bytes()
        (path / "checkpoint.json").unlink()
        checkpoints.save(draw_state(2, healthy=False))
        checkpoints.save(draw_state(3, healthy=False))
        (path / "checkpoint.json").write_bytes(text)
        assert [found.step for found in checkpoints.list()] == [1, 3]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"run": "run-2"}, "checkpoints of run 'run-1', not of 'run-2'; resume that one"),
        ({"layers": (LayerSpec("conv1", 18, 5, 5),)}, "another model .3 layers .* 1 layers"),
        ({"rule": "Adam()"}, "the update rule SGD.* not Adam"),
    ],
)
def test_a_directory_of_another_run_model_or_rule_is_refused(tmp_path, draw_state, change, match):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(draw_state(1))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ConfigError, match=match):
            checkpoints.load(**change)
        with pytest.raises(ConfigError, match=match):
            checkpoints.save(replace(draw_state(2), **change))
        assert [found.step for found in checkpoints.list()] == [1]
        same = draw_state(2)
        assert checkpoints.load(run=same.run, layers=same.layers, rule=same.rule).step == 1


def test_a_directory_is_one_servers_alone(tmp_path):
    code = (
        "import sys; from dynacomm_async.server.checkpoint import Checkpoints\n"
        f"held = Checkpoints({str(tmp_path)!r}); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="in use by another server; stop it, or"):
            Checkpoints(tmp_path)
        child.kill()
        child.wait()
    with Checkpoints(tmp_path), pytest.raises(ConfigError, match="in use"):
        Checkpoints(tmp_path)
    Checkpoints(tmp_path).close()


@pytest.mark.parametrize("settings", [{"a": (1,)}, {1: 2}, {"a": float("nan")}, {"a": object()}])
def test_settings_that_would_come_back_changed_are_refused(tmp_path, draw_state, settings):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ConfigError, match="must be plain values"):
            checkpoints.save(draw_state(1, settings=settings))
        assert checkpoints.list() == ()


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": np.zeros(17, np.float32)},
        {"parameters": np.zeros(18, np.float64)},
        {"statistics": np.zeros((5, 1), np.float32)},
        {"optimizer": (np.zeros(19, np.float32),)},
        {"versions": np.zeros(3, np.int32)},
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path, draw_state, change):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ShapeError, match="expected"):
            checkpoints.save(draw_state(1, **change))
        assert checkpoints.list() == ()


def test_a_layer_cannot_have_the_name_of_the_formats_own_table(tmp_path, draw_state):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError, match="__metadata__"):
        checkpoints.save(draw_state(1, layers=(LayerSpec("__metadata__", 2),)))


def test_nothing_can_be_kept_with_keep_0(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_incarnations_only_grow_whatever_is_lost(tmp_path, draw_state):
    with Checkpoints(tmp_path) as checkpoints:
        assert [checkpoints.next_incarnation() for _ in range(2)] == [1, 2]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.next_incarnation() == 3
        checkpoints.save(draw_state(1, incarnation=9))
        assert checkpoints.next_incarnation() == 10
        (tmp_path / ".incarnation").write_bytes(b"\0\0")
        assert checkpoints.next_incarnation() == 10, "from the checkpoint"
        (tmp_path / ".incarnation").unlink()
        assert checkpoints.next_incarnation() == 10
