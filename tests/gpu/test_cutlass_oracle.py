"""Our packed S, in CUTLASS's order, through CUTLASS's own sparse GEMM: the same Y as from ours."""

from __future__ import annotations

import pytest
import torch
from tests.gpu.oracle import WGMMA, CutlassSpgemm
from torch import Tensor

import srelu24
from srelu24.fp8 import kernels
from srelu24.fp8.quantize import E4M3
from srelu24.numerics.dtypes import FragmentOrder
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.launch import Scales

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [  # M, D, F: one row, block edges, odd M, tails of D and F in every tile, F an odd multiple of 8
    (1, 8, 8),
    (63, 24, 24),
    (65, 264, 264),
    (128, 256, 512),
    (1000, 264, 1864),
    (1001, 2688, 1856),
    (777, 512, 15680),
]
PRODUCERS = ["gemm_relu2_24", "sparsify24", "sparsify24 none"]


@pytest.fixture(scope="session")
def cutlass() -> CutlassSpgemm:
    if not WGMMA.available:
        pytest.skip(f"no nvcc to build CUTLASS's sparse GEMM with, and no {WGMMA.path} built elsewhere")
    return CutlassSpgemm()


def packed_integers(producer: str, m: int, d: int, f: int, dtype: torch.dtype, seed: torch.Generator) -> Sparse24:
    """S with small integers, so that any order of summing is exact. About half its groups have zeros to keep."""
    if producer != "gemm_relu2_24":
        h = integers(-3, 3, (m, f), dtype, seed)
        return srelu24.sparsify24(h, activation="none" if producer == "sparsify24 none" else "relu2")
    # About 24 non-zeros in a row of X keep the squares small, whatever D is.
    sparse = torch.rand(m, d, device="cuda", generator=seed) < 24 / d
    return srelu24.gemm_relu2_24(integers(-1, 1, (m, d), dtype, seed) * sparse, integers(-1, 1, (f, d), dtype, seed))


def integers(low: int, high: int, shape: tuple[int, int], dtype: torch.dtype, seed: torch.Generator) -> Tensor:
    return torch.randint(low, high + 1, shape, device="cuda", generator=seed).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize(("m", "d", "f"), SHAPES)
def test_integers_bit_for_bit(
    cutlass: CutlassSpgemm, producer: str, m: int, d: int, f: int, dtype: torch.dtype
) -> None:
    """CUTLASS, our kernel and float64 agree in every bit where no sum is rounded."""
    seed = torch.Generator("cuda").manual_seed(m + f)
    s = packed_integers(producer, m, d, f, dtype, seed)
    w2 = integers(-2, 2, (d, f), dtype, seed)
    dense = s.to_dense().double()
    assert (dense.abs() @ w2.double().abs().T).max() < 2**24, "every partial sum must be exact in fp32"
    exact = (dense @ w2.double().T).float().to(dtype)
    assert exact.count_nonzero() > exact.numel() // 8, "the data must say something"
    assert torch.equal(cutlass(s, w2), exact)
    assert torch.equal(srelu24.matmul(s, w2), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, 1.8], ids=["half dense", "a tenth dense"])
@pytest.mark.parametrize(("m", "d", "f"), SHAPES[2:])
def test_real_data(cutlass: CutlassSpgemm, m: int, d: int, f: int, shift: float, dtype: torch.dtype) -> None:
    """On an FFN's data, both kernels are a rounding away from the exact product and so from one another."""
    seed = torch.Generator("cuda").manual_seed(m + f)
    x = torch.randn(m, d, device="cuda", generator=seed) + 1
    w1 = torch.randn(f, d, device="cuda", generator=seed) / d**0.5 - shift / d
    w2 = (torch.randn(d, f, device="cuda", generator=seed) / f**0.5).to(dtype)
    s = srelu24.gemm_relu2_24(x.to(dtype), w1.to(dtype))
    theirs, ours = cutlass(s, w2).double(), srelu24.matmul(s, w2).double()
    dense, weights = s.to_dense().double(), w2.double()
    exact = dense @ weights.T

    # Half an ulp of the result, rounded to storage, and fp32 noise in proportion to the norms of what is multiplied:
    # sqrt(F) roundings of partial sums that Cauchy-Schwarz bounds.
    noise = 2.0**-22 * f**0.5 * dense.norm(dim=1)[:, None] * weights.norm(dim=1)
    storage = torch.finfo(dtype)
    rounding = storage.eps / 2 * (exact.abs() + noise + storage.smallest_normal)
    for y in (theirs, ours):
        assert ((y - exact).abs() <= rounding + noise).all()
    # Sums that noise carries over a rounding boundary are rare; elsewhere the two are the same number.
    assert (theirs != ours).double().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_cutlass_puts_kept_values(cutlass: CutlassSpgemm, dtype: torch.dtype) -> None:
    """Each row has one group with a 1 and a 16, and W2 spells column numbers in binary: Y names both columns."""
    m, f, bits = 1040, 520, 10
    rows, bit = torch.arange(m, device="cuda"), torch.arange(bits, device="cuda")
    group = 33 * rows % (f // 4)
    pairs = torch.tensor([(p, q) for q in range(4) for p in range(q)], device="cuda")
    one, sixteen = (4 * group[:, None] + pairs[rows % len(pairs)]).T
    h = torch.zeros(m, f, dtype=dtype, device="cuda")
    h[rows, one], h[rows, sixteen] = 1, 16
    w2 = torch.zeros(16, f, dtype=dtype, device="cuda")
    w2[:bits] = torch.arange(f, device="cuda") >> bit[:, None] & 1
    y = cutlass(srelu24.sparsify24(h, activation="none"), w2)[:, :bits].long()
    assert torch.equal(y, (one[:, None] >> bit & 1) + 16 * (sixteen[:, None] >> bit & 1))


@pytest.mark.parametrize("producer", ["gemm_relu2_24", "square_rows"])
@pytest.mark.parametrize(("m", "d", "f"), [(1, 16, 16), (65, 272, 272), (1001, 2688, 1856), (777, 512, 15680)])
def test_integers_in_8_bits_bit_for_bit(cutlass: CutlassSpgemm, producer: str, m: int, d: int, f: int) -> None:
    """S as our 8-bit kernels write it, in CUTLASS's order, through CUTLASS's 8-bit sparse GEMM and through ours."""
    seed = torch.Generator("cuda").manual_seed(m + f)
    sparse = torch.rand(m, d, device="cuda", generator=seed) < 6 / d
    x = (integers(-1, 1, (m, d), torch.bfloat16, seed) * sparse).to(E4M3)
    w1 = integers(-1, 1, (f, d), torch.bfloat16, seed).to(E4M3)
    few = torch.rand(d, f, device="cuda", generator=seed) < 64 / f
    w2 = (integers(-2, 2, (d, f), torch.bfloat16, seed) * few).to(E4M3)
    ones = torch.ones(max(m, d, f), device="cuda")
    if producer == "gemm_relu2_24":
        s = Sparse24.empty(m, f, E4M3, "cuda")
        saturated = torch.zeros((), dtype=torch.int64, device="cuda")
        kernels.gemm_relu2_24(x, w1, None, s, Scales(a=ones, b=ones, s_inverse=ones, saturated=saturated))
    else:
        r = Sparse24.empty(m, f, torch.bfloat16, "cuda", FragmentOrder.BITS8)
        kernels.gemm_relu2_24(x, w1, None, r, Scales(a=ones, b=ones, r_largest=torch.zeros(m, device="cuda")))
        s = r.with_room_for(E4M3)
        kernels.square_rows(r, s, Scales(r_largest=16 * ones, rows=torch.empty(m, device="cuda")))
    dense = s.to_dense().double()
    exact = (dense @ w2.double().T).float()
    assert exact.count_nonzero() > exact.numel() // 16, "the data must say something"
    ours = torch.empty(m, d, dtype=torch.bfloat16, device="cuda")
    kernels.spgemm(s, w2, None, ours, Scales(a=ones, b=ones))
    assert torch.equal(cutlass(s, w2), exact.bfloat16())
    assert torch.equal(ours, exact.bfloat16())
