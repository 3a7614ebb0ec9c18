"""profile(): shares against a count by hand, for dense and converted models, and what it recommends."""

from __future__ import annotations

import json
from collections import OrderedDict, UserDict
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import srelu24
from srelu24.db.choice import SPARSE, FfnChoice
from srelu24.runtime import dispatch
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType
from srelu24_gen.target import target_by_key


class MLP(nn.Module):
    def __init__(self, d: int = 16, f: int = 40) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu().square())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(MLP(), MLP())


def by_hand(model: nn.Module, x: Tensor) -> list[tuple[float, float, float]]:
    """Density, dropped non-zeros and dropped energy of each layer, one group of four at a time."""
    shares = []
    with torch.no_grad():
        for mlp in model:
            nonzero = dropped = 0
            energy = lost = 0.0
            activations = mlp.fc1(x).relu().square()
            for group in activations.double().reshape(-1, 4).tolist():
                low = sorted(group)[:2]
                nonzero += sum(v != 0 for v in group)
                dropped += sum(v != 0 for v in low)
                energy += sum(v * v for v in group)
                lost += sum(v * v for v in low)
            shares.append((nonzero / activations.numel(), dropped / nonzero, lost / energy))
            x = mlp(x)
    return shares


def test_shares_are_those_counted_by_hand(model: nn.Module) -> None:
    x = torch.randn(30, 16)
    profile = srelu24.profile(model, x)
    assert [layer.path for layer in profile.layers] == ["0", "1"]
    assert [layer.tokens for layer in profile.layers] == [30, 30]
    for layer, (density, dropped, energy) in zip(profile.layers, by_hand(model, x), strict=True):
        assert (layer.d_model, layer.d_ff) == (16, 40)
        assert layer.density == pytest.approx(density)
        assert layer.dropped == pytest.approx(dropped)
        assert layer.energy_dropped == pytest.approx(energy)
        assert layer.expected_speedup is None


def test_batches_add_up_and_a_converted_model_says_the_same(model: nn.Module) -> None:
    x = torch.randn(30, 16)
    whole = srelu24.profile(model, x)
    parts = srelu24.profile(model, [(x[:7],), {"input": x[7:]}])
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert a.density == b.density
        assert a.energy_dropped == pytest.approx(b.energy_dropped)
    srelu24.convert(model)
    assert srelu24.profile(model, x).layers[0] == whole.layers[0]
    single = MLP()
    dense = srelu24.profile(single, x).layers[0]
    srelu24.convert(single)  # only its second layer
    assert srelu24.profile(single, x).layers[0].density == dense.density


def test_what_is_recommended(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].fc1.weight.view(-1, 4, 16)[:, 1::2] = 0  # two of four at most: nothing to drop
    first, second = srelu24.profile(model, torch.randn(30, 16), max_energy_dropped=1e-6).layers
    assert (first.recommended, first.dropped) == ("sparse", 0.0)
    assert second.recommended == "dense"
    assert "of the energy" in second.why
    narrow = nn.Sequential(MLP(f=36))
    assert "not a multiple of 8" in srelu24.profile(narrow, torch.randn(3, 16)).layers[0].why


def test_dead_layers_and_an_empty_model() -> None:
    dead = nn.Sequential(MLP())
    with torch.no_grad():
        dead[0].fc1.weight.zero_()
    layer = srelu24.profile(dead, torch.randn(3, 16)).layers[0]
    assert (layer.density, layer.dropped, layer.energy_dropped) == (0.0, None, None)
    with pytest.raises(Unsupported, match="has no squared-ReLU FFN"):
        srelu24.profile(nn.Linear(4, 4), torch.randn(3, 4))
    with pytest.raises(Unsupported, match="no squared-ReLU FFN ran"):
        srelu24.profile(dead, [])


def test_table_json_and_plot(model: nn.Module, tmp_path: Path) -> None:
    profile = srelu24.profile(model, torch.randn(30, 16))
    lines = str(profile).splitlines()
    assert len(lines) == 3
    assert f"{profile.layers[1].density:.2%}" in lines[2]
    assert json.loads(profile.json())["layers"][0]["density"] == profile.layers[0].density
    profile.plot(tmp_path / "profile.svg")
    assert (tmp_path / "profile.svg").read_text().count("<svg") == 1


def test_hooks_are_gone_and_the_model_is_as_before(model: nn.Module) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    srelu24.profile(model, torch.randn(3, 16))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("way", "recommended"), [(SPARSE, "sparse"), ("cublas", "dense")])
def test_expectations_are_the_dispatchers(way: str, recommended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(shape: Shape, *rest: object) -> FfnChoice:
        asked.append((shape, *rest))
        return FfnChoice(way, "cublas", 1.25, "measured", "measured: so it is")

    monkeypatch.setattr(dispatch, "choose_ffn", choose)
    model = nn.Sequential(MLP()).bfloat16()
    with torch.no_grad():
        model[0].fc1.weight.view(-1, 4, 16)[:, 1::2] = 0  # nothing to drop, so that speed alone decides
    batches = [torch.randn(m, 16).bfloat16() for m in (30, 50)]
    layer = srelu24.profile(model, batches, gpu="h200").layers[0]
    assert asked == [(Shape(40, 16, 40), DType.BF16, False, False, target_by_key("h200"))]
    assert (layer.expected_speedup, layer.expected_from) == (1.25, "measured")
    assert layer.recommended == recommended
    assert "so it is" in layer.why


def test_the_real_dispatcher_keeps_tiny_layers_dense(model: nn.Module) -> None:
    layer = srelu24.profile(model, torch.randn(8, 16), gpu="h200", max_energy_dropped=1.0).layers[0]
    assert layer.recommended == "dense"
    assert layer.expected_from == "model"
    with pytest.raises(Unsupported, match="h300"):
        srelu24.profile(model, torch.randn(8, 16), gpu="h300")


class Keyed(nn.Module):
    """Takes keywords, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.mlp(scale * x)


class Batch(UserDict[str, object]):
    """As a tokenizer's BatchEncoding."""


@pytest.mark.parametrize("give", ["alone", "in a list", "dict", "ordered", "proxy", "list of arguments", "tuple"])
def test_any_mapping_and_sequence(give: str) -> None:
    model, x = Keyed(), torch.randn(30, 16)
    expected = srelu24.profile(model, 2 * x).layers
    forms = {
        "alone": Batch(x=x, scale=2.0),
        "in a list": [Batch(x=x, scale=2.0)],
        "dict": {"x": x, "scale": 2.0},
        "ordered": OrderedDict(x=x, scale=2.0),
        "proxy": MappingProxyType({"x": x, "scale": 2.0}),
        "list of arguments": [[x, 2.0]],
        "tuple": ((x, 2.0),),
    }
    assert srelu24.profile(model, forms[give]).layers == expected


def test_calibrate_takes_the_same() -> None:
    model, x = nn.Sequential(MLP(16, 48), Keyed()).bfloat16(), torch.randn(30, 16).bfloat16()
    keyed = model[1]
    keyed.mlp = MLP(16, 48).bfloat16()
    srelu24.convert(keyed, recipe="static")
    (expected,) = (recipe.amax for recipe in srelu24.calibrate(lambda batch: keyed(batch, 2.0), [x]))
    for data in (Batch(x=x, scale=2.0), [{"x": x, "scale": 2.0}], [(x, 2.0)], [[x, 2.0]], 2 * x, [2 * x]):
        assert [recipe.amax for recipe in srelu24.calibrate(keyed, data)] == [expected]


@pytest.mark.parametrize("f", [36, 37, 38, 39, 3])
def test_widths_that_no_group_divides(f: int) -> None:
    """The last group is filled with zeros, and nothing is recommended for such a layer."""
    model, x = nn.Sequential(MLP(f=f), MLP()), torch.randn(20, 16)
    (first, second) = srelu24.profile(model, x, max_energy_dropped=1.0).layers
    with torch.no_grad():
        a = model[0].fc1(x).relu().square()
    groups = nn.functional.pad(a.double(), (0, -f % 4)).view(20, -1, 4).sort(-1).values
    assert first.density == pytest.approx(float((a != 0).double().mean()))
    assert first.energy_dropped == pytest.approx(float(groups[..., :2].square().sum() / groups.square().sum()))
    assert (first.recommended, second.recommended) == ("dense", "sparse")
    assert f"F = {f} is not a multiple of 8" in first.why
    srelu24.convert(model)
    assert srelu24.profile(model, x, max_energy_dropped=1.0).layers == [first, second]


def test_a_report_for_every_layer() -> None:
    """Layers that do not run, are not finite, or cannot be looked at have rows that say so; the others theirs."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.broken, self.infinite = MLP(), MLP(), MLP(), MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.broken(x) + 0 * self.infinite(x)

    model, x = Two(), torch.randn(5, 16)
    with torch.no_grad():
        model.infinite.fc1.weight.fill_(torch.inf)
    calls = []

    def fails_once(_: nn.Module, args: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no such file")

    model.broken.fc1.register_forward_pre_hook(fails_once)
    rows = {row.path: row for row in srelu24.profile(model, x).layers}
    assert list(rows) == ["used", "unused", "broken", "infinite"]
    assert rows["used"].tokens == 5
    assert (rows["unused"].why, rows["unused"].tokens, rows["unused"].density) == (
        "it did not run on this data",
        0,
        None,
    )
    assert "could not be looked at (OSError: no such file)" in rows["broken"].why
    assert rows["infinite"].why == "its activations are not finite"
    assert len(str(srelu24.profile(model, x)).splitlines()) == 5


def test_nested_input() -> None:
    """Jagged batches are looked at token by token."""
    model, parts = nn.Sequential(MLP()), [torch.randn(3, 16), torch.randn(7, 16)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert (
        srelu24.profile(model, nested).layers[0].density == srelu24.profile(model, torch.cat(parts)).layers[0].density
    )
