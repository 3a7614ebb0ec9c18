"""8-bit forward by a recipe"""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import srelu24
from srelu24.fp8 import plain
from srelu24.nn.modules import SquaredReLUFFN
from srelu24_gen.errors import Unsupported

Distance = Callable[[Tensor, Tensor], float]
FP8 = 0.1
"""Relative distance that 8 bits may cause: e4m3 rounds X and S to 2^-4 at most, and r is squared."""


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were quantised, in order."""
    seen: list[Tensor] = []

    def counted(w: Tensor) -> srelu24.QuantizedWeight:
        seen.append(w)
        return srelu24.quantize_weight(w)

    monkeypatch.setattr(plain, "quantize_weight", counted)
    return seen


def calibrated(net: nn.Module, recipe: str, x: Tensor) -> srelu24.Conversion:
    report = srelu24.convert(net, recipe=recipe)
    if recipe == "static":
        srelu24.calibrate(net, [x])
    return report


def by_hand(ffn: SquaredReLUFFN, x: Tensor) -> Tensor:
    """The same from weights quantised here and now."""
    q1, q2 = (srelu24.quantize_weight(layer.weight) for layer in (ffn.up, ffn.down))
    return srelu24.ffn(x, q1, q2, ffn.up.bias, ffn.down.bias, recipe=ffn.recipe)


@pytest.mark.parametrize("recipe", ["rowwise", "predicted", "static"])
def test_same_as_the_masked_reference(
    recipe: str, net: nn.Module, x: Tensor, distance: Distance, masked: Callable[..., object]
) -> None:
    """convert(model, recipe="rowwise" | "predicted" | "static"): outputs near the masked model's, and reverts."""
    with torch.no_grad():
        dense = net(x)
        with masked(*(mlp.c_proj for mlp in net.mlps)):
            expected = net(x)
        report = calibrated(net, recipe, x)
        assert [done.note for done in report.converted] == [f"8-bit, {recipe}"] * 2
        y = net(x)
        assert 1e-3 < distance(y, expected) < FP8
        assert torch.equal(net.mlps[0](x), by_hand(net.mlps[0], x))
        report.revert()
        assert torch.equal(net(x), dense)


def test_weights_are_quantised_once(net: nn.Module, x: Tensor, quantizations: list[Tensor]) -> None:
    """Weights are quantised at the first call and in no later one; what is kept goes with the weight."""
    srelu24.convert(net, recipe="rowwise")
    with torch.inference_mode():
        first = net(x)
        assert len(quantizations) == 4
        assert torch.equal(net(x), first)
    with torch.no_grad():
        net(x[:1])
    assert len(quantizations) == 4
    weight = net.mlps[0].up.weight
    assert weight in plain._kept
    kept = len(plain._kept)
    quantizations.clear()
    net.mlps[0] = nn.Identity()
    del weight
    assert len(plain._kept) == kept - 2


def changed_in_place(ffn: SquaredReLUFFN) -> None:
    ffn.up.weight.mul_(2)


def loaded(ffn: SquaredReLUFFN) -> None:
    ffn.load_state_dict({name: 2 * value for name, value in ffn.state_dict().items()})


def optimized(ffn: SquaredReLUFFN) -> None:
    optimizer = torch.optim.SGD(ffn.parameters(), lr=1.0)
    for parameter in ffn.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def assigned(ffn: SquaredReLUFFN) -> None:
    ffn.up.weight = nn.Parameter(-ffn.up.weight)


def data_assigned(ffn: SquaredReLUFFN) -> None:
    ffn.up.weight.data = -ffn.up.weight.data


def converted_to_half(ffn: SquaredReLUFFN) -> None:
    ffn.up.weight.mul_(1.3)
    ffn.half().bfloat16()


@pytest.mark.parametrize(
    "change",
    [changed_in_place, loaded, optimized, assigned, data_assigned, converted_to_half],
    ids=lambda f: f.__name__,
)
def test_weights_are_quantised_again(change: Callable[[SquaredReLUFFN], None], x: Tensor) -> None:
    """An in-place change, load_state_dict, an optimizer step, another parameter, .data, to(): the next call sees it."""
    ffn = SquaredReLUFFN(32, 96, recipe="predicted", dtype=torch.bfloat16)
    with torch.no_grad():
        before = ffn(x)
        change(ffn)
        y = ffn(x)
        assert not torch.equal(y, before)
        assert torch.equal(y, by_hand(ffn, x))


def test_static_scales(net: nn.Module, x: Tensor) -> None:
    """A scale for each FFN by convert(recipe="static") and calibrate(model, batches); saturation is counted."""
    srelu24.convert(net, recipe="static")
    with torch.no_grad():
        with pytest.raises(Unsupported, match=r"run srelu24\.calibrate on some data first"):
            net(x)
        found = srelu24.calibrate(net, [x, x / 2])
        assert found == [mlp.recipe for mlp in net.mlps]
        inputs = net.norms[0](x)
        r = net.mlps[0].up(inputs).float().relu().amax()
        assert found[0].amax == pytest.approx(float(r.square()), rel=0.1)
        assert found[0].amax != found[1].amax
        net(x)
        assert [recipe.saturated for recipe in found] == [0, 0]
        net.mlps[1](100 * x)
        assert found[0].saturated == 0 < found[1].saturated
    with pytest.raises(Unsupported, match="give recipe='static', which makes one for each FFN"):
        srelu24.convert(net, recipe=srelu24.Static(1.0))


def test_gradients_are_dense(net: nn.Module, x: Tensor) -> None:
    """Where gradients are recorded the FFN is dense on the plain weights, with one warning; under no_grad 8-bit."""
    twin = copy.deepcopy(net)
    srelu24.convert(net, recipe="rowwise")
    with pytest.warns(srelu24.FallbackWarning, match="8-bit forward has no backward"):
        net(x).float().square().mean().backward()
    twin(x).float().square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        assert not torch.equal(net(x), twin(x))


def test_func(net: nn.Module, x: Tensor, distance: Distance) -> None:
    """torch.func transforms are refused in one sentence; a forward-mode derivative is dense, never silently zero."""
    dense = copy.deepcopy(net)
    srelu24.convert(net, recipe="rowwise")
    for transformed in (lambda: torch.func.vmap(net)(x), lambda: torch.func.jvp(net, (x,), (x,))):
        with pytest.raises(Unsupported, match=r"a recipe does not run under torch\.func"):
            transformed()
    with forward_ad.dual_level(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", srelu24.FallbackWarning)
        ours, theirs = (forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent for model in (net, dense))
    assert distance(ours, theirs) == 0


def test_deepcopy_pickle_and_state(net: nn.Module, x: Tensor, quantizations: list[Tensor]) -> None:
    """Copies and pickles carry the recipe with its scale and no 8-bit weights; state dicts the two layers alone."""
    keys = list(net.state_dict())
    calibrated(net, "static", x)
    with torch.no_grad():
        expected = net(x)
        assert list(net.state_dict()) == keys
        buffer = io.BytesIO()
        torch.save(net, buffer)
        assert b"float8" not in buffer.getvalue()
        buffer.seek(0)
        for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), expected)
            assert twin.mlps[0].recipe is not net.mlps[0].recipe
            twin.mlps[0].up.weight.zero_()
        assert torch.equal(net(x), expected)
    assert len(quantizations) == 4 * 4


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("recipe", ["predicted", "static"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(
    recipe: str, backend: str, net: nn.Module, x: Tensor, fresh_compiler: None, distance: Distance
) -> None:
    """torch.compile(fullgraph, dynamic): one graph for five token counts; it sees that weights have changed."""
    calibrated(net, recipe, x)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for m in (7, 3, 16, 33, 64):
            tokens = torch.randn(1, m, 32).bfloat16()
            assert distance(compiled(tokens), net(tokens)) < 0.05
        x = x[:1]
        before = compiled(x)
        net.mlps[0].up.weight.mul_(2)
        assert not torch.equal(compiled(x), before)
        assert distance(compiled(x), net(x)) < 0.05
    assert counters["stats"]["unique_graphs"] == 1


def test_export(net: nn.Module, x: Tensor) -> None:
    """torch.export with a dynamic token count; the op stays one node."""
    srelu24.convert(net, recipe="rowwise")
    with torch.no_grad():
        m = torch.export.Dim("m", min=2, max=4096)
        program = torch.export.export(net, (x,), dynamic_shapes=({1: m},))
        assert sum("ffn_fp8_plain" in str(node.target) for node in program.graph.nodes) == 2
        for tokens in (x, x[:, :3]):
            assert torch.equal(program.module()(tokens), net(tokens))


def test_opcheck() -> None:
    """torch.library.opcheck of the op that takes plain weights."""
    x, w1, w2 = torch.randn(5, 32).bfloat16(), torch.randn(96, 32).bfloat16(), torch.randn(32, 96).bfloat16()
    saturated = torch.zeros((), dtype=torch.int64)
    for recipe, scales in (("rowwise", None), ("static", srelu24.Static(1.0).scales_on(x.device))):
        torch.library.opcheck(
            torch.ops.srelu24.ffn_fp8_plain.default,
            (x, w1, w2, w2[0].clone().repeat(1), None, recipe, scales, saturated),
        )


def test_autocast(x: Tensor, distance: Distance) -> None:
    """Under autocast a float32 module runs in 8 bits, without a warning, in autocast's type."""
    ffn = SquaredReLUFFN(32, 96, bias=True)
    with torch.no_grad():
        expected = ffn(x.float())
        ffn.set_recipe("rowwise")
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error", srelu24.FallbackWarning)
            y = ffn(x.float())
    assert y.dtype == torch.bfloat16
    assert distance(y, expected) > 1e-3


def test_parametrization_and_adapter(x: Tensor) -> None:
    """A parametrized weight is quantised as it is computed; an adapter around a layer makes the FFN dense."""

    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    ffn = SquaredReLUFFN(32, 96, recipe="rowwise", dtype=torch.bfloat16)
    with torch.no_grad():
        parametrize.register_parametrization(ffn.up, "weight", Doubled())
        assert torch.equal(ffn(x), by_hand(ffn, x))
        ffn.down_proj = nn.Sequential(ffn.down)
        assert torch.equal(ffn(x), ffn.down(ffn.up(x).relu().square()))


def test_warmup_prepares_every_layer(net: nn.Module, x: Tensor, quantizations: list[Tensor]) -> None:
    """warmup quantises the weights of every layer, not of one of each size; requests then quantise nothing."""
    srelu24.convert(net, recipe="predicted")
    told = srelu24.warmup(net, tokens=4)
    assert [str(each.explanation) for each in told] == [
        "runs: reference (8-bit, recipe predicted; x is on cpu)",
    ] * 2
    assert len(quantizations) == 4
    with torch.no_grad():
        net(x)
    assert len(quantizations) == 4


def test_threads(net: nn.Module, x: Tensor) -> None:
    """Eight threads whose first call is the model's first: every one gets the answers of a single thread."""
    srelu24.convert(net, recipe="rowwise")
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)
    barrier = threading.Barrier(8)

    def work(_: int) -> Tensor:
        barrier.wait()
        with torch.no_grad():
            return net(x)

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(work, range(8)))


def test_what_does_not_fit_is_refused(x: Tensor) -> None:
    """Weights that are not finite, a weight of another width or device: one sentence each."""
    ffn = SquaredReLUFFN(32, 96, recipe="rowwise", dtype=torch.bfloat16)
    with torch.no_grad():
        for wrong, words in (
            (x[..., :16], r"w1 has shape \[96, 32\]; \[\*, 16\] is needed"),
            (x.to("meta"), "w1 is on cpu and x on meta"),
            (x.int(), "x is torch.int32"),
        ):
            with pytest.raises(Unsupported, match=words):
                ffn(wrong)
        ffn.up.weight[3, 3] = torch.nan
        with pytest.raises(Unsupported, match="holds NaN or Inf"):
            ffn(x)
    assert "float64" in srelu24.explain(x.double(), ffn.up.weight, ffn.down.weight, recipe="rowwise").why
