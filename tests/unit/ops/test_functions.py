"""The operations on a CPU: the reference's answers, one warning for each fallback, and what torch needs of an op."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import srelu24
from srelu24.fp8.quantize import E4M3
from srelu24.numerics import reference
from srelu24.numerics.activations import rule_of
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime import fallback
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import PRUNED_ACTIVATIONS, Activation, pruning_op

M, D, F = 20, 40, 72

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    fallback.warn_again()


class Layer:
    """A small layer with biases."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, d: int = D, f: int = F) -> None:
        random = torch.Generator().manual_seed(0)
        shapes = ((M, d), (f, d), (d, f), (f,), (d,))
        tensors = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
        self.x, self.w1, self.w2, self.b1, self.b2 = tensors

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.x, self.w1, self.w2, self.b1, self.b2


@pytest.fixture
def layer() -> Layer:
    return Layer()


def same(a: Sparse24, b: Sparse24) -> bool:
    return a.shape == b.shape and torch.equal(a.values, b.values) and torch.equal(a.metadata, b.metadata)


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    return linear(linear(x, w1, b1).relu().square(), w2, b2)


# -------------------------------------------------------------------------------------------------------- the answers


@dtypes
def test_operations_are_the_reference(dtype: torch.dtype) -> None:
    o = Layer(dtype)
    assert torch.equal(srelu24.ffn(*o.all), reference.ffn(*o.all))
    assert torch.equal(srelu24.ffn(o.x, o.w1, o.w2), reference.ffn(o.x, o.w1, o.w2))
    expected = reference.gemm(o.x, o.w1, o.b1, activation=Activation.RELU2)
    assert torch.equal(srelu24.linear(o.x, o.w1, o.b1, "relu2"), expected)
    assert torch.equal(srelu24.linear(o.x, o.w1), reference.gemm(o.x, o.w1))
    s, counts = srelu24.gemm_relu2_24_count(o.x, o.w1, o.b1)
    assert same(s, reference.gemm_relu2_24(o.x, o.w1, o.b1))
    assert same(s, srelu24.gemm_relu2_24(o.x, o.w1, o.b1))
    assert torch.equal(counts, reference.count_nonzeros(o.x, o.w1, o.b1))
    assert torch.equal(srelu24.matmul(s, o.w2, o.b2, o.x), reference.spgemm(s, o.w2, o.b2, o.x))
    for activation in Activation:
        assert same(srelu24.sparsify24(o.x, activation.value), reference.sparsify24(o.x, activation))
    assert same(srelu24.sparsify24(o.x), reference.sparsify24(o.x, Activation.RELU2))


@dtypes
@pytest.mark.parametrize("activation", PRUNED_ACTIVATIONS.values())
def test_every_pruned_activation_runs_fused_and_as_an_ffn(dtype: torch.dtype, activation: Activation) -> None:
    o = Layer(dtype)
    o.x = o.x / 8  # so that fp16 holds higher powers, too
    sums = linear(o.x.double(), o.w1.double(), o.b1.double()).to(dtype)
    hidden = reference.sparsify24(sums, activation)
    s = srelu24.gemm_24(o.x, o.w1, o.b1, activation.value)
    assert same(s, reference.gemm_24(o.x, o.w1, o.b1, activation))
    near = (s.to_dense().double() - hidden.to_dense().double()).norm() / hidden.to_dense().double().norm()
    assert near < 0.02, "sums are rounded once before the activation, here twice"
    y = srelu24.ffn(*o.all, activation=activation.value)
    assert torch.equal(y, srelu24.matmul(s, o.w2, o.b2))
    assert torch.equal(srelu24.ffn(*o.all, activation=activation.value, mode="dense"), dense_ffn_of(activation, *o.all))
    op = getattr(torch.ops.srelu24, f"{pruning_op(activation).value}_count")
    assert torch.equal(op(o.x, o.w1, o.b1)[2], reference.count_nonzeros(o.x, o.w1, o.b1, activation))
    torch.library.opcheck(op.default, (o.x, o.w1, o.b1))
    torch.library.opcheck(torch.ops.srelu24.ffn.default, (*o.all, "sparse", activation.value))


def dense_ffn_of(activation: Activation, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return linear(rule_of(activation).plain(linear(x, w1, b1)), w2, b2)


@pytest.mark.parametrize("shape", [(D,), (1, D), (4, 5, D), (2, 2, 5, D), (0, D), (3, 0, D)])
def test_leading_dimensions(shape: tuple[int, ...], layer: Layer) -> None:
    x = layer.x.flatten()[: torch.Size(shape).numel()].view(shape)
    y = srelu24.ffn(x, layer.w1, layer.w2, layer.b1, layer.b2)
    assert torch.equal(y, reference.ffn(x.reshape(-1, D), *layer.all[1:]).view(shape))
    assert srelu24.linear(x, layer.w1).shape == (*shape[:-1], F)


# ----------------------------------------------------------------------------------------------- fallbacks and errors


def messages(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is srelu24.FallbackWarning]


@pytest.mark.parametrize(("dtype", "d", "reason"), [(torch.float32, D, "float32"), (torch.bfloat16, 12, "width of 12")])
def test_a_fallback_is_dense_and_warns_once(dtype: torch.dtype, d: int, reason: str) -> None:
    o = Layer(dtype, d)
    first = messages(lambda: srelu24.ffn(*o.all))
    assert len(first) == 1
    assert reason in first[0]
    assert srelu24.explain(*o.all).why in first[0]
    assert messages(lambda: srelu24.ffn(*o.all)) == []
    assert torch.equal(srelu24.ffn(*o.all), dense_ffn(*o.all))


def test_another_reason_warns_again() -> None:
    wide, single = Layer(d=12), Layer(torch.float32)
    assert len(messages(lambda: (srelu24.ffn(*wide.all), srelu24.ffn(*single.all), srelu24.ffn(*wide.all)))) == 2


def test_gradients_are_those_of_dense_pytorch(layer: Layer) -> None:
    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in layer.all]
        y = f(*leaves)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    with pytest.warns(srelu24.FallbackWarning, match="with a recipe.*no_grad"):
        ours = run(srelu24.ffn)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, run(dense_ffn), strict=True))


def test_without_recording_gradients_nothing_falls_back(layer: Layer) -> None:
    layer.w1.requires_grad_()
    with torch.no_grad():
        assert messages(lambda: srelu24.ffn(*layer.all)) == []
        assert torch.equal(srelu24.ffn(*layer.all), reference.ffn(*layer.all))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda o: srelu24.ffn(o.x, o.w1, o.w1), r"w2 has shape \[72, 40\]; \[40, 72\] is needed"),
        (lambda o: srelu24.ffn(o.x, o.w1, o.w2.half()), "w2 is torch.float16 and the input torch.bfloat16"),
        (lambda o: srelu24.ffn(torch.tensor(1.0), o.w1, o.w2), "x has no dimensions"),
        (lambda o: srelu24.ffn(None, o.w1, o.w2), "x is a NoneType; a torch.Tensor is needed"),
        (lambda o: srelu24.ffn(o.x, None, o.w2), "w1 is a NoneType"),
        (lambda o: srelu24.ffn(o.x, o.w1, [1.0]), "w2 is a list"),
        (lambda o: srelu24.ffn(o.x.to(E4M3), o.w1.to(E4M3), o.w2.to(E4M3)), "w1 is torch.float8_e4m3fn; bfloat16"),
        (lambda o: srelu24.ffn(o.x, o.w1, o.w2, recipe=srelu24.Recipe()), r"give the state of this layer"),
        (lambda o: srelu24.linear(torch.tensor(1.0), o.w1), "x has no dimensions|x has shape"),
        (lambda o: srelu24.linear(o.x, o.w2), r"w has shape \[40, 72\]; \[\*, 40\]"),
        (lambda o: srelu24.linear(o.x, o.w1, o.b2), r"bias has shape \[40\]; \[72\]"),
        (lambda o: srelu24.linear(o.x, o.w1, None, "gelu"), "activation is 'gelu'; it must be one of none, relu2"),
        (lambda o: srelu24.gemm_relu2_24(o.x[None], o.w1), r"x has shape \[1, 20, 40\]; \[\*, \*\]"),
        (lambda o: srelu24.gemm_relu2_24(o.x, o.w1, o.b2), "b1 has shape"),
        (lambda o: srelu24.gemm_relu2_24_count(o.x, o.w2), "w1 has shape"),
        (lambda o: srelu24.gemm_relu2_24(o.x.float(), o.w1.float()), "float32"),
        (lambda o: srelu24.gemm_relu2_24(o.x, o.w1[:12]), "12"),
        (lambda o: srelu24.sparsify24(o.x[0]), r"h has shape \[40\]"),
        (lambda o: srelu24.sparsify24(o.x[:, :12]), "12"),
        (lambda o: srelu24.sparsify24(o.x, "gelu"), "activation is 'gelu'"),
        (lambda o: srelu24.gemm_24(o.x, o.w1, None, "none"), "no kernel prunes the results of the activation none"),
        (lambda o: srelu24.ffn(o.x, o.w1, o.w2, activation="gelu"), "activation is 'gelu'"),
        (lambda o: srelu24.ffn(o.x, o.w1, o.w2, activation="relu", recipe="rowwise"), "a recipe computes squared"),
        (lambda o: srelu24.matmul(o.x, o.w1), r"s is a Tensor; a Sparse24 is needed"),
        (lambda o: srelu24.matmul(srelu24.sparsify24(o.x), o.w2), r"w2 has shape \[40, 72\]; \[\*, 40\]"),
        (lambda o: srelu24.matmul(srelu24.sparsify24(o.x), o.w1, o.b2), "bias has shape"),
        (
            lambda o: srelu24.matmul(srelu24.sparsify24(o.x), o.w1, None, o.x),
            r"residual has shape \[20, 40\]; \[20, 72\]",
        ),
    ],
)
def test_wrong_input_is_refused(call: Callable[[Layer], object], words: str, layer: Layer) -> None:
    with pytest.raises(Unsupported, match=words):
        call(layer)


# ------------------------------------------------------------------------------------- torch.library, torch.compile


@pytest.mark.parametrize("f", [64, 72])  # without and with padding of packed rows
@pytest.mark.parametrize("name", ["ffn", "linear", "gemm_relu2_24", "gemm_relu2_24_count", "sparsify24", "matmul"])
def test_opcheck(name: str, f: int) -> None:
    o = Layer(f=f)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("f", [64, 72])
def test_the_whole_graph_is_traced(f: int, dynamic: bool | None) -> None:
    o = Layer(f=f)

    def block(x: Tensor) -> Tensor:
        s = srelu24.gemm_relu2_24(x, o.w1, o.b1)
        return srelu24.ffn(x, o.w1, o.w2, o.b1, o.b2) + srelu24.matmul(s, o.w2, None, x)

    torch.compiler.reset()
    traced = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (M, 7, 3):
        assert torch.equal(traced(o.x[:rows]), block(o.x[:rows]))


@pytest.mark.parametrize("m", [0, 1, 65])
@pytest.mark.parametrize("f", [8, 24, 264])
def test_fake_results_have_the_layout_of_real_ones(m: int, f: int) -> None:
    x, w1 = torch.zeros(m, 8, dtype=torch.bfloat16), torch.zeros(f, 8, dtype=torch.bfloat16)
    real = torch.ops.srelu24.gemm_relu2_24_count(x, w1, None)
    fake = torch.ops.srelu24.gemm_relu2_24_count(x.to("meta"), w1.to("meta"), None)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
    assert m < 2 or [t.stride() for t in fake] == [t.stride() for t in real]


# ---------------------------------------------------------------------------------------------------- batch invariance


def test_batch_invariance_is_the_same_function(layer: Layer) -> None:
    assert torch.equal(srelu24.ffn(*layer.all, deterministic="batch"), srelu24.ffn(*layer.all))


def test_what_cannot_be_batch_invariant_is_refused_not_computed_dense(layer: Layer) -> None:
    odd = Layer(d=41)
    with pytest.raises(Unsupported, match="Batch-invariant results need the sparse kernels: a width of 41"):
        srelu24.ffn(*odd.all, deterministic="batch")
    with pytest.raises(Unsupported, match="gradients are recorded"):
        srelu24.ffn(layer.x, layer.w1.requires_grad_(), layer.w2, deterministic="batch")
    assert srelu24.explain(*odd.all, deterministic="batch").runs == "nothing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"deterministic": "always"}, "deterministic is 'always'; it must be run or batch"),
        ({"deterministic": "batch", "mode": "dense"}, "The dense FFN is not batch-invariant"),
    ],
)
def test_wrong_determinism_is_refused(arguments: dict[str, str], words: str, layer: Layer) -> None:
    for call in (srelu24.ffn, srelu24.explain):
        with pytest.raises(Unsupported, match=words):
            call(*layer.all, **arguments)  # type: ignore[operator]
