"""What people do with modules while they train, by habit or on purpose: it works, or is refused."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError, LocalProtocolError
from dynacomm_async.worker import Step

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from dynacomm_async.adapters.torch import TorchSession, layer_specs  # noqa: E402
from dynacomm_async.adapters.torch_checks import check_devices  # noqa: E402

nn, F = torch.nn, torch.nn.functional

pytestmark = pytest.mark.peers


def vectors(step, rank, n=6):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1000 * step + rank))


def vector_loss(model, step, rank):
    return model(vectors(step, rank)).square().mean()


def train(session, step):
    loss = vector_loss(session.model, step.index, session.slot)
    loss.backward()


def seeded(make):
    def make_seeded():
        torch.manual_seed(7)
        return make()

    return make_seeded


def dense():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.fixture
def small(make_run):
    return make_run(seeded(dense), vector_loss, vectors(0, 0), steps=3)


@pytest.fixture
def poison(monkeypatch):
    """A layer's values are NaN from its gradient on until the next ones arrive."""
    hand_over = Step.gradient_ready

    def spoil(step, layer):
        step.session.parameters[step.session.slice_of(layer)] = np.nan
        hand_over(step, layer)

    monkeypatch.setattr(Step, "gradient_ready", spoil)


# -- more kinds of modules -----------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(5, 4, num_layers=2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.cells(x.view(2, 3, 5))[0])


class Nested(nn.Module):
    """Containers in containers, and parameters that are read by name."""

    def __init__(self):
        super().__init__()
        parts = {"a": nn.ModuleList([nn.Linear(5, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4))])}
        self.parts = nn.ModuleDict(parts)
        self.scales = nn.ParameterDict({"one": nn.Parameter(torch.ones(4))})
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        for part in self.parts["a"]:
            x = part(x)
        return F.linear(x * self.scales["one"], self.weight)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(5, 1, batch_first=True)
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        x = x.view(2, 3, 5)
        return self.last(self.attend(x, x, x, need_weights=False)[0])


class Cut(nn.Module):
    """No gradient reaches its first layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.first(x).detach())


@pytest.mark.parametrize(
    "make",
    [Recurrent, Nested, Attending, Cut],
    ids=["LSTM", "nested", "attention", "detached"],
)
@pytest.mark.usefixtures("poison")
def test_modules_end_with_the_bits_of_one_process(make, make_run, start_server, check_same):
    run = make_run(seeded(make), vector_loss, vectors(0, 0), steps=4)
    sessions, _ = run.train(start_server, strategy="layerwise")

    check_same(sessions, run.replay(2))


def test_buffers_that_a_forward_pass_moves_stay_with_their_worker(
    make_run, start_server, check_same
):
    make = seeded(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)))
    run = make_run(make, vector_loss, vectors(0, 0), steps=4)
    sessions, _ = run.train(start_server, workers=1)

    check_same(sessions, run.replay(1))


# -- habits --------------------------------------------------------------------------------------


def narrowly(model, step, rank):
    with torch.autocast("cpu", torch.bfloat16):
        loss = vector_loss(model, step, rank).float()
    loss.backward()


def test_autocast_within_the_body_changes_nothing(small, start_server, check_same):
    sessions, _ = small.train(
        start_server, body=lambda session, step: narrowly(session.model, step.index, session.slot)
    )

    check_same(sessions, small.replay(2, narrowly))


def test_autocast_around_the_loop_keeps_no_copies_of_old_values(small, start_server, check_same):
    server = start_server(None, workers=1, steps=3, training=small.training)
    with (
        TorchSession(server.address, small.make(), small.sample) as session,
        torch.autocast("cpu", torch.bfloat16),
    ):
        for step in session.steps():
            loss = vector_loss(session.model, step.index, session.slot).float()
            loss.backward()

    check_same([session], small.replay(1, narrowly))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_zeroed_at_the_top_by_habit(set_to_none, small, start_server, check_same):
    def body(session, step):
        session.model.zero_grad(set_to_none=set_to_none)
        optimizer = torch.optim.SGD(session.model.parameters(), lr=0.1)
        optimizer.zero_grad(set_to_none=set_to_none)
        train(session, step)
        if set_to_none:
            optimizer.zero_grad()

    sessions, _ = small.train(start_server, body=body)

    check_same(sessions, small.replay(2))


def test_gradients_that_the_body_sets_itself_go_at_the_end_of_the_step(
    small, start_server, check_same
):
    def body(session, step):
        loss = vector_loss(session.model, step.index, session.slot)
        parameters = list(session.model.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient

    sessions, _ = small.train(start_server, body=body)

    check_same(sessions, small.replay(2))


def test_a_gradient_of_a_gradient_may_be_taken(make_run, start_server, check_same):
    def loss(model, step, rank):
        x = vectors(step, rank).requires_grad_()
        out = model(x).square().mean()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return out + slope.square().mean()

    run = make_run(seeded(dense), loss, vectors(0, 0), steps=3)
    sessions, _ = run.train(start_server)

    check_same(sessions, run.replay(2))


@pytest.mark.usefixtures("poison")
def test_attention_evaluates_by_its_fast_path_from_values_that_are_here(make_run, start_server):
    def make():
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
        )

    def inputs(step, rank):
        return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1000 * step + rank))

    seen = []

    def body(session, step):
        session.model.eval()
        with torch.inference_mode():
            seen.append(session.model(inputs(99, 0)))
        session.model.train()
        session.model(inputs(step.index, session.slot)).square().mean().backward()

    run = make_run(seeded(make), None, inputs(0, 0), steps=3)
    run.train(start_server, workers=1, body=body, strategy="layerwise")

    fresh = run.make().eval()
    with torch.inference_mode():
        assert torch.allclose(seen[0], fresh(inputs(99, 0)), atol=1e-6)
    assert all(out.isfinite().all() for out in seen)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # compiling has much to say
def test_a_module_compiled_in_place_trains_to_the_same_bits_in_pieces_that_stay(
    small, start_server, check_same
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run, make = small, small.make

    def compiled():
        model = make()
        model.compile(backend="aot_eager")
        return model

    run.make, run.steps = compiled, 12
    sessions, _ = run.train(start_server, workers=1)
    pieces = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run.make = make

    check_same(sessions, run.replay(1))
    assert 1 <= pieces <= 12  # of 5 modules; not one more in each step


def test_a_worker_that_compiles_and_one_that_does_not_have_the_same_layers():
    compiled = torch.compile(dense(), backend="eager")

    assert layer_specs(compiled) == layer_specs(dense())


# -- values read elsewhere -----------------------------------------------------------------------


class Changing(nn.Module):
    """Reads another module's weight, in some steps without calling that."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 4)
        self.by_hand = False

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return F.linear(x, self.last.weight) if self.by_hand else self.last(x)


def by_hand_later(session, step, *, wait):
    session.model.by_hand = step.index > 0
    if wait:
        step.wait()
    train(session, step)


@pytest.mark.parametrize("accumulating", [False, True])
def test_a_value_that_may_have_been_read_too_early_is_refused(accumulating, make_run, start_server):
    def body(session, step):
        with step.accumulate() if accumulating else nullcontext():
            by_hand_later(session, step, wait=False)

    run = make_run(seeded(Changing), vector_loss, vectors(0, 0), steps=3)
    server = start_server(None, workers=1, steps=3)
    with pytest.raises(LocalProtocolError, match=r"step 1: parameter 'last.weight' yields a grad"):
        run.work(server.address, body)


class Encoding(nn.Module):
    """Used by a method of its own, which reads a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(5, 4), nn.Parameter(torch.ones(4))

    def encode(self, x):
        return self.first(x) * self.scale


@pytest.mark.usefixtures("poison")
def test_methods_beside_forward_read_their_own_parameters_after_a_wait(
    make_run, start_server, check_same
):
    def loss(model, step, rank):
        return model.encode(vectors(step, rank)).square().mean()

    def waiting(session, step):
        step.wait()
        loss(session.model, step.index, session.slot).backward()

    run = make_run(seeded(Encoding), loss, lambda model: model.encode(vectors(0, 0)), steps=3)
    with pytest.raises(LocalProtocolError, match=r"step 0: parameter 'scale' yields a gradient"):
        run.work(start_server(None, workers=1, steps=3).address)
    sessions, _ = run.train(start_server, body=waiting, strategy="layerwise")

    check_same(sessions, run.replay(2))


@pytest.mark.usefixtures("poison")
def test_it_may_be_read_after_a_wait(make_run, start_server, check_same):
    run = make_run(seeded(Changing), vector_loss, vectors(0, 0), steps=3)
    sessions, _ = run.train(
        start_server,
        body=lambda *args: by_hand_later(*args, wait=True),
        strategy="layerwise",
    )

    def backward(model, step, rank):
        model.by_hand = step > 0
        vector_loss(model, step, rank).backward()

    check_same(sessions, run.replay(2, backward))


def test_a_penalty_on_a_parameter_that_no_module_reads_needs_a_wait(
    make_run, start_server, check_same
):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.held = nn.Linear(5, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    def loss(model, step, rank):
        return vector_loss(model, step, rank) + model.held.weight.square().sum()

    def waiting(session, step):
        out = vector_loss(session.model, step.index, session.slot)
        step.wait()
        (out + session.model.held.weight.square().sum()).backward()

    run = make_run(seeded(Held), loss, vectors(0, 0), steps=3)
    sessions, _ = run.train(start_server, body=waiting)

    check_same(sessions, run.replay(2))


# -- connections and accounts --------------------------------------------------------------------


def test_a_connection_that_is_reset_changes_nothing(small, start_server, start_link, check_same):
    fault = "reset:both@bytes=700,connection=0"
    server = start_server(None, workers=1, steps=3, training=small.training)
    link = start_link(server.address, fault)
    session = small.work(link.address)

    assert link.fired == {fault: 1}
    check_same([session], small.replay(1))


def test_hooks_say_what_they_took_apart_from_waits_and_copies(small, start_server):
    sessions, _ = small.train(start_server)

    for session in sessions:
        assert min(session.times.hooks_ns, session.times.copying_ns) > 0
        stalled_ns = sum(account.stalled_ns for account in session.session.metrics.steps)
        assert session.times.waiting_ns >= stalled_ns > 0  # which is the session's own account


# -- saving and copying --------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
def test_a_state_saved_within_the_loop_is_that_of_the_step(small, start_server, tmp_path):
    def body(session, step):
        model = session.model
        torch.save(model.state_dict(), tmp_path / f"{step.index}-{session.slot}.pt")
        torch.save(model[4].state_dict(), tmp_path / f"part-{step.index}-{session.slot}.pt")
        train(session, step)

    sessions, _ = small.train(start_server, body=body, strategy="layerwise")

    assert len(sessions) == 2
    for steps in range(3):
        small.steps = steps
        expected = small.replay(2).state_dict()
        for rank in range(2):
            found = torch.load(tmp_path / f"{steps}-{rank}.pt")
            assert list(found) == list(expected)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            part = torch.load(tmp_path / f"part-{steps}-{rank}.pt")
            assert torch.equal(part["weight"], expected["4.weight"])


def test_after_leaving_the_module_has_memory_of_its_own_and_is_saved_and_loaded(
    small, start_server, tmp_path
):
    safetensors = pytest.importorskip("safetensors.torch")
    sessions, result = small.train(start_server, workers=1)
    model = sessions[0].model

    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = dense()
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    found = np.concatenate([p.detach().numpy().ravel() for p in other.parameters()])
    assert found.tobytes() == result.parameters.tobytes()


def test_a_copy_made_within_the_loop_is_an_ordinary_module(small, start_server, check_same):
    copies = []

    def body(session, step):
        step.wait()
        copies.append(copy.deepcopy(session.model))
        pickled = io.BytesIO()
        torch.save(session.model, pickled)
        copies.append(torch.load(io.BytesIO(pickled.getvalue()), weights_only=False))
        train(session, step)

    sessions, _ = small.train(start_server, workers=1, body=body)

    check_same(sessions, small.replay(1))
    small.steps = 2
    expected = small.replay(1)
    for model in copies[-2:]:
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
        vector_loss(model, 0, 0).backward()
        assert model.state_dict()["0.weight"].isfinite().all()
        assert all(parameter.grad is not None for parameter in model.parameters())


# -- refused, with what to do --------------------------------------------------------------------


def save_late(session, step):
    train(session, step)
    session.model.state_dict()


def wait_late(session, step):
    train(session, step)
    step.wait()


def load(session, step):
    session.model.load_state_dict(dense().state_dict())
    train(session, step)


def zero_late(session, step):
    train(session, step)
    session.model.zero_grad(set_to_none=False)


def replace(session, step):
    session.model[4] = nn.Linear(4, 3)
    train(session, step)


def add(session, step):
    session.model.extra = nn.Parameter(torch.ones(1))
    train(session, step)


def freeze(session, step):
    session.model[0].weight.requires_grad_(False)
    train(session, step)


def convert(session, step):
    session.model.to(torch.bfloat16).float()
    train(session, step)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (save_late, r"step 0: layer '0' is used after .*evaluate, copy and save at the top of"),
        (wait_late, r"step 0: layer '0' is used after .*evaluate, copy and save at the top of"),
        (load, r"step 0: parameter '0.weight' was changed .*values are loaded before TorchSession"),
        (zero_late, r"step 0: gradients were changed .*zero_grad, which is not needed here"),
        (replace, r"step 0: the parts of module 'Sequential' have changed .*; change a model bef"),
        (add, r"step 0: the parts of module 'Sequential' have changed .*; change a model before"),
        (freeze, r"step 0: parameter '0.weight' was frozen during the run.*; set requires_grad b"),
        (convert, r"step 0: parameter '0.weight' was moved or converted .*; do so before"),
    ],
)
def test_what_breaks_the_run_is_refused_with_what_to_do(body, words, small, start_server):
    server = start_server(None, workers=1, steps=2)
    with pytest.raises(LocalProtocolError, match=words):
        small.work(server.address, body)


def test_what_was_frozen_must_not_thaw_during_the_run(make_run, start_server):
    def make():
        model = dense()
        model[0].requires_grad_(False)
        return model

    def body(session, step):
        session.model[0].requires_grad_(step.index > 0)
        train(session, step)

    server = start_server(None, workers=1, steps=2)
    run = make_run(seeded(make), vector_loss, vectors(0, 0))
    with pytest.raises(LocalProtocolError, match=r"step 1: parameter '0.weight' began to be train"):
        run.work(server.address, body)


def test_between_joining_and_the_first_step_the_module_cannot_be_used(small, start_server):
    server = start_server(None, workers=1, steps=1)
    with TorchSession(server.address, small.make(), small.sample) as session:
        for use in (lambda: session.model(vectors(0, 0)), session.model.state_dict):
            with pytest.raises(LocalProtocolError, match="used outside the loop over"):
                use()


def test_a_module_belongs_to_one_session_at_a_time(small, start_server):
    server = start_server(None, workers=2, steps=1)
    model = small.make()
    with (
        TorchSession(server.address, model),
        pytest.raises(LocalProtocolError, match="belongs to another session; leave that first"),
        TorchSession(server.address, nn.Sequential(model)),
    ):
        pass


def spread():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


def aliased():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: nn.DataParallel(dense()),
            "the model is a DataParallel, which .*; pass the module",
        ),
        (lambda: nn.Sequential(nn.DataParallel(dense())), "module '0' is a DataParallel, which"),
        (lambda: torch.jit.script(nn.Tanh()), "the model is a TorchScript module, which"),
        (
            spread,
            r"parameter '1.weight' is on the meta device, which holds no values; call model.to",
        ),
        (aliased, r"parameters '0.weight' and '1.weight' are two that share their memory; to tie"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "'weight' is torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_models_that_cannot_be_trained_are_refused_by_name(make, words):
    with pytest.raises(ConfigError, match=words):
        TorchSession("127.0.0.1:1", make())


def test_a_model_on_several_devices_is_refused_by_name():
    """Where they are is all that is asked, so that no such devices are needed here."""
    trained = [(name, SimpleNamespace(device=name[:6])) for name in ("cuda:0.a", "cuda:0.b", "cpu")]
    check_devices(trained[:2])
    with pytest.raises(ConfigError, match=r"spread over devices \('cuda:0.a' on cuda:0, 'cpu' on"):
        check_devices(trained)


DISTRIBUTED = """
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor, init_device_mesh

from dynacomm_async.adapters.torch import TorchSession
from dynacomm_async.errors import ConfigError

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
sharded = nn.Linear(2, 2)
sharded.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh))
for model in (
    nn.parallel.DistributedDataParallel(nn.Linear(2, 2)),
    fully_shard(nn.Linear(2, 2), mesh=mesh),
    sharded,
):
    try:
        TorchSession("127.0.0.1:1", model)
    except ConfigError as error:
        print(error)
distributed.destroy_process_group()
"""


@pytest.mark.soak  # it takes twenty seconds where cores are busy; DataParallel goes the same way
def test_models_of_pytorchs_own_distribution_are_refused_by_name():
    """In a process of its own, since gloo leaves sockets behind."""
    done = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()

    assert len(found) == 3
    assert "the model is a DistributedDataParallel, which averages gradients" in found[0]
    assert "the model is a FSDPModule, which keeps only a part of each parameter" in found[1]
    assert "parameter 'weight' is a DTensor, which has no memory of its own" in found[2]
