"""Kinds of layers and modules that convert takes"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import srelu24
from srelu24.nn.modules import Conv1D24, Linear24, SquaredReLUFFN
from srelu24_gen.errors import Unsupported

Distance = Callable[[Tensor, Tensor], float]
BF16 = 2e-2


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", srelu24.FallbackWarning)
        yield


def keep_two_of_four(a: Tensor) -> Tensor:
    groups = a.unflatten(-1, (-1, 4))
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return (groups * torch.zeros_like(groups).scatter_(-1, kept, 1.0)).flatten(-2)


def pruned(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """The masked reference on the weights in the type of x."""
    w1, w2, b1, b2 = (None if t is None else t.to(x.dtype) for t in (w1, w2, b1, b2))  # type: ignore[assignment]
    return functional.linear(keep_two_of_four(functional.linear(x, w1, b1).relu().square()), w2, b2)


class CastLinear(nn.Linear):
    """As nanochat's: float32 weights, products in the type of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class TypedLinear(nn.Linear):
    """The same in the words of modded-nanogpt."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.type_as(x))


class SameLinear(nn.Linear):
    """Says what nn.Linear says."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class MLP(nn.Module):
    def __init__(self, linear: type[nn.Linear], bias: bool = False) -> None:
        super().__init__()
        self.c_fc, self.c_proj = linear(32, 96, bias=bias), linear(96, 32, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.relu(self.c_fc(x)).square())


class GatedMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("linear", [CastLinear, TypedLinear, SameLinear])
@pytest.mark.parametrize("block", [MLP, GatedMLP])
def test_linear_subclasses(linear: type[nn.Linear], block: type[MLP], distance: Distance) -> None:
    """Subclasses of nn.Linear that cast weights to the type of x, or say it in other words: pruned, and back."""
    net = nn.Sequential(block(linear))
    if linear is SameLinear:
        net.bfloat16()
    x = torch.randn(3, 5, 32).bfloat16()
    factor = 2 if block is GatedMLP else 1
    with torch.no_grad(), no_warning():
        dense, reference = net(x), factor * pruned(x, net[0].c_fc.weight, net[0].c_proj.weight)
        report = srelu24.convert(net)
        assert [done.layer for done in report.converted] == ["linear24" if factor == 2 else "ffn"]
        y = net(x)
        assert y.dtype == torch.bfloat16
        assert distance(y, reference) < BF16 < 2 * BF16 < distance(y, dense)
        assert torch.equal(copy.deepcopy(net)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
        assert isinstance(net[0].c_proj, linear)
        report.revert()
        assert type(net[0].c_proj) is linear
        assert torch.equal(net(x), dense)


def test_training_of_casting_layers() -> None:
    """Float32 weights that are cast train, dense and by a recipe, with gradients in float32."""
    net, x = nn.Sequential(MLP(CastLinear, True)), torch.randn(16, 32).bfloat16()
    net(x).float().square().mean().backward()
    expected = [p.grad for p in net.parameters()]
    for recipe in (None, srelu24.Recipe(warmup_steps=9)):
        net.zero_grad()
        report = srelu24.convert(net, recipe=recipe)
        assert len(report.converted) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", srelu24.FallbackWarning)
            net(x).float().square().mean().backward()
        for p, wanted in zip(net.parameters(), expected, strict=True):
            assert p.grad.dtype == torch.float32
            assert torch.allclose(p.grad, wanted, rtol=0.05, atol=float(wanted.abs().max()) * 0.02)
        report.revert()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * functional.linear(x, self.weight)


class Switched(nn.Linear):
    """Does more once its switch is on."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight.to(x.dtype))
        return -y if self.on else y


def test_subclasses_that_do_more() -> None:
    """A subclass that computes something else is left and named; one that could is watched whenever it runs."""
    net = nn.Sequential(MLP(Doubled), MLP(Switched))
    report = srelu24.convert(net)
    assert [left.why for left in report.left] == ["c_fc is a Doubled, which computes something else than x W^T + b"]
    assert [done.path for done in report.converted] == ["1"]
    x = torch.randn(4, 32).bfloat16()
    with torch.no_grad():
        with no_warning():
            y = net[1](x)
        assert torch.equal(y, srelu24.ffn(x, net[1].c_fc.weight.bfloat16(), net[1].c_proj.weight.bfloat16()))
        net[1].c_proj.on = True
        with pytest.warns(srelu24.FallbackWarning, match="1: its c_proj is a Switched"):
            assert torch.equal(net[1](x), net[1].c_proj(net[1].c_fc(x).relu().square()))


transformers = pytest.importorskip("transformers")


class ConvMLP(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        conv = transformers.pytorch_utils.Conv1D
        self.c_fc, self.c_proj, self.dropout = conv(96, 32), conv(32, 96), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(torch.relu(self.c_fc(x)).square()))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_conv1d(dropout: float, distance: Distance) -> None:
    """transformers' Conv1D, which holds W^T: whole FFNs and second layers, state dicts unchanged."""
    net = nn.Sequential(ConvMLP(dropout)).bfloat16().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    keys, x = list(net.state_dict()), torch.randn(2, 5, 32).bfloat16()
    with torch.no_grad(), no_warning():
        dense = net(x)
        mlp = net[0]
        reference = pruned(x, mlp.c_fc.weight.T, mlp.c_proj.weight.T, mlp.c_fc.bias, mlp.c_proj.bias)
        report = srelu24.convert(net)
        assert [(done.layer, done.d_model, done.d_ff) for done in report.converted] == [
            ("linear24" if dropout else "ffn", 32, 96)
        ]
        y = net(x)
        assert distance(y, reference) < BF16 < 2 * BF16 < distance(y, dense)
        assert list(net.state_dict()) == keys
        assert [row.runs for row in srelu24.status(net)] == ["reference"]
        assert srelu24.profile(net, x).layers[0].d_ff == 96
        if not dropout:
            assert srelu24.warmup(net, 4)[0].explanation.runs == "reference"
        assert torch.equal(copy.deepcopy(net)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
        assert isinstance(net[0].c_proj, Conv1D24 if dropout else transformers.pytorch_utils.Conv1D)
        report.revert()
        assert torch.equal(net(x), dense)
    report = srelu24.convert(net, recipe="rowwise")
    assert not report.converted


def test_gpt2() -> None:
    """A GPT-2 with squared ReLU from transformers: every FFN is converted, and generates."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=96, activation_function="relu2", resid_pdrop=0.0
    )
    net = transformers.GPT2LMHeadModel(config).bfloat16().eval()
    report = srelu24.convert(net)
    assert [done.layer for done in report.converted] == ["ffn"] * 2
    net.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)


class Raw(nn.Module):
    """Two matrices of its own, each as written."""

    def __init__(self, first: tuple[int, int], second: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(first) / 6), nn.Parameter(torch.randn(second) / 10)
        self.b_in = nn.Parameter(torch.randn(96)) if bias else None
        self.b_out = nn.Parameter(torch.randn(32)) if bias else None

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w1 = self.w_in if self.w_in.shape[0] == x.shape[-1] else self.w_in.T
        w2 = self.w_out if self.w_out.shape[1] == x.shape[-1] else self.w_out.T
        return w1, w2

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self.matrices(x)
        h = x @ w1.type_as(x)
        h = h if self.b_in is None else h + self.b_in.type_as(x)
        y = functional.relu(h).square() @ w2.type_as(x)
        return y if self.b_out is None else y + self.b_out.type_as(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("second", [(32, 96), (96, 32)])
@pytest.mark.parametrize("first", [(32, 96), (96, 32)])
def test_raw_parameters(first: tuple[int, int], second: tuple[int, int], bias: bool, distance: Distance) -> None:
    """FFNs whose matrices are parameters of the module, in either orientation, with biases or without."""
    net, x = nn.Sequential(Raw(first, second, bias)), torch.randn(2, 5, 32).bfloat16()
    keys = list(net.state_dict())
    with torch.no_grad(), no_warning():
        dense, raw = net(x), net[0]
        w1, w2 = (w.T for w in raw.matrices(x))
        report = srelu24.convert(net)
        assert [(done.layer, done.d_model, done.d_ff) for done in report.converted] == [("ffn", 32, 96)]
        y = net(x)
        assert distance(y, pruned(x, w1, w2, raw.b_in, raw.b_out)) < BF16 < 2 * BF16 < distance(y, dense)
        assert isinstance(raw, Raw)
        assert list(net.state_dict()) == keys
        assert torch.equal(copy.deepcopy(net)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
        net.bfloat16()
        assert srelu24.status(net).layers[0].runs == "reference"
        assert srelu24.warmup(net, 4)[0].explanation.runs == "reference"
        assert srelu24.profile(net, x).layers[0].tokens == 10
        report.revert()
        assert type(raw) is Raw


@pytest.mark.parametrize("recipe", ["training", "predicted"])
def test_raw_parameters_by_recipes(recipe: str, distance: Distance) -> None:
    """Recipes run them, too; 8 bits refuse a matrix that is held transposed."""
    nets = nn.Sequential(Raw((96, 32), (32, 96), False), Raw((32, 96), (32, 96), False)).bfloat16()
    x = torch.randn(16, 32).bfloat16()
    dense = copy.deepcopy(nets)
    report = srelu24.convert(nets, recipe=srelu24.Recipe(warmup_steps=9) if recipe == "training" else recipe)
    if recipe == "training":
        assert len(report.converted) == 2
        for net in (nets, dense):
            net(x).float().square().mean().backward()
        for a, b in zip(nets.parameters(), dense.parameters(), strict=True):
            assert distance(a.grad, b.grad) < BF16
    else:
        assert [done.path for done in report.converted] == ["0"]
        assert "holds a matrix transposed" in report.left[0].why
        with torch.no_grad():
            assert distance(nets[0](x), srelu24.ffn(x, nets[0].w_in, nets[0].w_out)) < 0.1


class ScaledRaw(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_raw_parameters_that_do_more() -> None:
    """Modules with two matrices that compute something else are no FFNs; those around squared ReLU are named."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a.T @ self.b.T

    report = srelu24.convert(nn.ModuleDict({"lora": LowRank(), "raw": ScaledRaw((32, 96), (96, 32), False)}))
    assert not report.converted
    assert [left.path for left in report.left] == ["raw"]
    assert "it does more with them than a squared-ReLU FFN" in report.left[0].why


class Bound(MLP):
    """Its activation is a method of its own that it holds as an attribute."""

    def __init__(self) -> None:
        super().__init__(nn.Linear)
        self.activation = self._activation

    def _activation(self, h: Tensor) -> Tensor:
        return functional.relu(h) ** 2 if self.c_fc.in_features == 32 else h

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


def test_bound_methods_and_compiled_modules() -> None:
    """Modules that hold bound methods, or were compiled by module.compile(), are looked at like others."""
    net = nn.Sequential(Bound(), MLP(nn.Linear)).bfloat16()
    net[1].compile(backend="eager")
    x = torch.randn(4, 32).bfloat16()
    assert [done.layer for done in srelu24.convert(net).converted] == ["ffn", "ffn"]
    with torch.no_grad():
        assert torch.equal(net[1](x), srelu24.ffn(x, net[1].c_fc.weight, net[1].c_proj.weight))
    torch.compiler.reset()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_before_the_second_layer(dropout: float, distance: Distance) -> None:
    """nn.TransformerEncoderLayer with squared ReLU, and dropout between its layers: its second layer is pruned."""
    net = nn.TransformerEncoderLayer(32, 4, 96, dropout, lambda h: h.relu().square(), batch_first=True)
    net, x = nn.Sequential(net).bfloat16().eval(), torch.randn(2, 5, 32).bfloat16()
    dense = copy.deepcopy(net)
    dense[0].linear2.register_forward_pre_hook(lambda _, args: (keep_two_of_four(args[0]),))
    report = srelu24.convert(net)
    assert [done.path for done in report.converted] == ["0.linear2"]
    with torch.no_grad():
        assert distance(net(x), dense(x)) < BF16


def test_layers_of_other_kinds_are_named() -> None:
    """Linears with a quantised weight, norms between the layers, experts: each is left for its own reason."""

    class Normed(MLP):
        def __init__(self) -> None:
            super().__init__(nn.Linear)
            self.norm = nn.LayerNorm(96)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_proj(self.norm(functional.relu(self.c_fc(x)).square()))

    class NormedBefore(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return self.c_proj(functional.relu(self.norm(self.c_fc(x))).square())

    report = srelu24.convert(nn.Sequential(Normed(), NormedBefore()))
    assert [left.why for left in report.left] == ["what lies between c_fc and c_proj is no squared ReLU"] * 2


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Linear(4, 4), "none of the 1 modules of the Linear"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "0 are linear layers"),
        (nn.Sequential(), "none of the 1 modules of the Sequential"),
    ],
)
def test_nothing_to_convert(net: nn.Module, words: str) -> None:
    """Where nothing is converted and nothing left, the report says what the model has instead, or that it was done."""
    assert words in str(srelu24.convert(net))
    done = nn.Sequential(MLP(nn.Linear))
    srelu24.convert(done)
    assert "1 layers of the Sequential were converted before" in str(srelu24.convert(done))
    assert not isinstance(done[0].c_proj, Linear24)
    assert isinstance(done[0], SquaredReLUFFN)
    with pytest.raises(Unsupported):
        srelu24.convert(None)  # type: ignore[arg-type]
