"""``srelu24.ffn(recipe=...)`` on a CPU: answers near float64, recipes, calibration, fallbacks, what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import srelu24
from interruption import Interrupted, at_every_line
from srelu24.fp8 import plain, recipes
from srelu24.fp8.recipes import ScaleRecipe
from srelu24.measuring.workload import make_ffn
from srelu24.runtime import fallback
from srelu24.runtime.fallback import FallbackWarning
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import DType

M, D, F = 20, 64, 96


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    fallback.warn_again()


class Layer:
    """A layer with biases, as bf16 and quantised."""

    def __init__(self, dtype: DType = DType.BF16, density: float = 0.1, m: int = M, d: int = D, f: int = F) -> None:
        data = make_ffn(m, d, f, dtype, density, "cpu")
        self.x, self.w1, self.w2 = data.x, data.w1, data.w2
        random = torch.Generator().manual_seed(9)
        self.b1 = torch.randn(f, generator=random).mul(0.1).to(self.x.dtype)
        self.b2 = torch.randn(d, generator=random).mul(0.1).to(self.x.dtype)
        self.q1, self.q2 = srelu24.quantize_weight(self.w1), srelu24.quantize_weight(self.w2)

    def run(self, recipe: ScaleRecipe | str, x: Tensor | None = None) -> Tensor:
        return srelu24.ffn(self.x if x is None else x, self.q1, self.q2, self.b1, self.b2, recipe=recipe)

    def dense(self, x: Tensor | None = None) -> Tensor:
        """With the quantised weights, in float64, pruned: what is left is the error of X and S."""
        h = (self.x if x is None else x).double() @ self.q1.dequantize().double().T + self.b1.double()
        groups = h.clamp(min=0).square().view(*h.shape[:-1], -1, 4)
        kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1.0)
        return (groups * kept).view_as(h) @ self.q2.dequantize().double().T + self.b2.double()


@pytest.fixture
def layer() -> Layer:
    return Layer()


def relative(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("recipe", ["rowwise", "predicted", "static"])
def test_recipes_are_near_float64(recipe: str, density: float, dtype: DType) -> None:
    layer = Layer(dtype, density, m=64, d=256, f=512)
    chosen: ScaleRecipe | str = recipe
    if recipe == "static":
        chosen = srelu24.Static()
        assert srelu24.calibrate(lambda x: layer.run(chosen, x), [layer.x]) == [chosen]
    y = layer.run(chosen)
    assert y.dtype == layer.x.dtype
    # e4m3 rounds X to 2^-5 or better on average, S once more; r is squared.
    assert relative(y, layer.dense()) < 0.1
    assert relative(y, layer.dense()) > 1e-3  # and this is no other arithmetic


def test_shapes(layer: Layer) -> None:
    x = layer.x.view(2, 2, 5, D)
    y = layer.run("rowwise", x)
    assert y.shape == x.shape
    assert torch.equal(y.view(M, D), layer.run("rowwise"))
    assert torch.equal(layer.run("rowwise", layer.x[3]), y.view(M, D)[3])
    assert layer.run("predicted", layer.x[:0]).shape == (0, D)


@pytest.mark.parametrize("recipe", ["rowwise", "predicted"])
def test_outlier_and_tiny_rows_keep_their_accuracy(recipe: str) -> None:
    layer = Layer(m=64, d=256, f=512)
    layer.b1.zero_()
    layer.b2.zero_()
    x = layer.x.clone()
    x[3] *= 1000
    x[5] *= 1e-6
    x[7] = 0
    own = srelu24.Rowwise() if recipe == "rowwise" else srelu24.Predicted()
    y, truth = layer.run(own, x), layer.dense(x)
    for row in (3, 5, 20):
        assert relative(y[row], truth[row]) < 0.15
    assert (y[7] == 0).all()
    assert own.saturated == 0


def test_static_saturates_beyond_its_calibration_and_counts(layer: Layer) -> None:
    static = srelu24.Static()
    srelu24.calibrate(lambda x: layer.run(static, x), [layer.x[:10], layer.x[10:]])
    layer.run(static)
    assert static.saturated == 0
    layer.run(static, layer.x * 100)
    assert static.saturated > 0
    assert layer.run(static, layer.x * 100).isfinite().all()


def test_calibration_takes_the_largest_of_all_batches(layer: Layer) -> None:
    def amax(*batches: Tensor) -> float:
        static = srelu24.Static()
        srelu24.calibrate(lambda x: layer.run(static, x), batches)
        assert static.amax is not None
        return static.amax

    assert amax(layer.x, 3 * layer.x) == amax(3 * layer.x, layer.x) == amax(3 * layer.x) > amax(layer.x)


def test_calibration_of_a_module_with_two_layers(layer: Layer) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recipes = srelu24.Static(), srelu24.Static(5.0)

        def forward(self, x: Tensor) -> Tensor:
            return layer.run(self.recipes[1], layer.run(self.recipes[0], x))

    model = Two()
    assert srelu24.calibrate(model, [layer.x]) == list(model.recipes)
    assert model.recipes[1].amax != 5.0
    assert model(layer.x).isfinite().all()


CPU = torch.device("cpu")


def test_threads_whose_first_calls_meet_count_in_one_place() -> None:
    def check(interrupted: Interrupted, recipe: ScaleRecipe) -> None:
        others: list[Tensor] = []
        mine = interrupted(lambda: recipe.counter(CPU), lambda: others.append(recipe.counter(CPU)))
        assert mine is others[0]

    for interrupted in at_every_line(ScaleRecipe.counter):
        check(interrupted, srelu24.Rowwise())


def test_a_weight_that_changes_while_it_is_quantised_is_quantised_again() -> None:
    def check(interrupted: Interrupted, w: Tensor) -> None:
        interrupted(lambda: plain.quantized(w), lambda: w.mul_(2))
        assert torch.equal(plain.quantized(w).scale, srelu24.quantize_weight(w).scale)

    for interrupted in at_every_line(plain.quantized):
        check(interrupted, torch.randn(32, 64).bfloat16())


def test_a_calibration_during_a_call_counts_for_the_next() -> None:
    def check(interrupted: Interrupted, static: srelu24.Static) -> None:
        assert interrupted(lambda: static.scales_on(CPU), lambda: static.calibrated(2.0)).isfinite().all()
        assert torch.equal(static.scales_on(CPU), srelu24.Static(2.0).scales_on(CPU))

    for interrupted in at_every_line(srelu24.Static.scales_on):
        check(interrupted, srelu24.Static(1.0))


def test_a_call_may_outlive_the_calibration_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(interrupted: Interrupted, static: srelu24.Static) -> None:
        monkeypatch.setattr(recipes, "_observed", {static: torch.tensor(1.0)})
        interrupted(lambda: recipes.observe(static, torch.ones(3)), lambda: setattr(recipes, "_observed", None))

    for interrupted in at_every_line(recipes.observe):
        check(interrupted, srelu24.Static())


def test_calibration_that_cannot_work(layer: Layer) -> None:
    static = srelu24.Static()
    with pytest.raises(Unsupported, match=r"run srelu24\.calibrate on some data first"):
        layer.run(static)
    with pytest.raises(Unsupported, match="met no layer"):
        srelu24.calibrate(lambda x: layer.run("rowwise", x), [layer.x])
    with pytest.raises(Unsupported, match="largest hidden value of nan"):
        srelu24.calibrate(lambda x: layer.run(static, x), [layer.x * torch.nan])
    with pytest.raises(ZeroDivisionError):
        srelu24.calibrate(lambda x: 1 / 0, [layer.x])
    with pytest.raises(Unsupported, match=r"run srelu24\.calibrate"):  # a failed calibration is over
        layer.run(static)
    with pytest.raises(Unsupported, match="positive finite"):
        srelu24.Static(0.0)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda s: srelu24.ffn(s.x, s.q1, s.q2), r"there is no recipe"),
        (lambda s: srelu24.ffn(s.x, s.w1, s.q2, recipe="rowwise"), "quantize_weight"),
        (
            lambda s: srelu24.ffn(s.x, s.q1, s.q2, recipe="rowwise", deterministic="batch"),
            "leave mode and determ",
        ),
        (lambda s: srelu24.ffn(s.x, s.q1, s.w2, recipe="rowwise"), "quantize_weight"),
        (lambda s: srelu24.ffn(s.x, s.q1, s.q2, recipe="static"), r"srelu24\.Static\(\)"),
        (lambda s: srelu24.ffn(s.x, s.q1, s.q2, recipe="columnwise"), "rowwise, predicted"),
        (lambda s: srelu24.ffn(s.x[:, :32], s.q1, s.q2, recipe="rowwise"), r"w1 has shape \[96, 64\]; \[96, 32\]"),
        (lambda s: srelu24.ffn(s.x, s.q1, s.q1, recipe="rowwise"), r"w2 has shape"),
        (lambda s: srelu24.ffn(s.x, s.q1, s.q2, s.b2, recipe="rowwise"), r"b1 has shape \[64\]; \[96\]"),
        (lambda s: srelu24.ffn(s.x.int(), s.q1, s.q2, recipe="rowwise"), "torch.int32"),
        (lambda s: srelu24.ffn(s.x, s.q1, s.q2, s.b1.float(), recipe="rowwise"), "b1 is torch.float32"),
        (lambda s: srelu24.ffn(s.x.to("meta"), s.q1, s.q2, recipe="rowwise"), "w1 is on cpu and x on meta"),
    ],
)
def test_what_does_not_fit_together_is_refused(layer: Layer, call: Callable[[Layer], object], complaint: str) -> None:
    with pytest.raises(Unsupported, match=complaint):
        call(layer)


def test_matmul_refuses_an_operand_of_the_8_bit_kernels(layer: Layer) -> None:
    from srelu24.fp8 import quantize, reference

    r = reference.gemm_relu2_24(quantize.quantize_rows(layer.x), layer.q1)
    with pytest.raises(Unsupported, match="is for the 8-bit kernels"):
        srelu24.matmul(r, layer.w2)


def test_what_the_kernels_cannot_take_runs_dense_and_says_so_once(layer: Layer) -> None:
    q1, q2 = srelu24.quantize_weight(layer.w1[:72, :40]), srelu24.quantize_weight(layer.w2[:40, :72])
    x = layer.x[:, :40]
    with pytest.warns(FallbackWarning, match="D = 40 is not a positive multiple of 16"):
        y = srelu24.ffn(x, q1, q2, recipe="rowwise")
    wide = (x.double() @ q1.dequantize().double().T).relu().square() @ q2.dequantize().double().T
    assert relative(y, wide) < 0.02
    assert srelu24.explain(x, q1, q2, recipe="rowwise").runs == "dense"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        srelu24.ffn(x, q1, q2, recipe="rowwise")


def test_gradients_and_wide_types_run_dense(layer: Layer) -> None:
    x = layer.x.clone().requires_grad_()
    with pytest.warns(FallbackWarning, match="no backward"):
        layer.run("rowwise", x).sum().backward()
    assert x.grad is not None
    with pytest.warns(FallbackWarning, match=re.escape("torch.float32")):
        y = srelu24.ffn(layer.x.float(), layer.q1, layer.q2, recipe="rowwise")
    assert y.dtype == torch.float32


def test_explain(layer: Layer) -> None:
    found = srelu24.explain(layer.x, layer.q1, layer.q2, recipe="predicted")
    assert str(found) == "runs: reference (8-bit, recipe predicted; x is on cpu)"
    with pytest.raises(Unsupported, match="no recipe"):
        srelu24.explain(layer.x, layer.q1, layer.q2)


def test_e5m2_weights() -> None:
    layer = Layer(m=64, d=256, f=512)
    layer.q1 = srelu24.quantize_weight(layer.w1, torch.float8_e5m2)
    layer.q2 = srelu24.quantize_weight(layer.w2, torch.float8_e5m2)
    assert relative(layer.run("rowwise"), layer.dense()) < 0.1


def test_compiles_without_a_graph_break_and_calibrates_when_compiled(layer: Layer) -> None:
    static = srelu24.Static()
    compiled = torch.compile(lambda x: layer.run(static, x), fullgraph=True, backend="aot_eager")
    srelu24.calibrate(compiled, [layer.x])
    assert torch.equal(compiled(layer.x), layer.run(static))


def test_the_op_is_one_that_torch_understands(layer: Layer) -> None:
    torch.library.opcheck(
        torch.ops.srelu24.ffn_fp8.default,
        (
            layer.x, layer.q1.values, layer.q1.scale, layer.q2.values, layer.q2.scale, layer.b1, None, "predicted",
            layer.q1.row_norm, torch.zeros((), dtype=torch.int64),
        ),
        test_utils="test_faketensor",
    )  # fmt: skip
