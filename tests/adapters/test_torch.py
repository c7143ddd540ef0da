"""Any PyTorch module trains over the server, and ends with the bits of a single process."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError, LocalProtocolError, PeerError, ShapeError
from dynacomm_async.schedule import PLANNERS
from dynacomm_async.worker import Step

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from dynacomm_async.adapters.torch import TorchSession, layer_specs  # noqa: E402

nn, F = torch.nn, torch.nn.functional

pytestmark = pytest.mark.peers


def seeded(make):
    """The same module each time."""

    def make_seeded():
        torch.manual_seed(7)
        return make()

    return make_seeded


def numbers(step, rank):
    return torch.Generator().manual_seed(1000 * step + rank)


def images(step, rank, n=4, side=8):
    generator = numbers(step, rank)
    x = torch.randn(n, 3, side, side, generator=generator)
    return x, torch.randint(0, 10, (n,), generator=generator)


def image_loss(model, step, rank, side=8):
    x, y = images(step, rank, side=side)
    return F.cross_entropy(model(x), y)


def vectors(step, rank, n=6):
    return torch.randn(n, 5, generator=numbers(step, rank))


def vector_loss(model, step, rank):
    return model(vectors(step, rank)).square().mean()


def token_loss(model, step, rank):
    ids = torch.randint(0, 64, (2, 17), generator=numbers(step, rank))
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture
def resnet(make_run, zoo):
    make = seeded(lambda: zoo["resnet18"](width=8))
    return make_run(make, image_loss, images(0, 0)[0])


@pytest.fixture
def transformer(make_run, zoo):
    sample = torch.zeros(1, 16, dtype=torch.long)
    return make_run(seeded(zoo["Transformer"]), token_loss, sample)


@pytest.fixture
def smooth(make_run):
    """Convolutions without batch normalisation and without a kink."""
    make = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(144, 10),
        )
    )
    return make_run(make, image_loss, images(0, 0)[0])


@pytest.fixture
def small(make_run):
    """Three layers, of which nothing is special."""
    make = seeded(
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
        )
    )
    return make_run(make, vector_loss, vectors(0, 0), steps=3)


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", PLANNERS)
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_workers_end_with_the_bits_of_one_process_under_every_strategy(
    name, strategy, request, start_server, check_same
):
    run = request.getfixturevalue(name)
    sessions, result = run.train(start_server, strategy=strategy)

    check_same(sessions, run.replay(2))
    assert None not in result.losses


@pytest.fixture(scope="module")
def full_resnet(make_run, zoo):
    """ResNet-18 as it is, 11 million parameters, and what one process makes of it."""
    make = seeded(lambda: zoo["resnet18"]())
    run = make_run(make, lambda *args: image_loss(*args, side=32), images(0, 0, side=32)[0])
    return run, run.replay(2)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", PLANNERS)
def test_the_whole_resnet_18_ends_with_the_bits_of_one_process_under_every_strategy(
    strategy, full_resnet, start_server, check_same
):
    run, expected = full_resnet
    sessions, _ = run.train(start_server, strategy=strategy)

    check_same(sessions, expected)


def test_three_workers_without_a_sample_end_with_the_same_bits(resnet, start_server, check_same):
    resnet.sample = None
    sessions, _ = resnet.train(start_server, workers=3)

    check_same(sessions, resnet.replay(3))


@pytest.mark.parametrize("with_sample", [True, False])
@pytest.mark.parametrize("name", ["resnet", "transformer", "growing"])
def test_no_value_is_read_before_it_has_arrived_or_after_its_gradient_went(
    name, with_sample, request, make_run, start_server, check_same, monkeypatch
):
    run = make_run(seeded(Growing), vector_loss, vectors(0, 0))
    if name != "growing":
        run = request.getfixturevalue(name)
    if not with_sample:
        run.sample = None
    hand_over = Step.gradient_ready

    def poison(step, layer):
        step.session.parameters[step.session.slice_of(layer)] = np.nan
        hand_over(step, layer)

    monkeypatch.setattr(Step, "gradient_ready", poison)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the order of definition
        sessions, _ = run.train(start_server, strategy="layerwise")

    check_same(sessions, run.replay(2))


def both_sentences(model, step, rank):
    ids = [torch.randint(0, 64, (2, 17), generator=numbers(step, r)) for r in range(2)]
    whole = torch.cat(ids)
    logits = model(whole[:, :-1]).flatten(0, 1)
    F.cross_entropy(logits, whole[:, 1:].flatten()).backward()


def both_images(model, step, rank):
    x, y = (torch.cat(parts) for parts in zip(images(step, 0), images(step, 1), strict=True))
    F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize(
    ("name", "both"), [("transformer", both_sentences), ("smooth", both_images)]
)
def test_two_workers_agree_with_one_that_takes_both_batches_at_once(
    name, both, request, start_server
):
    run = request.getfixturevalue(name)
    sessions, _ = run.train(start_server)

    expected = run.replay(1, both).state_dict()
    for name, value in sessions[0].model.state_dict().items():
        assert (value - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


# -- what modules are like -----------------------------------------------------------------------


class Twice(nn.Module):
    """Uses a module twice, and one of its weights a third time as another's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.last = nn.Linear(5, 5)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(torch.tanh(self.first(x))))


class Partial(nn.Module):
    """Leaves one module out, and a parameter of another."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(5, 5)
        self.used = nn.Linear(5, 3)
        self.used.extra = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.used(x)


class Recomputing(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(5, 6)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.last(x)


class Growing(nn.Module):
    """Its layers are defined in another order than they are computed; a list holds some."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(4))])
        self.first = nn.Linear(5, 4)

    def forward(self, x):
        assert self.last.weight.dtype == torch.float32  # a question is not a use
        x = torch.tanh(self.first(x * self.scales[0])) * self.scales[1]
        return self.last(x)


def norms_everywhere():
    return nn.Sequential(
        nn.BatchNorm1d(5, affine=False),
        nn.Linear(5, 6),
        nn.BatchNorm1d(6, affine=False, momentum=None),
        nn.Tanh(),
        nn.Linear(6, 3),
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, track_running_stats=False),
    )


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        Partial,
        Growing,
        norms_everywhere,
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LazyLinear(3)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
        lambda: nn.Linear(5, 4, dtype=torch.float16).float(),
    ],
    ids=["used twice and tied", "unused", "order", "norms", "lazy", "parametrized", "plain"],
)
def test_special_modules_end_with_the_bits_of_one_process(make, make_run, start_server, check_same):
    def made():
        model = make()
        model(vectors(0, 0)) if any("Lazy" in type(m).__name__ for m in model.modules()) else None
        return model

    run = make_run(seeded(made), vector_loss, vectors(0, 0), steps=4)
    sessions, _ = run.train(start_server)

    check_same(sessions, run.replay(2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_change_nothing(reentrant, make_run, start_server, check_same):
    run = make_run(seeded(lambda: Recomputing(reentrant)), vector_loss, vectors(0, 0), steps=4)
    sessions, _ = run.train(start_server)
    run.make = seeded(lambda: Recomputing(False))

    check_same(sessions, run.replay(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # compiling has much to say
def test_a_compiled_module_trains_to_the_same_bits(small, start_server, check_same):
    make = small.make
    small.make = lambda: torch.compile(make(), backend="eager")
    sessions, _ = small.train(start_server, workers=1)
    small.make = make

    for session in sessions:
        session.model = session.model._orig_mod
    check_same(sessions, small.replay(1))


def test_dropout_and_data_of_a_step_are_functions_of_its_index(make_run, start_server):
    make = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    found = []
    for _ in range(2):
        run = make_run(make, vector_loss, vectors(0, 0), steps=4)

        def body(session, step, run=run):
            torch.manual_seed(step.index)
            run.body(session, step)

        _, result = run.train(start_server, workers=1, body=body)
        found.append(result.parameters_sha256)
    assert found[0] == found[1]


def test_frozen_layers_stay_where_they_are(make_run, start_server, check_same):
    def make():
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        return model

    run = make_run(seeded(make), vector_loss, vectors(0, 0), steps=3)
    sessions, result = run.train(start_server)

    assert result.parameters.size == 10
    check_same(sessions, run.replay(2))


def test_frozen_values_that_differ_are_refused(make_run, start_server):
    def make(value):
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)))()
        model[0].weight.requires_grad_(False).fill_(value)
        return model

    server = start_server(None, workers=2, steps=1)
    with (
        TorchSession(server.address, make(1.0)),
        TorchSession(server.address, make(2.0)) as second,
    ):

        def begin():
            steps = second.steps()
            next(steps)  # raises if the refusal is here already
            second.model(vectors(0, 0))

        with pytest.raises(PeerError, match="frozen parameters") as refused:
            begin()
    assert refused.value.code == "kernel-mismatch"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_parameters_are_rounded_copies_of_the_servers(
    dtype, make_run, start_server, check_same
):
    def loss(model, step, rank):
        return model(vectors(step, rank).to(dtype)).float().square().mean()

    make = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    run = make_run(lambda: make().to(dtype), loss, vectors(0, 0).to(dtype), steps=4)
    sessions, result = run.train(start_server)

    expected = run.replay(2)
    for session in sessions:
        for name, parameter in expected.named_parameters():
            assert torch.equal(session.model.get_parameter(name), parameter), name
    assert result.parameters.dtype == np.float32


# -- batch normalisation -------------------------------------------------------------------------


def test_running_statistics_are_moved_by_the_mean_of_the_workers_batches(make_run, start_server):
    make = seeded(lambda: nn.Sequential(nn.BatchNorm1d(5, momentum=0.7), nn.Linear(5, 2)))
    run = make_run(make, vector_loss, steps=2)
    sessions, result = run.train(start_server)

    mean, variance = np.zeros(5), np.ones(5)
    for step in range(2):
        batches = [vectors(step, rank).double().numpy() for rank in range(2)]
        mean = 0.9 * mean + 0.1 * np.mean([b.mean(0) for b in batches], axis=0)
        variance = 0.9 * variance + 0.1 * np.mean([b.var(0, ddof=1) for b in batches], axis=0)
    for session in sessions:
        norm = session.model[0]
        assert np.allclose(norm.running_mean.numpy(), mean, atol=1e-6)
        assert np.allclose(norm.running_var.numpy(), variance, atol=1e-6)
        assert norm.momentum == 0.7
    assert np.allclose(result.statistics, [*mean, *variance], atol=1e-6)


def test_a_normalisation_in_evaluation_keeps_its_statistics(make_run, start_server):
    def make():
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        model[1].running_mean.fill_(0.25)
        model[1].eval()
        return model

    run = make_run(seeded(make), vector_loss, vectors(0, 0), steps=3)
    sessions, _ = run.train(start_server)

    norm = sessions[0].model[1]
    assert torch.allclose(norm.running_mean, torch.full((4,), 0.25))
    assert torch.allclose(norm.running_var, torch.ones(4))


def test_a_normalisation_used_twice_sends_the_mean_of_both_batches(make_run, start_server):
    def loss(model, step, rank):
        a, b = vectors(step, rank), vectors(step, rank + 100) + 3
        return (model(a).square() + model(b).square()).mean()

    make = seeded(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)))
    run = make_run(make, loss, steps=1)
    sessions, _ = run.train(start_server, workers=1)

    means = [vectors(0, 0).mean(0), vectors(0, 100).mean(0) + 3]
    expected = 0.1 * (means[0] + means[1]) / 2
    assert torch.allclose(sessions[0].model[0].running_mean, expected, atol=1e-6)


def test_a_forward_that_fails_gives_the_normalisation_its_buffers_back(start_server):
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=0.3), nn.Linear(5, 2))
    own = model[0].running_mean
    server = start_server(None, workers=1, steps=1)
    with TorchSession(server.address, model) as session:
        steps = session.steps()
        next(steps)
        with pytest.raises(ValueError, match="more than 1 value"):
            model(torch.ones(1, 5))
    assert model[0].running_mean is own
    assert model[0].momentum == 0.3


# -- the loop's body -----------------------------------------------------------------------------


def test_accumulated_gradients_go_with_the_last_backward(resnet, start_server, check_same):
    def backward(model, step, rank, *, part=0):
        (image_loss(model, step, rank + 50 * part) / 2).backward()

    def body(session, step):
        with step.accumulate():
            backward(session.model, step.index, session.slot)
        backward(session.model, step.index, session.slot, part=1)

    def expected(model, step, rank):
        totals = None
        for part in range(2):
            backward(model, step, rank, part=part)
            now = [[b.clone() for b in (m.running_mean, m.running_var)] for m in norms_of(model)]
            totals = now if totals is None else totals
        for norm, before in zip(norms_of(model), totals, strict=True):
            for buffer, first in zip((norm.running_mean, norm.running_var), before, strict=True):
                buffer.copy_(first * 0.5 + buffer * 0.5)

    def norms_of(model):
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    sessions, _ = resnet.train(start_server, body=body)

    check_same(sessions, resnet.replay(2, expected))


def test_gradients_may_be_clipped_before_they_go(small, start_server, check_same):
    def clipped(model, step, rank):
        vector_loss(model, step, rank).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    def body(session, step):
        with step.accumulate():
            clipped(session.model, step.index, session.slot)

    sessions, _ = small.train(start_server, body=body)

    check_same(sessions, small.replay(2, clipped))


def test_evaluation_at_the_top_of_the_loop_changes_nothing(resnet, start_server, check_same):
    seen = []

    def body(session, step):
        session.model.eval()
        with torch.no_grad():
            seen.append(session.model(images(99, 0)[0]).isfinite().all().item())
        session.model.train()
        resnet.body(session, step)

    sessions, _ = resnet.train(start_server, body=body)

    check_same(sessions, resnet.replay(2))
    assert seen == [True] * 12


def test_before_and_after_a_run_the_module_is_an_ordinary_one(small, start_server):
    sessions, _ = small.train(start_server, workers=1)
    model = sessions[0].model

    assert all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.clone()
    vector_loss(model, 0, 0).backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
    small.make = lambda: model
    again, result = small.train(start_server, workers=1)
    assert np.isfinite(result.parameters).all()
    assert again[0].model is model


def test_a_parameter_that_is_read_outside_any_call_can_be_waited_for(
    make_run, start_server, check_same
):
    def loss(model, step, rank):
        return (vectors(step, rank) @ model.weight.T).square().mean()

    def body(session, step):
        step.wait()
        loss(session.model, step.index, session.slot).backward()

    run = make_run(seeded(lambda: nn.Linear(5, 3, bias=False)), loss, steps=5)
    sessions, _ = run.train(start_server, body=body)

    check_same(sessions, run.replay(2))


def twice(session, step):
    for _ in range(2):
        vector_loss(session.model, step.index, 0).backward(retain_graph=True)


def two_backwards(session, step):
    loss = vector_loss(session.model, step.index, 0)
    loss.backward(retain_graph=True)
    loss.backward()


def evaluate_late(session, step):
    vector_loss(session.model, step.index, 0).backward()
    with torch.no_grad():
        session.model(vectors(0, 0))


def optimize(session, step):
    vector_loss(session.model, step.index, 0).backward()
    torch.optim.SGD(session.model.parameters(), lr=0.1).step()


def clip_late(session, step):
    vector_loss(session.model, step.index, 0).backward()
    nn.utils.clip_grad_norm_(session.model.parameters(), 0.01)


def forget(session, step):
    vector_loss(session.model, step.index, 0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (twice, r"step 0: layer '0' is used after its gradient was handed over"),
        (two_backwards, r"step 0: parameter '4\.\w+' has yielded a gradient twice; put all"),
        (evaluate_late, r"step 0: layer '0' is used .*; evaluate, copy and save at the top of"),
        (optimize, r"step 0: parameter '0.weight' was changed here \(by an optimizer, or"),
        (clip_late, r"step 0: gradients were changed after .*; to clip them, run backward within"),
        (forget, r"step 0 has yielded no gradient: call loss.backward\(\) in the loop's body"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(body, words, small, start_server):
    server = start_server(None, workers=1, steps=2)
    with pytest.raises(LocalProtocolError, match=words):
        small.work(server.address, body)
    with pytest.raises(PeerError, match="left in step"):
        server.result()


class Turning(nn.Module):
    """Swaps two layers when told to, and leaves one out."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.order = [0, 1, 2]

    def forward(self, x):
        for index in self.order:
            x = torch.tanh(self.parts[index](x))
        return x


def test_layers_may_be_left_out_but_must_keep_their_order(make_run, start_server):
    orders = [[0, 1, 2], [0, 2], [2], [2, 1]]

    def body(session, step):
        session.model.order = orders[step.index]
        vector_loss(session.model, step.index, 0).backward()

    run = make_run(seeded(Turning), vector_loss, vectors(0, 0))
    server = start_server(None, workers=1, steps=4)
    with pytest.raises(LocalProtocolError, match=r"step 3: layer 'parts.2' was used before 'parts"):
        run.work(server.address, body)


def test_a_batch_normalised_behind_the_first_gradient_is_refused(start_server):
    model = nn.ModuleList([nn.Linear(5, 2), nn.BatchNorm1d(5)])
    server = start_server(None, workers=1, steps=1)
    with TorchSession(server.address, model) as session:
        steps = session.steps()
        next(steps)
        model[0](vectors(0, 0)).sum().backward()
        with pytest.raises(LocalProtocolError, match=r"'1' normalises a batch after the first"):
            model[1](vectors(0, 0))


# -- joining -------------------------------------------------------------------------------------


def test_the_order_of_definition_works_but_is_warned_of(make_run, start_server, check_same):
    run = make_run(seeded(Growing), vector_loss, steps=4)
    with pytest.warns(RuntimeWarning, match="pass sample= to learn the order"):
        sessions, _ = run.train(start_server)

    check_same(sessions, run.replay(2))


def test_a_worker_that_learnt_another_order_is_refused(start_server):
    server = start_server(None, workers=2, steps=1)
    with (
        TorchSession(server.address, seeded(Growing)(), vectors(0, 0)),
        pytest.raises(PeerError, match="not the server's: layer") as refused,
    ):
        TorchSession(server.address, seeded(Growing)()).__enter__()
    assert refused.value.code == "model-mismatch"


def test_weight_decay_applies_to_what_it_is_told_to():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    specs = layer_specs(model, decays=lambda name, parameter: parameter.ndim > 1)

    assert [(s.name, s.count, s.decay, s.statistics) for s in specs] == [
        ("0", 24, 20, 0),
        ("1", 8, 0, 8),
    ]


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: nn.Linear(2, 2).double(), ConfigError, "parameter 'weight' is torch.float64"),
        (lambda: nn.LazyLinear(2), ConfigError, "parameter 'weight' has no shape yet: pass sample"),
        (lambda: nn.Linear(2, 2, device="meta"), ConfigError, "'weight' is on the meta device"),
        (lambda: nn.Tanh(), ShapeError, "the model has no trainable parameters"),
        (lambda: 5, ConfigError, "a int, expected a torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_by_name(model, error, words):
    with pytest.raises(error, match=words):
        TorchSession("127.0.0.1:1", model())


def test_a_sparse_gradient_is_refused_by_name(start_server):
    model = nn.Embedding(5, 2, sparse=True)
    server = start_server(None, workers=1, steps=1)
    with TorchSession(server.address, model) as session:
        steps = session.steps()
        next(steps)
        with pytest.raises(ConfigError, match="the gradient of 'weight' is sparse"):
            model(torch.tensor([1])).sum().backward()
