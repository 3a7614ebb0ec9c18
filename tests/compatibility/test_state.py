"""Parameters and state"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import srelu24
from srelu24.nn.modules import NAMES, SquaredReLUFFN
from srelu24_gen.errors import Unsupported

Distance = Callable[[Tensor, Tensor], float]
BF16 = 2e-2
"""Relative distance that bf16 rounding of tiny layers may cause."""


def two_linears(names: tuple[str, str], bias: bool) -> nn.Module:
    return nn.ModuleDict({names[0]: nn.Linear(32, 96, bias=bias), names[1]: nn.Linear(96, 32, bias=bias)})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ours", NAMES)
@pytest.mark.parametrize("theirs", NAMES)
def test_state_dict_names(ours: tuple[str, str], theirs: tuple[str, str], bias: bool) -> None:
    """A state dict under any known pair of names loads strictly into any other; and plain layers load ours."""
    source = two_linears(theirs, bias)
    ffn = SquaredReLUFFN(32, 96, bias, names=ours)
    ffn.load_state_dict(source.state_dict(), strict=True)
    for name, their_name in zip(ours, theirs, strict=True):
        assert torch.equal(ffn.get_submodule(name).weight, source[their_name].weight)
    back = two_linears(ours, bias)
    back.load_state_dict(ffn.state_dict(), strict=True)
    assert torch.equal(back[ours[1]].weight, source[theirs[1]].weight)


def test_state_dict_inside_a_model() -> None:
    """The same under a prefix, next to other modules; what is missing or unknown is still an error."""
    model = nn.Sequential(nn.LayerNorm(32), SquaredReLUFFN(32, 96, names=("fc1", "fc2")))
    source = nn.Sequential(nn.LayerNorm(32), two_linears(("c_fc", "c_proj"), False)).state_dict()
    model.load_state_dict(source, strict=True)
    assert torch.equal(model[1].up.weight, source["1.c_fc.weight"])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(source | {"1.gate.weight": torch.zeros(1)})
    del source["1.c_proj.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(source)


def test_names_are_checked() -> None:
    """Names that cannot be two children, and widths that are none, are refused."""
    with pytest.raises(Unsupported, match="two different names"):
        SquaredReLUFFN(32, 96, names=("fc", "fc"))
    with pytest.raises(Unsupported, match="two different names"):
        SquaredReLUFFN(32, 96, names=("fc",))  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="two different names"):
        SquaredReLUFFN(32, 96, names=None)  # type: ignore[arg-type]
    for taken in (("down", "up"), ("forward", "fc"), ("fc", "mode")):
        with pytest.raises(Unsupported, match="something else of that name"):
            SquaredReLUFFN(32, 96, names=taken)
    for width in (0, 32.0, "32"):
        with pytest.raises(Unsupported, match="must be positive whole numbers"):
            SquaredReLUFFN(width, 96)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="do not follow each other"):
        SquaredReLUFFN.of(nn.Linear(8, 16), nn.Linear(8, 16))


def test_deepcopy(mlp: nn.Module, x: Tensor) -> None:
    """deepcopy gives an independent module with the same answers."""
    ffn = SquaredReLUFFN.of(mlp.c_fc, mlp.c_proj, ("c_fc", "c_proj"))
    with torch.no_grad():
        twin = copy.deepcopy(ffn)
        assert torch.equal(twin(x), ffn(x))
        twin.up.weight.zero_()
        assert not torch.equal(twin(x), ffn(x))


def test_pickle_and_save(net: nn.Module, x: Tensor) -> None:
    """pickle and torch.save of a converted model, and torch.save of its state dict."""
    srelu24.convert(net)
    with torch.no_grad():
        expected = net(x)
        buffer = io.BytesIO()
        torch.save(net.mlps[0], buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(x), net.mlps[0](x))
        assert torch.equal(pickle.loads(pickle.dumps(net.mlps[0]))(x), net.mlps[0](x))
        buffer = io.BytesIO()
        torch.save(net.state_dict(), buffer)
        buffer.seek(0)
        net.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert torch.equal(net(x), expected)


def test_meta_construction(x: Tensor) -> None:
    """Construction on the meta device, to_empty, then loading."""
    with torch.device("meta"):
        ffn = SquaredReLUFFN(32, 96, bias=True, dtype=torch.bfloat16)
    assert ffn.up.weight.is_meta
    with torch.no_grad():
        assert ffn(x.to("meta")).shape == x.shape
        source = SquaredReLUFFN(32, 96, bias=True, dtype=torch.bfloat16)
        ffn.to_empty(device="cpu").load_state_dict(source.state_dict())
        assert torch.equal(ffn(x), source(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_and_to(net: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """half(), bfloat16() and to() after conversion; types without kernels run dense."""
    srelu24.convert(net)
    net.to(dtype)
    with torch.no_grad():
        assert net(x.to(dtype)).dtype == dtype
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_weight_tying(x: Tensor, distance: Distance) -> None:
    """Layers that share a weight go on sharing it, through conversion, training and revert."""
    net = nn.Sequential(Foreign.make(), Foreign.make())
    net[1].fc.weight = net[0].fc.weight
    report = srelu24.convert(net)
    assert net[1].up.weight is net[0].up.weight
    with torch.no_grad():
        before = net(x)
        net[0].up.weight.mul_(2)
        assert distance(net(x), before) > 0.5
    assert len(list(net.parameters())) == 3
    report.revert()
    assert net[1].fc.weight is net[0].fc.weight


class Foreign(nn.Module):
    """An MLP under names that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(32, 96, bias=False), nn.Linear(96, 32, bias=False)

    @classmethod
    def make(cls) -> Foreign:
        return cls().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)) ** 2)


class LowRank(nn.Module):
    """A LoRA-style parametrization: W + B A."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, columns) / 6), nn.Parameter(torch.randn(rows, 4) / 2)

    def forward(self, w: Tensor) -> Tensor:
        return w + (self.b @ self.a).to(w.dtype)


def test_parametrization(mlp: nn.Module, x: Tensor, distance: Distance, masked: Callable[..., object]) -> None:
    """A parametrized weight (torch.nn.utils.parametrize) enters the kernels as it is computed."""
    parametrize.register_parametrization(mlp.c_fc, "weight", LowRank(96, 32))
    ffn = SquaredReLUFFN.of(mlp.c_fc, mlp.c_proj, ("c_fc", "c_proj"))
    with torch.no_grad():
        y = ffn(x)
        with masked(mlp.c_proj):
            assert distance(y, mlp(x)) < BF16
        parametrize.remove_parametrizations(mlp.c_fc, "weight", leave_parametrized=False)
        assert distance(y, mlp(x)) > 0.3


class Adapter(nn.Module):
    """A LoRA-style layer around a linear one, as adapter libraries put in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.low = base, LowRank(base.out_features, base.in_features)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ (self.low.b @ self.low.a).to(x.dtype).T


@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
def test_adapter(mlp: nn.Module, x: Tensor, name: str) -> None:
    """An adapter put around a layer after conversion counts: the FFN then runs dense."""
    ffn = SquaredReLUFFN.of(mlp.c_fc, mlp.c_proj, ("c_fc", "c_proj"))
    for module in (ffn, mlp):
        setattr(module, name, Adapter(getattr(module, name)))
    getattr(mlp, name).low = getattr(ffn, name).low
    with torch.no_grad():
        assert torch.equal(ffn(x), mlp(x))


def test_hooks_on_the_layers(mlp: nn.Module, x: Tensor) -> None:
    """A hook on a layer runs and its result counts: the FFN then runs dense."""
    ffn = SquaredReLUFFN.of(mlp.c_fc, mlp.c_proj, ("c_fc", "c_proj"))
    mlp.c_fc.register_forward_hook(lambda _, args, output: output + 1)
    with torch.no_grad():
        assert torch.equal(ffn(x), mlp(x))


def test_replaced_forward(mlp: nn.Module, x: Tensor) -> None:
    """A layer whose forward was replaced on the instance (offloading libraries do) is called through it."""
    ffn = SquaredReLUFFN.of(mlp.c_fc, mlp.c_proj, ("c_fc", "c_proj"))
    original = mlp.c_fc.forward
    mlp.c_fc.forward = lambda x: original(x) * 2
    with torch.no_grad():
        assert torch.equal(ffn(x), mlp(x))
