"""The training kernels against the reference step, every configuration, and a whole training step on the device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import srelu24
from srelu24.numerics import reference as numerics
from srelu24.numerics.sparse24 import Sparse24, unpack_metadata
from srelu24.training import kernels, movers, reference
from srelu24.training.order import padded, token_order
from srelu24.training.packed import TokenSparse24
from srelu24.training.reference import Pruning
from srelu24_gen import space
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Producer
from srelu24_gen.target import TARGETS

TARGET = TARGETS["h200"]
SIZES = [(16, 64, 64), (272, 128, 320), (1040, 192, 256), (384, 1024, 832), (2048, 512, 2048)]
"""M, D, F."""

sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
strides = pytest.mark.parametrize("stride", [None, 1], ids=["widest", "natural"])

FAMILIES = {
    "hidden": Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2, count_nonzeros=True, tokens=True, permuted=True),
    "gradient": Family(Op.GEMM_DRELU2_24, DType.BF16, tokens=True, permuted=True),
    "product": Family(Op.SPGEMM, DType.BF16, permuted=True),
    "weights": Family(Op.SPGEMM_TOKENS, DType.BF16),
    "weights, added in fp32": Family(Op.SPGEMM_TOKENS, DType.BF16, out=DType.FP32, accumulate=True),
    "weights, transposed": Family(Op.SPGEMM_TOKENS, DType.BF16, transposed=True),
}


def configs(family: Family) -> list[KernelConfig]:
    """Every tile, cluster, producer, with and without stream-K."""
    found = []
    for tile, cluster_m, producer, stream_k in itertools.product(space.tiles(TARGET), (1, 2), Producer, (False, True)):
        base = KernelConfig(*tile, cluster_m=cluster_m, producer=producer, stream_k=stream_k)
        config = dataclasses.replace(base, stages=space.max_stages(family, base, TARGET))
        if space.supports_config(family, config, TARGET).ok:
            found.append(config)
    return found


CASES = [(name, config) for name, family in FAMILIES.items() for config in configs(family)]
SPECS = [KernelSpec(FAMILIES[name], config) for name, config in CASES]


def name_of(value: object) -> str:
    return KernelSpec(FAMILIES["weights"], value).name[-30:] if isinstance(value, KernelConfig) else str(value)


def integers(*shape: int, most: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Their sums are exact in any order."""
    random = torch.Generator(device).manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=random, device=device).to(dtype)


def rows(m: int, stride: int | None, device: torch.device) -> Tensor:
    """The token of every row."""
    return token_order(m, stride, device).view(-1, 8, 2).transpose(1, 2).reshape(-1)


def by_position(s: Sparse24) -> Tensor:
    """Rows of a packed matrix in the order of positions."""
    m, f = s.shape
    return s.to_dense().view(m // 16, 2, 8, f).transpose(1, 2).reshape(m, f)


def same_packed(ours: Sparse24, expected: Sparse24) -> None:
    assert torch.equal(ours.values.view(torch.int16), expected.values.view(torch.int16))
    assert torch.equal(unpack_metadata(ours.metadata, *ours.shape), unpack_metadata(expected.metadata, *ours.shape))


def is_pruned_along_tokens(ours: TokenSparse24, s: Sparse24) -> None:
    """Bit for bit what sparsify24 makes of the transpose."""
    same_packed(ours.transposed(), numerics.sparsify24(by_position(s).T.contiguous(), Activation.NONE))


def hidden(m: int, d: int, f: int, dtype: torch.dtype, device: torch.device, stride: int | None) -> None:
    x = integers(m, d, most=2, dtype=dtype, device=device, seed=1)
    w1 = integers(f, d, most=1, dtype=dtype, device=device, seed=2)
    s, along_tokens, counts = kernels.pruned_hidden(x, w1, None, stride)
    permuted = x[rows(m, stride, device)]
    same_packed(s, numerics.gemm_relu2_24(permuted, w1))
    assert torch.equal(counts, numerics.count_nonzeros(x, w1))
    is_pruned_along_tokens(along_tokens, s)


def gradient(m: int, d: int, f: int, dtype: torch.dtype, device: torch.device, stride: int | None) -> None:
    x = integers(m, f, most=9, dtype=dtype, device=device, seed=3)
    s = numerics.sparsify24(x, Activation.RELU2)  # rows in the kernels' order
    g = integers(m, d, most=2, dtype=dtype, device=device, seed=4)
    w2 = integers(d, f, most=1, dtype=dtype, device=device, seed=5)
    dy1, along_tokens = kernels.hidden_gradient(g, w2.T.contiguous(), s, stride)
    ds = (g[rows(m, stride, device)].float() @ w2.float()).to(dtype)
    dense = s.to_dense()
    expected = torch.where(dense != 0, (2 * ds.float() * dense.float().sqrt()).to(dtype), 0.0)
    assert dy1.metadata is s.metadata
    ours = dy1.to_dense()
    assert torch.equal(ours == 0, expected == 0)
    torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps, atol=0)  # its root is approximate
    is_pruned_along_tokens(along_tokens, dy1)


def product(m: int, d: int, f: int, dtype: torch.dtype, device: torch.device, stride: int | None) -> None:
    x = integers(m, f, most=2, dtype=dtype, device=device, seed=6)
    s = numerics.sparsify24(x, Activation.NONE)
    w = integers(d, f, most=1, dtype=dtype, device=device, seed=7)
    y = kernels.product(s, w, None, stride)
    assert torch.equal(y[rows(m, stride, device)], numerics.spgemm(s, w))


def weights(
    m: int, d: int, f: int, dtype: torch.dtype, device: torch.device, stride: int | None, kind: str = "weights"
) -> None:
    x = integers(m, f, most=2, dtype=dtype, device=device, seed=8)  # by position
    a = TokenSparse24.of_transposed(numerics.sparsify24(x.T.contiguous(), Activation.NONE), m)
    b = integers(m, d, most=1, dtype=dtype, device=device, seed=9)
    expected = a.to_dense().float().T @ b[token_order(m, stride, device)].float()
    if kind == "weights, added in fp32":
        out = integers(f, d, most=100, dtype=torch.float32, device=device, seed=10)
        expected += out
        assert kernels.weight_gradient(a, b, stride, out=out) is out
        assert torch.equal(out, expected)
    elif kind == "weights, transposed":
        assert torch.equal(kernels.weight_gradient(a, b, stride, transposed=True), expected.T.to(dtype))
    else:
        assert torch.equal(kernels.weight_gradient(a, b, stride), expected.to(dtype))


CHECKS = {"hidden": hidden, "gradient": gradient, "product": product}


@dtypes
@pytest.mark.parametrize("shape", [(64, 64), (8, 200), (1000, 72), (4096, 1088)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_weights_are_transposed(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    w = torch.randn(shape[0], shape[1] + 8, dtype=dtype, device=device)[:, : shape[1]]
    assert torch.equal(movers.transposed(w), w.T)


@sizes
@strides
@pytest.mark.parametrize("count", [1, 64, 200])
def test_dense_features_are_split_off(
    size: tuple[int, int, int], stride: int | None, count: int, device: torch.device
) -> None:
    m, _, f = size
    s = numerics.sparsify24(integers(m, f, most=9, dtype=torch.bfloat16, device=device, seed=3), Activation.RELU2)
    along_tokens = TokenSparse24.of_transposed(
        numerics.sparsify24(torch.randn(f, m, dtype=torch.bfloat16, device=device), Activation.NONE), m
    )
    left = along_tokens.values.clone()
    chosen = torch.randperm(f, device=device)[:count]
    found = movers.dense_columns(s, chosen, stride, along_tokens)
    assert torch.equal(found[rows(m, stride, device)], s.to_dense()[:, chosen])
    left[:, chosen] = 0
    assert torch.equal(along_tokens.values, left)
    movers.clear_columns(along_tokens, torch.arange(f, device=device))
    assert not along_tokens.values.any()


@pytest.fixture
def configured(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernel of a case serves all its family's problems."""
    name, config = request.param
    with kernels.fixed_config(config):
        yield name


# ------------------------------------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize("configured", CASES, indirect=True, ids=lambda case: f"{case[0]}-{name_of(case[1])}")
def test_every_configuration(configured: str, device: torch.device) -> None:
    for size in SIZES:
        for stride in (None, 1):
            if configured in CHECKS:
                CHECKS[configured](*size, torch.bfloat16, device, stride)
            else:
                weights(*size, torch.bfloat16, device, stride, configured)


@sizes
@dtypes
@strides
@pytest.mark.parametrize("name", [*CHECKS, "weights", "weights, added in fp32", "weights, transposed"])
def test_what_the_dispatcher_chooses(
    name: str, size: tuple[int, int, int], dtype: torch.dtype, stride: int | None, device: torch.device
) -> None:
    if name in CHECKS:
        CHECKS[name](*size, dtype, device, stride)
    else:
        weights(*size, dtype, device, stride, name)


def test_no_tokens(device: torch.device) -> None:
    x, w = torch.empty(0, 64, dtype=torch.bfloat16, device=device), torch.ones(128, 64, dtype=torch.bfloat16).to(device)
    s, along_tokens, counts = kernels.pruned_hidden(x, w, None, None)
    assert s.shape == (0, 128)
    assert not counts.any()
    assert not kernels.weight_gradient(along_tokens, x, None).any()
    assert padded(0) == 0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nothing_reaches_what_is_pruned(bad: float, device: torch.device) -> None:
    m, d, f = 256, 128, 512
    x = torch.randn(m, f, generator=torch.Generator(device).manual_seed(0), device=device).bfloat16()
    s = numerics.sparsify24(x, Activation.RELU2)
    g = torch.randn(m, d, device=device).bfloat16()
    g[17] = bad
    dy1, along_tokens = kernels.hidden_gradient(g, torch.randn(f, d, device=device).bfloat16(), s, 1)
    dense = dy1.to_dense()
    assert not dense[s.to_dense() == 0].any()
    assert dense[torch.arange(m, device=device) != 17].isfinite().all()
    is_pruned_along_tokens(along_tokens, dy1)


def test_equal_inputs_give_equal_bits(device: torch.device) -> None:
    m, d, f = 2048, 512, 2048
    random = torch.Generator(device).manual_seed(0)
    x, w1 = (torch.randn(n, d, generator=random, device=device).bfloat16() for n in (m, f))
    first = kernels.pruned_hidden(x, w1, None, None)
    again = kernels.pruned_hidden(x, w1, None, None)
    for a, b in zip(first[:2], again[:2], strict=True):
        assert torch.equal(a.values, b.values)
    for _ in range(3):
        assert torch.equal(kernels.weight_gradient(first[1], x, None), kernels.weight_gradient(again[1], x, None))


# ------------------------------------------------------------------------------------------------------- a whole step


def correlated(m: int, d: int, device: torch.device) -> Tensor:
    """Tokens that resemble the one before."""
    random = torch.Generator(device).manual_seed(1)
    x = torch.randn(m, d, generator=random, device=device)
    for i in range(1, m):
        x[i] = 0.95 * x[i - 1] + 0.3 * x[i]
    return x.bfloat16()


@strides
@pytest.mark.parametrize("data", ["random", "correlated"])
def test_a_step_of_kernels_is_the_reference_step(data: str, stride: int | None, device: torch.device) -> None:
    m, d, f = 2048, 512, 2048
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * shape[-1] ** -0.5).bfloat16()

    x = normal(m, d) * d**0.5 if data == "random" else correlated(m, d, device)
    w1, w2, g = normal(f, d), normal(d, f), normal(m, d)
    pruning = Pruning(torch.empty(0, dtype=torch.int64, device=device), stride)
    step = reference.forward(x, w1, w2, pruning=pruning)
    expected = reference.backward(g, x, w1, w2, step.hidden, pruning=pruning)

    s, s_tokens, counts = kernels.pruned_hidden(x, w1, None, stride)
    y = kernels.product(s, w2, None, stride)
    dy1, dy1_tokens = kernels.hidden_gradient(g, w2.T.contiguous(), s, stride)
    dx = kernels.product(dy1, w1.T.contiguous(), None, stride)
    dw1 = kernels.weight_gradient(dy1_tokens, x, stride)
    dw2 = kernels.weight_gradient(s_tokens, g, stride, transposed=True)
    assert (counts - step.counts).abs().sum() <= 1e-3 * step.counts.sum()
    for name, ours, wanted in (
        ("y", y, step.y),
        ("dx", dx, expected.x),
        ("dw1", dw1, expected.w1),
        ("dw2", dw2, expected.w2),
    ):
        assert wanted is not None
        error = (ours.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < 1e-2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_on_the_device(dtype: torch.dtype, device: torch.device) -> None:
    """The public operation: dense, then sparse, close to the same layer in fp64 on the CPU."""
    m, d, f = 256, 64, 512
    random = torch.Generator().manual_seed(0)
    host = [torch.randn(s, generator=random).mul(s[-1] ** -0.5) for s in ((m, d), (f, d), (d, f), (m, d))]
    x, w1, w2, g = (t.to(dtype) for t in host)
    recipes = {
        "cuda": srelu24.Recipe(warmup_steps=1),
        "cpu": srelu24.Recipe(warmup_steps=1),
    }
    results: dict[str, list[Tensor]] = {"cuda": [], "cpu": []}
    for kind, recipe in recipes.items():
        to = (lambda t: t.to(device)) if kind == "cuda" else (lambda t: t.double())
        leaves = [to(t).requires_grad_() for t in (x, w1, w2)]
        layer = recipe.layer("ffn", leaves[1])
        for _ in range(2):
            y = srelu24.ffn(*leaves, recipe=layer)
            results[kind] += [y.detach(), *torch.autograd.grad(y, leaves, to(g))]
            recipe.step()
    for ours, exact in zip(results["cuda"], results["cpu"], strict=True):
        difference = (ours.cpu().double() - exact.double()).norm()
        assert difference < 0.1 * exact.double().norm()  # near ties may be kept differently


class Training:
    """A layer whose steps run on the kernels."""

    def __init__(self, device: torch.device, warmup_steps: int) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).mul(shape[-1] ** -0.5).to(device, torch.bfloat16)

        self.leaves = [t.requires_grad_() for t in (normal(256, 128), normal(512, 128), normal(128, 512))]
        self.g = normal(256, 128)
        self.recipe = srelu24.Recipe(warmup_steps=warmup_steps)
        self.state = self.recipe.layer("ffn", self.leaves[1])

    def forward(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return srelu24.ffn(x, w1, w2, recipe=self.state)

    def gradients(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(*self.leaves), self.leaves, self.g)


def test_compiled_code_switches_by_itself(device: torch.device) -> None:
    eager, compiled = Training(device, 1), Training(device, 1)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    for _ in range(3):
        for a, b in zip(eager.gradients(), compiled.gradients(), strict=True):
            assert torch.equal(a, b)
        assert eager.recipe.step() == compiled.recipe.step()
    assert compiled.recipe.sparse


def test_a_step_in_a_cuda_graph(device: torch.device) -> None:
    training = Training(device, 0)
    expected = training.gradients()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            training.gradients()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training.gradients()
    for gradient in captured:
        gradient.zero_()
    graph.replay()
    for ours, wanted in zip(captured, expected, strict=True):
        assert torch.equal(ours, wanted)


def test_buffers_and_dense_features(device: torch.device) -> None:
    training = Training(device, 0)
    x, w1, w2 = training.leaves
    w1_grad, w2_grad = torch.ones(512, 128, device=device), torch.ones(128, 512, device=device)
    _, dw1, dw2 = training.gradients()
    training.state.accumulate_into(w1_grad, w2_grad)
    training.forward(x, w1, w2).backward(training.g)
    for buffer, gradient in ((w1_grad, dw1), (w2_grad, dw2)):
        difference = (buffer - 1 - gradient.float()).norm()
        assert difference < 1e-2 * gradient.float().norm()
    # A dense feature has the gradient of the reference with nothing pruned along tokens.
    feature = training.state.dense_features[0]
    everything = Pruning(torch.arange(512, device=device))
    step = reference.forward(x.detach(), w1.detach(), w2.detach(), pruning=everything)
    exact = reference.backward(training.g, x.detach(), w1.detach(), w2.detach(), step.hidden, pruning=everything)
    assert exact.w1 is not None
    assert (dw1[feature].float() - exact.w1[feature]).norm() < 2e-2 * exact.w1[feature].norm()
