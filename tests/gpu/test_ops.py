"""The public operations on a GPU: right answers, fallbacks that say why, errors in one sentence, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import srelu24
from srelu24.measuring import verify, workload
from srelu24.numerics import reference
from srelu24.numerics.dtypes import TORCH_DTYPE
from srelu24.runtime.launch import Operands
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import WIDE_TYPES, Activation, DType, Family, Op, Problem

NONE, RELU2 = Activation.NONE, Activation.RELU2
D, F = 136, 1864
ROWS = (1, 7, 64, 65, 300)

GEMM1 = [Family(Op.GEMM_RELU2_24, dtype, RELU2, bias) for dtype in WIDE_TYPES for bias in (False, True)]
GEMM2 = [Family(Op.SPGEMM, dtype, NONE, bias) for dtype in WIDE_TYPES for bias in (False, True)]
COUNT = [Family(Op.GEMM_RELU2_24, DType.BF16, RELU2, bias, count_nonzeros=True) for bias in (False, True)]
RESIDUAL = [Family(Op.SPGEMM, DType.BF16, bias=bias, residual=True) for bias in (False, True)]
DENSE = [Family(Op.GEMM, dtype, activation, bias=True) for dtype in WIDE_TYPES for activation in Activation]
PROBLEMS = [
    *(Problem(family, m, F, D) for family in GEMM1 + COUNT + DENSE for m in ROWS),
    *(Problem(family, m, D, F) for family in GEMM2 + RESIDUAL for m in ROWS),
    *(Problem(Family(Op.SPARSIFY24, dtype, activation), 64, F) for dtype in WIDE_TYPES for activation in Activation),
]

dtypes = pytest.mark.parametrize("dtype", list(WIDE_TYPES), ids=lambda dtype: dtype.value)


class Layer:
    """Weights, biases and tokens of one small layer."""

    def __init__(self, device: torch.device, dtype: DType = DType.BF16, m: int = 300, d: int = D, f: int = F) -> None:
        self.dtype = dtype
        data = workload.make_ffn(m, d, f, dtype, 0.3, device, seed=m)
        self.x, self.w1, self.w2 = data.x, data.w1, data.w2
        random = torch.Generator(device).manual_seed(m + 1)
        storage = TORCH_DTYPE[dtype]
        self.b1 = torch.randn(f, device=device, generator=random).to(storage)
        self.b2 = torch.randn(d, device=device, generator=random).to(storage)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w1, self.w2


@pytest.fixture
def layer(device: torch.device) -> Layer:
    return Layer(device)


@pytest.fixture
def kernels_only() -> Iterator[None]:
    """A fallback fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", srelu24.FallbackWarning)
        yield


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    return linear(linear(x, w1, b1).relu().square(), w2, b2)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within a few roundings of the storage type, by norm: single values near zero may be far off."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    assert float(error) < 5e-3


# ------------------------------------------------------------------------------------------------------ right answers


@dtypes
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("b1", [False, True])
@pytest.mark.parametrize("b2", [False, True])
def test_ffn(dtype: DType, m: int, b1: bool, b2: bool, device: torch.device, kernels_only: None) -> None:
    layer = Layer(device, dtype, m)
    biases = (layer.b1 if b1 else None, layer.b2 if b2 else None)
    y = srelu24.ffn(layer.x, *layer.weights, *biases, mode="sparse")
    assert_close(y, reference.ffn(layer.x, *layer.weights, *biases, accumulate=torch.float64))
    # It is the two kernels, to the bit, and the second one is right about what the first one gave it.
    s = srelu24.gemm_relu2_24(layer.x, layer.w1, biases[0])
    assert torch.equal(y, srelu24.matmul(s, layer.w2, biases[1]))
    second = Problem(Family(Op.SPGEMM, dtype, bias=b2), m, D, F)
    found = verify.check(second, Operands(a=s, b=layer.w2, bias=biases[1], out=y))
    assert found.ok, found.detail


@pytest.mark.parametrize("m", [1, 65])
def test_what_memory_held_before_does_not_matter(m: int, device: torch.device, kernels_only: None) -> None:
    """Nobody clears what lies between the two kernels, nor the padding of its rows: F/2 is no multiple of 16 bytes."""
    layer = Layer(device, m=m)
    expected = srelu24.ffn(layer.x, *layer.weights, mode="sparse")
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, and bytes that are one as bf16
    try:
        y = srelu24.ffn(layer.x, *layer.weights, mode="sparse")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(y, expected)


def test_batch_invariance(device: torch.device, kernels_only: None) -> None:
    """Rows alone, in small batches and in a large one whose tiles stream-K would split: the same bits."""
    layer = Layer(device, m=5000, d=1024, f=2048)
    call = partial(srelu24.ffn, w1=layer.w1, w2=layer.w2, b1=layer.b1, deterministic="batch")
    whole = call(layer.x)
    for m in (1, 2, 64, 100, 129, 700, 3001):
        for first in (0, 1777):
            assert torch.equal(call(layer.x[first : first + m]), whole[first : first + m])
    assert_close(whole, srelu24.ffn(layer.x, layer.w1, layer.w2, layer.b1, mode="sparse"))
    for kernel in srelu24.explain(layer.x, layer.w1, layer.w2, layer.b1, deterministic="batch").kernels:
        assert kernel.spec.config.batch_invariant


@pytest.mark.parametrize("shape", [(D,), (1, D), (5, 13, D), (2, 2, 3, D), (0, D), (4, 0, D)])
def test_leading_dimensions(shape: tuple[int, ...], layer: Layer, kernels_only: None) -> None:
    x = layer.x[0].expand(shape).contiguous()
    y = srelu24.ffn(x, *layer.weights, layer.b1, layer.b2, mode="sparse")
    assert y.shape == shape
    if x.numel():
        assert_close(y, reference.ffn(x.reshape(-1, D), *layer.weights, layer.b1, layer.b2).view(shape))
    assert srelu24.linear(x, layer.w1, layer.b1, "relu2").shape == (*shape[:-1], F)


def test_no_tokens(layer: Layer, kernels_only: None) -> None:
    none = layer.x[:0]
    s, counts = srelu24.gemm_relu2_24_count(none, layer.w1)
    assert s.shape == (0, F)
    assert counts.tolist() == [0] * F
    assert srelu24.matmul(s, layer.w2).shape == (0, D)
    assert srelu24.sparsify24(none.new_empty(0, F)).shape == (0, F)
    assert srelu24.linear(none, layer.w1).shape == (0, F)


@pytest.mark.parametrize("f", [8, 24, 40, 256, 1864])
@pytest.mark.parametrize("m", [1, 65])
def test_packed_operands_of_any_width_use_the_kernels(f: int, m: int, device: torch.device, kernels_only: None) -> None:
    # F/2 is not always a multiple of 8, and one row has any stride.
    layer = Layer(device, m=m, f=f)
    s, counts = srelu24.gemm_relu2_24_count(layer.x, layer.w1, layer.b1)
    y = srelu24.matmul(s, layer.w2, layer.b2, layer.x)
    assert_close(y, reference.spgemm(s, layer.w2, layer.b2, layer.x, accumulate=torch.float64))
    hidden = linear(layer.x.double(), layer.w1.double(), layer.b1.double())
    assert int((counts - (hidden > 0).sum(0)).abs().max()) <= 1  # sums next to zero may round either way


@dtypes
@pytest.mark.parametrize("activation", list(Activation))
def test_sparsify24(dtype: DType, activation: Activation, device: torch.device, kernels_only: None) -> None:
    h = torch.randn(64, F, device=device).to(TORCH_DTYPE[dtype])
    s, expected = srelu24.sparsify24(h, activation.value), reference.sparsify24(h, activation)
    assert torch.equal(s.values, expected.values)
    assert torch.equal(s.metadata, expected.metadata)


@dtypes
@pytest.mark.parametrize("activation", list(Activation))
def test_linear(dtype: DType, activation: Activation, device: torch.device, kernels_only: None) -> None:
    layer = Layer(device, dtype)
    y = srelu24.linear(layer.x, layer.w1, layer.b1, activation.value)
    problem = Problem(Family(Op.GEMM, dtype, activation, bias=True), 300, F, D)
    found = verify.check(problem, Operands(a=layer.x, b=layer.w1, bias=layer.b1, out=y))
    assert found.ok, found.detail


def test_views_of_wider_tensors_use_the_kernels(layer: Layer, kernels_only: None) -> None:
    def widened(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (8, 16), value=torch.nan)[:, 8:-16]

    y = srelu24.ffn(layer.x, *layer.weights, mode="sparse")
    wide = (widened(layer.x), widened(layer.w1), widened(layer.w2))
    assert torch.equal(srelu24.ffn(*wide, mode="sparse"), y)


def test_nothing_synchronises(layer: Layer, kernels_only: None) -> None:
    srelu24.ffn(layer.x, *layer.weights, layer.b1, layer.b2, mode="sparse")
    torch.cuda.set_sync_debug_mode("error")
    try:
        srelu24.ffn(layer.x, *layer.weights, layer.b1, layer.b2, mode="sparse")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------- fallbacks


def misaligned(t: Tensor) -> Tensor:
    """The same matrix, two bytes behind an aligned address."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


FALLBACKS: dict[str, tuple[Callable[[Layer], tuple[Tensor, Tensor, Tensor]], str]] = {
    "fp32": (lambda o: (o.x.float(), o.w1.float(), o.w2.float()), "torch.float32"),
    "D = 12": (lambda o: (o.x[:, :12].contiguous(), o.w1[:, :12].contiguous(), o.w2[:12]), "width of 12"),
    "transposed x": (lambda o: (o.x.t().contiguous().t(), o.w1, o.w2), "not contiguous in its last dimension"),
    "transposed w1": (lambda o: (o.x, o.w1.t().contiguous().t(), o.w2), "not contiguous in its last dimension"),
    "unaligned x": (lambda o: (misaligned(o.x), o.w1, o.w2), "multiple of 16 bytes"),
    "unaligned rows": (lambda o: (o.x, o.w1, torch.nn.functional.pad(o.w2, (0, 4))[:, :F]), "row stride of 1868"),
}


@pytest.mark.parametrize("name", list(FALLBACKS))
def test_a_fallback_is_dense_warns_once_and_is_explained(name: str, layer: Layer) -> None:
    change, reason = FALLBACKS[name]
    operands = change(layer)
    explanation = srelu24.explain(*operands)
    assert explanation.runs == "dense"
    assert reason in explanation.why
    assert not explanation.kernels
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, again = srelu24.ffn(*operands), srelu24.ffn(*operands)
    messages = [str(w.message) for w in caught if w.category is srelu24.FallbackWarning]
    assert len(messages) == 1
    assert explanation.why in messages[0]
    assert_close(y, dense_ffn(*operands))
    assert torch.equal(again, y)


def test_gradients_are_those_of_dense_pytorch(layer: Layer) -> None:
    def gradients(f: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (layer.x, layer.w1, layer.w2, layer.b1, layer.b2)]
        y = f(*leaves)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    with pytest.warns(srelu24.FallbackWarning, match="with a recipe trains sparsely"):
        ours = gradients(srelu24.ffn)
    for mine, theirs in zip(ours, gradients(dense_ffn), strict=True):
        assert_close(mine, theirs)


def test_without_gradients_trainable_weights_use_the_kernels(layer: Layer, kernels_only: None) -> None:
    expected = srelu24.ffn(layer.x, *layer.weights, mode="sparse")
    layer.w1.requires_grad_()
    with torch.no_grad():
        assert torch.equal(srelu24.ffn(layer.x, *layer.weights, mode="sparse"), expected)
        assert srelu24.explain(layer.x, *layer.weights, mode="sparse").runs == "kernels"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda o: srelu24.ffn(o.x, o.w1.cpu(), o.w2), "w1 is on cpu.*cuda"),
        (lambda o: srelu24.ffn(o.x.cpu(), o.w1, o.w2), "w1 is on cuda.*cpu"),
        (lambda o: srelu24.ffn(o.x, o.w1, o.w2.half()), "w2 is torch.float16"),
        (lambda o: srelu24.ffn(o.x, o.w1[:, :128], o.w2), r"w1 has shape \[1864, 128\]"),
        (lambda o: srelu24.ffn(o.x, o.w1, o.w2[:, :8]), r"w2 has shape \[136, 8\]"),
        (lambda o: srelu24.ffn(o.x, o.w1, o.w2, o.b2), r"b1 has shape \[136\]"),
        (lambda o: srelu24.gemm_relu2_24(o.x.float(), o.w1.float()), "needs the sparse kernels.*float32"),
        (lambda o: srelu24.gemm_relu2_24(misaligned(o.x), o.w1), "needs the sparse kernels.*16 bytes"),
        (lambda o: srelu24.sparsify24(o.x[:, :12]), "width of 12"),
        (lambda o: srelu24.sparsify24(o.x, "gelu"), "'gelu'.*none, relu2"),
        (lambda o: srelu24.matmul(srelu24.sparsify24(o.x), o.w2), r"w2 has shape .*\[\*, 136\]"),
        (lambda o: srelu24.matmul(srelu24.sparsify24(o.x), o.w1, None, o.x), "residual has shape"),
    ],
)
def test_wrong_input_is_refused(call: Callable[[Layer], object], words: str, layer: Layer) -> None:
    with pytest.raises(Unsupported, match=words):
        call(layer)


def test_explain_names_both_kernels(layer: Layer) -> None:
    explanation = srelu24.explain(layer.x, *layer.weights, layer.b1, mode="sparse")
    assert explanation.runs == "kernels"
    assert [str(k.problem) for k in explanation.kernels] == [
        f"gemm_relu2_24_bf16_bias 300x{F}x{D}",
        f"spgemm_bf16 300x{D}x{F}",
    ]
    text = str(explanation)
    assert all(k.spec.name in text and k.choice.why in text for k in explanation.kernels)


# ------------------------------------------------------------------------------------- torch.library, torch.compile


@pytest.mark.parametrize("name", ["ffn", "linear", "gemm_relu2_24", "gemm_relu2_24_count", "sparsify24", "matmul"])
def test_opcheck(name: str, device: torch.device) -> None:
    o = Layer(device, m=64)
    s = srelu24.gemm_relu2_24(o.x, o.w1, o.b1)
    arguments = {
        "ffn": (o.x, o.w1, o.w2, o.b1, None),
        "linear": (o.x, o.w1, o.b1, "relu2"),
        "gemm_relu2_24": (o.x, o.w1, None),
        "gemm_relu2_24_count": (o.x, o.w1, o.b1),
        "sparsify24": (o.x, "none"),
        "matmul": (s.values, s.metadata, o.w2, None, o.x),
    }
    torch.library.opcheck(getattr(torch.ops.srelu24, name).default, arguments[name])


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_torch_compile_of_the_whole_graph(dynamic: bool | None, device: torch.device, kernels_only: None) -> None:
    layer = Layer(device)

    def block(x: Tensor) -> Tensor:
        return x + srelu24.ffn(x, *layer.weights, layer.b1, layer.b2, mode="sparse")

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for rows in (300, 65, 64) if dynamic else (300,):
        x = layer.x[:rows]
        assert torch.equal(compiled(x), block(x))
    # Tokens in three dimensions too.
    x = layer.x.view(5, 60, D)
    assert torch.equal(compiled(x), block(x))


def test_torch_compile_through_packed_tensors(layer: Layer, kernels_only: None) -> None:
    def chain(x: Tensor) -> Tensor:
        s = srelu24.gemm_relu2_24(x, layer.w1, layer.b1)
        return srelu24.matmul(s, layer.w2, layer.b2, x)

    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True)
    assert torch.equal(compiled(layer.x), chain(layer.x))
