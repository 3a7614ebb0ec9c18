"""The 8-bit kernels against docs/fp8.md, bit by bit where sums are exact; test_fp8_forward.py runs them together."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from srelu24.fp8 import quantize, reference
from srelu24.fp8.quantize import E4M3, E5M2, QuantizedRows
from srelu24.numerics.dtypes import TORCH_DTYPE, FragmentOrder
from srelu24.numerics.reference import prune24
from srelu24.numerics.sparse24 import Sparse24, row_stride
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands, Scales
from srelu24_gen import space
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem, Producer
from srelu24_gen.target import target_by_key

TARGET = target_by_key("h200")
"""With ``--family sm80`` it is for the portable kernels."""
NATIVE = TARGET.portable != TARGET
RELU2 = Activation.RELU2
WIDE = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16}

# ------------------------------------------------------------------------------------------------------- what is run


def configs(family: Family) -> Iterator[KernelConfig]:
    """Every tile, producer and cluster that the family has, with and without stream-K; raster groups take turns."""
    if TARGET.portable == TARGET:
        yield from {c.compiled(): c for c in space.candidates(Problem(family, 64, 4096, 4096), TARGET)}.values()
        return
    groups = itertools.cycle((8, 1, 4, 2, 16))
    shapes = itertools.product(space.tiles(TARGET), (1, 2), Producer, (False, True))
    for (tile_m, tile_n), cluster_m, producer, stream_k in shapes:
        c = KernelConfig(
            tile_m, tile_n, 128, cluster_m, producer=producer, stream_k=stream_k, raster_group=next(groups)
        )
        c = dataclasses.replace(c, stages=space.max_stages(family, c, TARGET))
        if space.supports_config(family, c, TARGET).ok:
            yield c


TO_E4M3 = Family(Op.GEMM_RELU2_24, DType.E4M3, RELU2, out=DType.E4M3)
TO_BF16 = Family(Op.GEMM_RELU2_24, DType.E4M3, RELU2, out=DType.BF16)
SPGEMM = Family(Op.SPGEMM, DType.E4M3, out=DType.BF16)
DENSE = Family(Op.GEMM, DType.E4M3, out=DType.BF16)
OPTIONS = [
    dataclasses.replace(TO_E4M3, bias=True, weight=DType.E5M2),
    dataclasses.replace(TO_BF16, bias=True),
    dataclasses.replace(TO_E4M3, promote=True),
    dataclasses.replace(TO_BF16, promote=True, bias=True),
    dataclasses.replace(SPGEMM, bias=True, residual=True),
    dataclasses.replace(SPGEMM, out=DType.FP16, residual=True, weight=DType.E5M2),
    dataclasses.replace(SPGEMM, promote=True, bias=True),
    dataclasses.replace(DENSE, promote=True),
]


def default(family: Family) -> KernelConfig:
    return space.default(Problem(family, 4096, 4096, 4096), TARGET)


def spec_of(family: Family, config: KernelConfig) -> KernelSpec:
    return KernelSpec(family, config, TARGET.arch)


GEMMS = [spec_of(family, c) for family in (TO_E4M3, TO_BF16, SPGEMM, DENSE) for c in configs(family)]
GEMMS += [spec_of(family, default(family)) for family in OPTIONS if space.has_kernel(family, TARGET).ok]
# For more tiles than multiprocessors, each with a short K: what is brought for one tile must not meet that of another.
MANY = [
    spec_of(family, dataclasses.replace(c, stages=space.max_stages(family, c, TARGET)))
    for family in (dataclasses.replace(TO_E4M3, bias=True), TO_BF16, SPGEMM, dataclasses.replace(SPGEMM, bias=True))
    for stream_k in (False, True)
    for c in (
        KernelConfig(128, 256, 128, stream_k=stream_k),
        KernelConfig(192, 256, 128, producer=Producer.THREAD, stream_k=stream_k),
    )
    if NATIVE
]
QUANTIZE = {dtype: KernelSpec(Family(Op.QUANTIZE_ROWS, dtype, out=DType.E4M3), KernelConfig()) for dtype in WIDE}
SQUARE = KernelSpec(Family(Op.SQUARE_ROWS, DType.BF16, out=DType.E4M3), KernelConfig())
# Without stream-K, which would promote between its pieces.
SUMS = {
    (family.op, promote): spec_of(
        f := dataclasses.replace(family, promote=promote), dataclasses.replace(default(f), stream_k=False)
    )
    for family in (DENSE, SPGEMM)
    for promote in (False, True)
    if NATIVE
}
SPECS = [*GEMMS, *MANY, *SUMS.values(), *QUANTIZE.values(), SQUARE]

# ---------------------------------------------------------------------------------------------------------- the data


def seeded(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def integers(low: int, high: int, *shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=seeded(seed, device), device=device).float()


def few(x: Tensor, seed: int) -> Tensor:
    """At most about 24 non-zeros in a row: sums of small integers stay exact in the tensor cores' few bits."""
    return x * (torch.rand(x.shape, generator=seeded(seed, x.device), device=x.device) < 24 / x.shape[1])


def powers(n: int, low: int, high: int, seed: int, device: torch.device) -> Tensor:
    return 2.0 ** integers(low, high, n, seed=seed, device=device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def poisoned(m: int, f: int, dtype: torch.dtype, device: torch.device) -> Sparse24:
    s = Sparse24.empty(m, f, dtype, device, FragmentOrder.BITS8)
    s.values.view(torch.uint8).fill_(0x7F) if dtype == E4M3 else s.values.fill_(math.nan)
    s.metadata.fill_(-1)
    return s


def padding(s: Sparse24) -> Tensor:
    """What lies between the ends of the rows of values and their strides."""
    m, f = s.shape
    stride = row_stride(f, s.values.itemsize)
    return s.values.as_strided((m, stride), (stride, 1))[:, f // 2 :].float()


# ------------------------------------------------------------------------------------------------- row-wise scaling


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("m", "n"), [(1, 16), (7, 48), (64, 4096), (33, 8192), (5, 18432), (3, 20000)])
def test_quantize_rows_bit_for_bit(dtype: DType, m: int, n: int, device: torch.device) -> None:
    wide = torch.randn(m, n + 8, generator=seeded(m + n, device), device=device)
    wide *= 10.0 ** integers(-3, 2, m, 1, seed=1, device=device)
    x = wide.to(WIDE[dtype])[:, :n]  # rows are strided
    if m > 4:
        x[1] = 0
        x[2, 3] = math.nan
        x[3, n // 2] = math.inf
    out = torch.empty(m, n, dtype=E4M3, device=device)
    rows, r_largest = torch.full((2, m), math.nan, device=device)
    launch.run(QUANTIZE[dtype], Operands(a=x, out=out, scales=Scales(rows=rows, r_largest=r_largest)))
    expected = quantize.quantize_rows(x)
    assert torch.equal(rows.nan_to_num(nan=-1.0), expected.scale.nan_to_num(nan=-1.0))
    assert torch.equal(out.float().isnan(), expected.values.float().isnan())
    assert torch.equal(out.float().nan_to_num(), expected.values.float().nan_to_num())
    assert (r_largest == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_predicted_scales(bias: bool, device: torch.device) -> None:
    x = torch.randn(50, 4096, generator=seeded(0, device), device=device).bfloat16()
    x[3] *= 1000
    x[5] *= 1e-6
    x[7] = 0
    w1 = quantize.quantize_weight(torch.randn(64, 4096, generator=seeded(1, device), device=device))
    b1 = torch.randn(64, generator=seeded(2, device), device=device).bfloat16() if bias else None
    rows, s_scale, s_inverse = torch.full((3, 50), math.nan, device=device)
    scales = Scales(rows=rows, row_norm=w1.row_norm, s_scale=s_scale, s_inverse=s_inverse)
    scales.bias_largest = None if b1 is None else b1.float().abs().amax()
    out = torch.empty(50, 4096, dtype=E4M3, device=device)
    launch.run(QUANTIZE[DType.BF16], Operands(a=x, out=out, scales=scales))
    amax = reference.predicted_amax(x, w1.row_norm, b1)
    # The norm is summed in another order.
    torch.testing.assert_close(s_scale, quantize.scale(amax), rtol=1e-5, atol=0)
    torch.testing.assert_close(s_inverse, quantize.inverse_scale(amax), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("m", "f"), [(1, 16), (7, 48), (65, 1296), (64, 4096), (33, 18432)])
def test_square_rows_bit_for_bit(m: int, f: int, device: torch.device) -> None:
    r = poisoned(m, f, torch.bfloat16, device)
    values = torch.randn(m, f // 2, generator=seeded(f, device), device=device).relu()
    r.values.copy_(values * 10.0 ** integers(-8, 3, m, 1, seed=1, device=device))
    if m > 4:
        r.values[1] = 0
        r.values[2, 3] = math.nan
        r.values[3, 5] = math.inf
    largest = torch.where(r.values.isnan().any(dim=1), math.nan, r.values.float().nan_to_num(nan=0.0).amax(dim=1))
    largest = torch.where(r.values.isinf().any(dim=1), math.inf, largest)
    s, rows = r.with_room_for(E4M3), torch.full((m,), math.nan, device=device)
    launch.run(SQUARE, Operands(a=r, out=s, scales=Scales(r_largest=largest, rows=rows)))
    amax = largest * largest
    assert torch.equal(rows.nan_to_num(nan=-1.0), quantize.scale(amax).nan_to_num(nan=-1.0))
    wide = r.values.float()
    scaled = wide * wide * quantize.inverse_scale(amax)[:, None]
    expected = quantize.saturate(scaled).float()
    assert torch.equal(s.values.float().isnan(), expected.isnan())
    assert torch.equal(s.values.float().nan_to_num(), expected.nan_to_num())
    assert (padding(s) == 0).all()
    assert s.metadata.data_ptr() == r.metadata.data_ptr()


# ----------------------------------------------------------------------------------------- GEMMs, where sums are exact

ROWS = (1, 7, 64, 129, 385, 700)
WIDTHS = (16, 48, 256, 272, 1296, 1856)
EXACT = [(spec, m, n, k) for spec, m, n, k in zip(
    GEMMS * 4, itertools.cycle(ROWS), itertools.cycle(WIDTHS[::-1]), itertools.cycle((16, 512, 144, 2704, 128)),
    strict=False,
)]  # fmt: skip
EXACT += [(spec, 8201, 4112, k) for spec in MANY for k in (16, 400)]


def shape_for(spec: KernelSpec, n: int) -> int:
    """N that the configuration can load."""
    while not space.supports(Problem(spec.family, 64, n, 16), spec.config, TARGET).ok:
        n += 16
    return n


@pytest.mark.parametrize(
    ("spec", "m", "n", "k"), EXACT, ids=[f"{s.name}-g{s.config.raster_group}-{m}x{n}x{k}" for s, m, n, k in EXACT]
)
def test_gemms_of_integers_bit_for_bit(spec: KernelSpec, m: int, n: int, k: int, device: torch.device) -> None:
    """Every configuration: values, metadata with its padding, row maxima, saturations."""
    family, n = spec.family, shape_for(spec, n)
    weight_dtype = E5M2 if family.weight else E4M3
    w = QuantizedRows(integers(-2, 2, n, k, seed=1, device=device).to(weight_dtype), powers(n, -1, 1, 2, device))
    bias = integers(-8, 8, n, seed=3, device=device) if family.bias else None
    out_dtype = TORCH_DTYPE[family.out or family.dtype]
    if family.op is Op.SPGEMM:
        residual = integers(-8, 8, m, n, seed=4, device=device).to(out_dtype) if family.residual else None
        check_spgemm(spec, m, n, k, w, bias, residual)
        return
    x = QuantizedRows(few(integers(-2, 2, m, k, seed=5, device=device), 6).to(E4M3), powers(m, -1, 2, 7, device))
    if family.op is Op.GEMM:
        out = torch.full((m, n), math.nan, dtype=out_dtype, device=device)
        launch.run(spec, Operands(a=x.values, b=w.values, bias=bias, out=out, scales=Scales(a=x.scale, b=w.scale)))
        expected = (x.values.double() @ w.values.double().T) * w.scale * x.scale[:, None]
        assert torch.equal(out, (expected if bias is None else expected + bias).to(out_dtype))
        return
    r = reference.gemm_relu2_24(x, w, bias)
    out24 = poisoned(m, n, out_dtype, device)
    scales = Scales(a=x.scale, b=w.scale)
    if family.out is DType.BF16:
        scales.r_largest = torch.zeros(m, device=device)
        expected24, saturations = r, None
    else:
        scales.s_inverse = powers(m, -3, 1, 8, device)
        scales.saturated = torch.zeros((), dtype=torch.int64, device=device)
        expected24, saturations = reference.square_to_e4m3(r, scales.s_inverse)
    launch.run(spec, Operands(a=x.values, b=w.values, bias=bias, out=out24, scales=scales))
    assert torch.equal(out24.metadata, expected24.metadata)
    assert same_bits(out24.values, expected24.values)
    assert (padding(out24) == 0).all()
    if saturations is None:
        assert torch.equal(scales.r_largest, r.values.float().amax(dim=1))  # type: ignore[arg-type]
    else:
        assert scales.saturated == saturations


def check_spgemm(
    spec: KernelSpec, m: int, n: int, k: int, w: QuantizedRows, bias: Tensor | None, residual: Tensor | None
) -> None:
    device = w.values.device
    r = few(integers(0, 2, m, k, seed=5, device=device), 6).bfloat16()
    packed = prune24(r, order=FragmentOrder.BITS8)
    s, _ = reference.square_to_e4m3(packed, torch.ones((), device=device))
    s_scale = powers(m, -1, 1, 7, device)
    out_dtype = TORCH_DTYPE[spec.family.out or spec.family.dtype]
    out = torch.full((m, n), math.nan, dtype=out_dtype, device=device)
    o = Operands(a=s, b=w.values, bias=bias, residual=residual, out=out, scales=Scales(a=s_scale, b=w.scale))
    launch.run(spec, o)
    dense = s.to_dense().double()
    assert dense.count_nonzero() or k < 64, "the data must say something"
    expected = (dense @ w.values.double().T) * w.scale * s_scale[:, None]
    for start in (bias, residual):
        expected = expected if start is None else expected + start
    assert torch.equal(out, expected.to(out_dtype))


@pytest.mark.parametrize("spec", [spec_of(f, default(f)) for f in (TO_E4M3, TO_BF16)], ids=lambda s: s.name)
def test_one_scale_for_all_rows_and_values_that_are_not_finite(spec: KernelSpec, device: torch.device) -> None:
    """A NaN in a row of X stays in its row; ties keep the lower index; a single scale serves every row."""
    m, n, k = 130, 272, 144
    x = QuantizedRows(few(integers(-2, 2, m, k, seed=5, device=device), 6).to(E4M3), torch.ones(m, device=device))
    w = QuantizedRows(integers(-2, 2, n, k, seed=1, device=device).to(E4M3), torch.ones(n, device=device))
    x.values[3, 7] = torch.tensor(math.nan).to(E4M3)
    x.scale[5] = math.inf
    r = reference.gemm_relu2_24(x, w)
    out = poisoned(m, n, TORCH_DTYPE[spec.family.out or DType.E4M3], device)
    scales = Scales(a=x.scale, b=w.scale, saturated=torch.zeros((), dtype=torch.int64, device=device))
    scales.s_inverse, scales.r_largest = torch.tensor([0.25], device=device), torch.zeros(m, device=device)
    launch.run(spec, Operands(a=x.values, b=w.values, out=out, scales=scales))
    expected = r if out.dtype == torch.bfloat16 else reference.square_to_e4m3(r, scales.s_inverse[0])[0]
    assert torch.equal(out.metadata, expected.metadata)
    assert torch.equal(out.values.float().isnan(), expected.values.float().isnan())
    assert torch.equal(out.values.float().nan_to_num(), expected.values.float().nan_to_num())
    if out.dtype == torch.bfloat16:
        assert scales.r_largest[3].isnan()
        assert scales.r_largest[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.skipif(not NATIVE, reason="the portable kernels have no promoted sums")
@pytest.mark.parametrize("sparse", [False, True])
def test_promoted_sums_are_closer(sparse: bool, device: torch.device) -> None:
    """Positive products with a long K: what the tensor cores cut off adds up, unless sums are promoted.

    The bound is that of docs/fp8.md: a part of 128 products is short by 2^-8 in the mean, at 14 bits.
    """
    m, n, k = 256, 256, 16384
    x, w = (torch.rand(256, k, generator=seeded(seed, device), device=device).to(E4M3) for seed in (0, 1))
    one = torch.full((m,), 2.0**-14, device=device)
    a: Tensor | Sparse24 = x
    if sparse:
        a, _ = reference.square_to_e4m3(prune24(x.bfloat16(), order=FragmentOrder.BITS8), torch.ones((), device=device))
        x = a.to_dense()
    exact = x.double() @ w.double().T
    errors = {}
    for promote in (False, True):
        out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
        spec = SUMS[Op.SPGEMM if sparse else Op.GEMM, promote]
        launch.run(spec, Operands(a=a, b=w, out=out, scales=Scales(a=one, b=one)))
        errors[promote] = float(((out.double() * 2.0**28 - exact) / exact).abs().mean())
    assert errors[True] < 2.0**-8
    assert errors[True] < errors[False]
