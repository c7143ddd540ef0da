"""What is learnt of a module before it trains: its layers, their order, who reads them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from dynacomm_async.adapters.torch_model import ModelTable  # noqa: E402
from dynacomm_async.adapters.torch_watch import follow, try_out  # noqa: E402

nn = torch.nn

pytestmark = pytest.mark.peers


def needs_by_name(model, seen):
    table = ModelTable(model, seen)
    names = {module: name for name, module in model.named_modules()}
    layers = [spec.name for spec in table.specs]
    return {
        names[module]: [layers[layer] for layer in needed]
        for module, needed in table.needs(seen).items()
    }


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        assert self.last.weight.shape == (2, 3)
        assert self.last.weight.device.type == "cpu"
        return self.last(self.first(x) * self.scale)


def test_layers_are_in_the_order_in_which_they_are_first_read():
    model = Backwards()
    defined = [spec.name for spec in ModelTable(model).specs]
    learnt = [spec.name for spec in ModelTable(model, try_out(model, torch.ones(1, 3))).specs]

    assert defined == ["(root)", "last", "first"]
    assert learnt == ["first", "(root)", "last"]


def test_the_order_of_definition_is_told_from_that_of_use():
    model = Backwards()
    with follow(model) as seen:
        model(torch.ones(1, 3))

    assert not ModelTable(model).is_order_of(seen)
    assert ModelTable(model, seen).is_order_of(seen)


def test_attention_needs_the_projection_that_it_reads_and_never_calls(zoo):
    model = zoo["Transformer"](blocks=1)
    needed = needs_by_name(model, try_out(model, torch.zeros(1, 16, dtype=torch.long)))

    assert needed["blocks.0.self_attn"] == ["blocks.0.self_attn", "blocks.0.self_attn.out_proj"]
    assert needed["head"] == ["embed"]  # tied
    assert needed[""] == ["(root)"]


def test_a_module_needs_no_more_than_it_reads(zoo):
    model = zoo["resnet18"](width=8)
    needed = needs_by_name(model, try_out(model, torch.zeros(2, 3, 32, 32)))

    assert all(layers == [name] for name, layers in needed.items())
    assert len(needed) == 41


def test_statistics_without_parameters_belong_to_the_layer_before():
    model = nn.Sequential(
        nn.BatchNorm1d(3, affine=False),
        nn.Linear(3, 4),
        nn.BatchNorm1d(4, affine=False),
        nn.Linear(4, 2),
        nn.BatchNorm1d(2),
    )
    for seen in (None, try_out(model, torch.randn(5, 3))):
        table = ModelTable(model, seen)
        assert [(spec.name, spec.statistics) for spec in table.specs] == [
            ("1", 14),
            ("3", 0),
            ("4", 4),
        ]
        assert [norm.name for norm in table.norms] == ["0", "2", "4"]
        assert table.initial_statistics().tolist() == [
            *([0] * 3 + [1] * 3),
            *([0] * 4 + [1] * 4),
            *([0] * 2 + [1] * 2),
        ]


@pytest.mark.parametrize(
    "sample",
    [torch.ones(4, 3), (torch.ones(4, 3),), lambda model: model(torch.ones(4, 3))],
    ids=["tensor", "arguments", "function"],
)
def test_trying_a_module_out_leaves_no_trace(sample):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    random = torch.get_rng_state()
    seen = try_out(model, sample)

    assert [parameter.shape for parameter in seen.order()] == [
        parameter.shape for parameter in model.parameters()
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_sample_that_fails_leaves_no_trace_either():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        try_out(model, torch.ones(2, 3))

    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_must_be_alike_beside_the_table_is_told_in_a_few_letters():
    def table(change):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        change(model)
        return ModelTable(model)

    def freeze(model, value=1.0):
        model[0].requires_grad_(False)
        model[0].bias.fill_(value)

    same = [table(lambda model: None).kernels() for _ in range(2)]
    turned = table(lambda model: setattr(model, "0", nn.Linear(3, 4, dtype=torch.float16)))
    frozen = [table(lambda model, v=value: freeze(model, v)).kernels() for value in (1, 1, 2)]

    assert same[0] == same[1] != turned.kernels()
    assert frozen[0] == frozen[1] != frozen[2]
    assert "frozen parameters" in frozen[0]
