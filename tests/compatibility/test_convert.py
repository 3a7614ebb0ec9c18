"""Conversion"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import srelu24
from srelu24.nn.modules import Linear24, SquaredReLUFFN
from srelu24_gen.errors import Unsupported

Distance = Callable[[Tensor, Tensor], float]
BF16 = 2e-2


class ChannelMix7(nn.Module):
    """RWKV-7 style: a time shift before squared ReLU, no gate."""

    def __init__(self, d: int = 32, f: int = 96) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.rand(d))
        self.key, self.value = nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shifted = functional.pad(x, (0, 0, 1, -1)) - x
        return self.value(torch.relu(self.key(x + shifted * self.x_k)) ** 2)


class ChannelMix4(ChannelMix7):
    """RWKV-4 style: the same with a receptance gate."""

    def __init__(self) -> None:
        super().__init__()
        self.receptance = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.receptance(x)) * super().forward(x)


class Nanochat(nn.Module):
    """nanochat and modded-nanogpt style."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(32, 96, bias=False), nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.relu(self.c_fc(x)).square())


class Dropping(Nanochat):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.5, self.training)


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x) ** 2


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 96), SquaredReLU(), nn.Linear(96, 32))


CASES = {
    "nanochat": (Nanochat, ("c_fc", "c_proj"), SquaredReLUFFN),
    "sequential": (sequential, ("0", "2"), SquaredReLUFFN),
    "RWKV-7 channel mix": (ChannelMix7, ("key", "value"), Linear24),
    "RWKV-4 channel mix": (ChannelMix4, ("key", "value"), Linear24),
    "dropout": (Dropping, ("c_fc", "c_proj"), Linear24),
}


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_masked_reference(case: str, x: Tensor, distance: Distance, masked: Callable[..., object]) -> None:
    """nanochat MLP, nn.Sequential, RWKV-4 and RWKV-7 channel mix, MLP with dropout: outputs of the masked model."""
    make, names, layer = CASES[case]
    model = nn.Sequential(make()).bfloat16().eval()
    with torch.no_grad():
        dense = model(x)
        with masked(model[0].get_submodule(names[1])):
            expected = model(x)
        report = srelu24.convert(model)
        y = model(x)
        assert isinstance(model[0] if layer is SquaredReLUFFN else model[0].get_submodule(names[1]), layer)
        assert distance(y, expected) < BF16 < 2 * BF16 < distance(y, dense)
        report.revert()
        assert torch.equal(model(x), dense)
        assert type(model[0].get_submodule(names[1])) is nn.Linear


@pytest.mark.parametrize("case", CASES)
def test_same_as_dense_where_nothing_is_dropped(case: str, x: Tensor, distance: Distance) -> None:
    """Where no group has more than two non-zeros, outputs are those of the dense model."""
    make, names, _ = CASES[case]
    model = nn.Sequential(make()).bfloat16().eval()
    with torch.no_grad():
        up = model[0].get_submodule(names[0])
        up.weight.view(-1, 4, 32)[:, 1::2] = 0
        if up.bias is not None:
            up.bias.view(-1, 4)[:, 1::2] = 0
        dense = model(x)
        assert len(srelu24.convert(model).converted) == 1
        assert distance(model(x), dense) < 5e-3


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 96), nn.Linear(32, 96)
        self.down = nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.gate(x)).square() * self.up(x))


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(32, 96), nn.Linear(96, 32), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def capped(h: Tensor) -> Tensor:
    return torch.relu(h).square().clamp(max=50.0)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Gated(), "gated: gate and up both feed down"),
        (Activated(functional.gelu), "its activation is GELU"),
        (Activated(functional.silu), "its activation is SiLU"),
        (Activated(torch.relu), "its activation is ReLU,"),
        (Activated(torch.square), "its activation is square"),
        (Activated(capped), "no squared ReLU"),
        (Activated(lambda h: torch.relu(h) * h.sigmoid()), "no squared ReLU"),
    ],
    ids=["gated", "gelu", "silu", "relu", "square", "capped", "other"],
)
def test_others_are_left_and_named(module: nn.Module, why: str) -> None:
    """Gated FFNs and other activations are left alone, and the report says what they are."""
    model = nn.ModuleDict({"block": module})
    before = model["block"]
    report = srelu24.convert(model)
    assert not report.converted
    assert why in report.left[0].why
    assert report.left[0].path == "block"
    assert model["block"] is before
    assert "left block" in str(report)


def test_names_prove_nothing() -> None:
    """Names and classes do not count: what the module computes does."""
    model = nn.Sequential(Activated(functional.gelu), Activated(lambda h: h.clamp(min=0).pow(2)))
    report = srelu24.convert(model)
    assert [done.path for done in report.converted] == ["1"]


def test_adapters_and_hooks_are_left(x: Tensor) -> None:
    """A layer that is more than nn.Linear, and a module with hooks, are left as they are."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Nanochat(), Nanochat()).bfloat16()
    model[0].c_fc = Doubled(32, 96, bias=False).bfloat16()
    model[1].register_forward_hook(lambda *_: None)
    report = srelu24.convert(model)
    assert "c_fc is a Doubled" in report.left[0].why
    assert [(done.layer, done.note) for done in report.converted] == [("linear24", "it has hooks")]


def test_weights_are_shared() -> None:
    """Parameters are the same objects before, during and after: optimizers and ties keep working."""
    model = nn.Sequential(Nanochat(), ChannelMix4())
    before = dict(model.named_parameters())
    report = srelu24.convert(model)
    converted = dict(model.named_parameters())
    assert converted.keys() == before.keys()
    assert all(converted[name] is before[name] for name in before)
    report.revert()
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_module_used_twice() -> None:
    """A module that sits in several places is swapped in all of them by one."""
    shared = Nanochat()
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = srelu24.convert(model)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], SquaredReLUFFN)
    report.revert()
    assert model["a"] is shared
    assert model["b"] is shared


class Named(Nanochat):
    """Hands its input over by keyword, as many models do."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(hidden_states=x)


def test_input_by_keyword(x: Tensor) -> None:
    """The input may be given by the name that the original's forward had for it; profile and compile take it too."""
    model = Block(Named()).bfloat16()
    before = srelu24.profile(model, x).layers
    assert len(srelu24.convert(model).converted) == 1
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y, x + model.mlp(x))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        for wrong in (lambda: model.mlp(x=x), lambda: model.mlp(), lambda: model.mlp(x, hidden_states=x)):
            with pytest.raises(Unsupported, match="takes its input alone, which may be called 'hidden_states'"):
                wrong()
        assert SquaredReLUFFN(32, 96, dtype=torch.bfloat16)(x=x).shape == x.shape
    assert srelu24.profile(model, x).layers == before


class Residual(Nanochat):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if residual is None else y + residual


def test_more_inputs_than_one(x: Tensor) -> None:
    """A module whose forward takes more than its input keeps its code; its second layer is swapped."""
    model = nn.ModuleList([Residual()]).bfloat16()
    report = srelu24.convert(model)
    assert [(done.layer, done.note) for done in report.converted] == [
        ("linear24", "its forward takes more than one input")
    ]
    with torch.no_grad():
        assert torch.equal(model[0](x, residual=x), model[0](x) + x)


def test_filter() -> None:
    """filter(name, module) decides, FFN by FFN."""
    model = nn.Sequential(Nanochat(), Nanochat())
    report = srelu24.convert(model, filter=lambda name, module: name == "1")
    assert [done.path for done in report.converted] == ["1"]
    assert report.left[0].why == "left by the filter"


def test_the_model_itself(x: Tensor, distance: Distance, masked: Callable[..., object]) -> None:
    """A bare FFN cannot be replaced in place: its second layer is."""
    model = Nanochat().bfloat16()
    with torch.no_grad():
        with masked(model.c_proj):
            expected = model(x)
        report = srelu24.convert(model)
        assert "cannot be replaced" in report.converted[0].note
        assert distance(model(x), expected) < BF16


class Reversed(nn.Module):
    """The second layer declared first."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(f, d), nn.Linear(d, f)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())


@pytest.mark.parametrize(("d", "f"), [(32, 96), (96, 32), (18432, 73728)])
def test_layers_in_any_order(d: int, f: int) -> None:
    """An FFN whose second layer is declared first, that narrows, or that is too wide to be copied."""
    with torch.device("meta"):
        model = nn.Sequential(Reversed(d, f))
    done = srelu24.convert(model).converted
    assert [(each.d_model, each.d_ff, each.layer) for each in done] == [(d, f, "ffn")]
    assert model[0].up.out_features == f
    assert list(dict(model[0].named_children())) == ["down", "up"]  # as its author declared them


def test_twice_and_on_meta() -> None:
    """Converting again changes nothing; a model on the meta device is converted too."""
    with torch.device("meta"):
        model = nn.Sequential(Nanochat(), Gated())
    assert len(srelu24.convert(model).converted) == 1
    assert model[0].up.weight.is_meta
    assert not srelu24.convert(model).converted


def test_a_whole_model_is_not_copied() -> None:
    """A module that holds far more than an FFN is left without a copy of it being run."""

    class Wrapped(Nanochat):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(2**18, 2048, device="meta")

        def __deepcopy__(self, memo: object) -> object:
            raise AssertionError("copied")

    report = srelu24.convert(nn.ModuleDict({"model": Wrapped()}))
    assert "far more than an FFN" in report.left[0].why


def test_random_state_is_kept() -> None:
    """Looking for FFNs leaves the random state and the model's weights and mode as they were."""
    model = nn.Sequential(Dropping(), Gated()).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    srelu24.convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_revert_keeps_training() -> None:
    """Revert gives the original modules with the layers as they are by then."""
    model = nn.Sequential(Nanochat())
    original = model[0]
    report = srelu24.convert(model)
    fresh = nn.Linear(32, 96, bias=False)
    model[0].c_fc = fresh
    report.revert()
    assert model[0] is original
    assert original.c_fc is fresh
