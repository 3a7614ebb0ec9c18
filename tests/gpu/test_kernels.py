"""Every kernel against the numerics contract: random problems over the whole space of configurations, bit by bit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srelu24.measuring import verify, workload
from srelu24.numerics import reference
from srelu24.numerics.dtypes import TORCH_DTYPE
from srelu24.numerics.sparse24 import Sparse24, metadata_shape, row_stride
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands
from srelu24_gen import space
from srelu24_gen.bindings import load_block, loads_ragged_n
from srelu24_gen.compile import BuiltKernel
from srelu24_gen.spec import (
    PRUNED_ACTIVATIONS,
    WIDE_TYPES,
    Activation,
    DType,
    Family,
    Instructions,
    KernelConfig,
    KernelSpec,
    Op,
    Problem,
    Producer,
    instructions_of,
)
from srelu24_gen.target import target_by_key

TARGET = target_by_key("h200")
"""Every Hopper GPU has its limits. With ``--family sm80`` it is for the portable kernels."""
PORTABLE = instructions_of(TARGET.arch) is Instructions.MMA_SYNC
NONE, RELU2 = Activation.NONE, Activation.RELU2

# ------------------------------------------------------------------------------------------------------- what is run


def spec_of(family: Family, config: KernelConfig) -> KernelSpec:
    return KernelSpec(family, config, TARGET.arch)


FAMILIES: dict[Op, list[Family]] = {
    op: [
        family
        for family in itertools.starmap(
            Family, itertools.product([op], WIDE_TYPES, Activation, (False, True), (False, True), (False, True))
        )
        if space.supports_family(family).ok
    ]
    for op in (Op.GEMM, *PRUNED_ACTIVATIONS, Op.SPGEMM, Op.SPARSIFY24)
}
"""Of 16-bit types; tests/gpu/test_fp8.py has the others."""


def all_configs(family: Family) -> list[KernelConfig]:
    """Every tile, cluster and producer, with and without stream-K, and with a ring of one stage less than the deepest.

    Raster groups take turns.
    """
    if PORTABLE:
        return portable_configs(family)
    found = []
    shapes = itertools.product(space.tiles(TARGET), (1, 2), (Producer.WARPGROUP, Producer.THREAD))
    groups = itertools.cycle((1, 4, 8, 16, 2))
    for number, (tile, cluster_m, producer) in enumerate(shapes):
        base = KernelConfig(*tile, cluster_m=cluster_m, producer=producer)
        deepest = space.max_stages(family, base, TARGET)
        for stages, stream_k in ((deepest, False), (deepest, True), (deepest - 1, number % 2 == 0)):
            config = dataclasses.replace(base, stages=stages, stream_k=stream_k, raster_group=next(groups))
            if space.supports_config(family, config, TARGET).ok:
                found.append(config)
    return found


def portable_configs(family: Family) -> list[KernelConfig]:
    """Every tile with the deepest ring, one stage less, and two."""
    found: list[KernelConfig] = []
    groups = itertools.cycle((1, 4, 8, 16, 2))
    for config in space.candidates(Problem(family, 64, 4096, 4096), TARGET):
        for stages in (config.stages, config.stages - 1, 2):
            found.append(dataclasses.replace(config, stages=stages, raster_group=next(groups)))
    return list({dataclasses.replace(c, raster_group=1): c for c in found if c.stages > 1}.values())


def served_configs(family: Family) -> list[KernelConfig]:
    """What the dispatcher starts from: for a large and a small problem, and for an N with a ragged end."""
    k = 0 if family.op is Op.SPARSIFY24 else 4096
    problems = (Problem(family, m, n, k) for m, n in ((16384, 16384), (64, 256), (16384, 16392)))
    return list(dict.fromkeys(space.default(problem, TARGET) for problem in problems))


def specs_of(op: Op) -> list[KernelSpec]:
    """Each configuration with one of the families, each family with the configurations that are served."""
    families = FAMILIES[op]
    if op is Op.SPARSIFY24:
        return [spec_of(family, KernelConfig()) for family in families]
    draw = random.Random(op.value)
    found = [spec_of(family, config) for family in families for config in served_configs(family)]
    for config in all_configs(families[0]):
        able = [family for family in families if space.supports_config(family, config, TARGET).ok]
        found.append(spec_of(draw.choice(able), config))
    return list({spec.name: spec for spec in found}.values())


SWEEP = {op: specs_of(op) for op in FAMILIES}


def unfused(spec: KernelSpec) -> KernelSpec:
    """The dense GEMM that sums as a fused kernel does."""
    family = spec.family
    return spec_of(Family(Op.GEMM, family.dtype, bias=family.bias), spec.config)


FUSED = [spec for spec in SWEEP[Op.GEMM_RELU2_24] if not spec.family.count_nonzeros]
SPECS = [spec for specs in SWEEP.values() for spec in specs] + [unfused(spec) for spec in FUSED]

ROWS = (0, 1, 7, 8, 63, 64, 65, 127, 129, 193, 384, 385, 1000)
WIDTHS = (8, 16, 24, 40, 64, 128, 136, 256, 264, 512, 1856, 1864, 2688, 3712, 15680)
DATA = ("0 %", "10 %", "50 %", "100 %", "integers", "zero rows", "special", "large")
PROBLEMS_PER_OP = 80 if PORTABLE else 208


@dataclasses.dataclass(frozen=True)
class Case:
    """One random problem."""

    problem: Problem
    spec: KernelSpec
    data: str
    seed: int

    @property
    def name(self) -> str:
        p, c = self.problem, self.spec.config
        return f"{self.spec.name}-g{c.raster_group}-{p.m}x{p.n}x{p.k}-{self.data.replace(' ', '')}"


def random_width(draw: random.Random, multiple: int) -> int:
    width = draw.choice(WIDTHS) if draw.random() < 0.7 else 8 * draw.randint(1, 160)
    return -(-width // multiple) * multiple


def cases(op: Op) -> list[Case]:
    """Walks through the kernels and the kinds of data; sizes are random with a weight on the edges."""
    draw = random.Random(f"{op.value} problems")
    specs = SWEEP[op]
    found = []
    for seed in range(max(PROBLEMS_PER_OP, 2 * len(specs))):
        spec = specs[seed % len(specs)]
        multiple = 8 if op is Op.SPARSIFY24 or loads_ragged_n(spec.config) else load_block(op)
        m = draw.choice(ROWS) if draw.random() < 0.7 else draw.randint(1, 1500)
        n, k = random_width(draw, multiple), random_width(draw, 8)
        problem = Problem(spec.family, m, n, 0 if op is Op.SPARSIFY24 else k)
        found.append(Case(problem, spec, draw.choice(DATA), seed))
    return found


# ---------------------------------------------------------------------------------------------------------- the data


def make_operands(case: Case, device: torch.device) -> Operands:
    """Inputs of one kind; see DATA."""
    densities = {"0 %": 0.0, "10 %": 0.1, "50 %": 0.5, "100 %": 1.0}
    o = workload.operands_for(case.problem, densities.get(case.data, 0.5), device, case.seed)
    generator = torch.Generator(device).manual_seed(case.seed)
    a = stored(o.a)
    if case.data == "integers":
        for t in (a, o.b, o.bias, o.residual):
            if t is not None:  # -1, 0, 1: many ties, and sums that are exact in any order
                t.copy_(torch.randint(-1, 2, t.shape, device=device, generator=generator))
    elif case.data == "zero rows":
        a[::3] = 0.0
        a[1::3] *= -0.0
    elif case.data == "special" and case.problem.m:
        rows = torch.randperm(case.problem.m, generator=torch.Generator().manual_seed(case.seed))[:6].tolist()
        for row, value in zip(rows, (math.nan, math.inf, -math.inf, -0.0, math.nan, math.inf), strict=False):
            a[row, row % a.shape[1]] = value
        if o.bias is not None:  # whole columns: groups with one, two or three of them
            for column, value in ((0, math.inf), (1, math.nan), (2, math.inf), (5, -math.inf), (7, math.nan)):
                o.bias[column] = value
    elif case.data == "large":
        a.mul_(100.0)  # fp16 squares overflow
    return o


def stored(x: Tensor | Sparse24) -> Tensor:
    return x.values if isinstance(x, Sparse24) else x


def bits(x: Tensor | Sparse24) -> Tensor:
    """The storage of a 16-bit matrix as integers, so that NaN equals itself and -0.0 is not 0.0."""
    return stored(x).contiguous().view(torch.int16)


def same_bits(x: Tensor | Sparse24, y: Tensor | Sparse24) -> bool:
    same = torch.equal(bits(x), bits(y))
    if isinstance(x, Sparse24) and isinstance(y, Sparse24):
        same = same and torch.equal(x.metadata, y.metadata)
    return same


def assert_right(problem: Problem, config: KernelConfig, operands: Operands) -> None:
    found = verify.verify(problem, config, operands, TARGET.arch)
    assert found.ok, found.detail


def exact(problem: Problem, o: Operands) -> tuple[Tensor | Sparse24, Tensor | None]:
    """The contract summed in double: output and non-zero counts."""
    double = torch.float64
    match problem.family.op:
        case Op.GEMM:
            return reference.gemm(stored(o.a), o.b, o.bias, None, problem.family.activation, accumulate=double), None
        case Op.SPGEMM:
            return reference.spgemm(o.a, o.b, o.bias, o.residual, accumulate=double), None
        case Op.SPARSIFY24:
            return reference.sparsify24(o.a, problem.family.activation), None
        case _:
            given = (o.a, o.b, o.bias, problem.family.activation)
            counts = reference.count_nonzeros(*given, accumulate=double) if o.counts is not None else None
            return reference.gemm_24(*given, accumulate=double), counts


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("case", [case for op in FAMILIES for case in cases(op)], ids=lambda case: case.name)
def test_random_problems(case: Case, device: torch.device) -> None:
    o = make_operands(case, device)
    assert_right(case.problem, case.spec.config, o)
    if case.data == "integers":
        expected, counts = exact(case.problem, o)
        assert torch.equal(stored(o.out), stored(expected))
        if isinstance(expected, Sparse24):
            assert torch.equal(o.out.metadata, expected.metadata)
        if counts is not None:
            assert torch.equal(o.counts, counts)
    if isinstance(o.out, Sparse24):
        assert row_padding_is_zero(o.out)


def row_padding_is_zero(s: Sparse24) -> bool:
    m, f = s.shape
    whole = s.values.as_strided((m, row_stride(f)), (row_stride(f), 1))
    return not bool(whole[:, f // 2 :].view(torch.int16).any())


@pytest.mark.parametrize("spec", FUSED, ids=lambda spec: spec.name)
def test_fused_is_the_unfused_gemm_pruned(spec: KernelSpec, device: torch.device) -> None:
    n = 1856 if spec.config.producer is Producer.THREAD else 1864
    fused = Problem(spec.family, 1000, n, 2688)
    o = workload.operands_for(fused, 0.3, device, seed=11)
    launch.run(spec, o)
    dense = unfused(spec)
    hidden = torch.full((fused.m, n), math.nan, dtype=TORCH_DTYPE[spec.family.dtype], device=device)
    launch.run(dense, dataclasses.replace(o, out=hidden))
    assert same_bits(o.out, reference.sparsify24(hidden, RELU2))


SPARSIFY = SWEEP[Op.SPARSIFY24]
EDGE_VALUES = (0.0, -0.0, 1.0, -1.0, 2.0, 1e-7, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("spec", SPARSIFY, ids=lambda spec: spec.name)
def test_sparsify24_of_every_group_of_edge_values(spec: KernelSpec, device: torch.device) -> None:
    groups = torch.tensor(list(itertools.product(EDGE_VALUES, repeat=4)), dtype=TORCH_DTYPE[spec.family.dtype])
    h = groups.flatten()[: groups.numel() // 216 * 216].view(-1, 216).to(device)
    problem = Problem(spec.family, *h.shape)
    assert_right(problem, spec.config, Operands(a=h, out=launch.allocate(problem, device)))


@pytest.mark.parametrize("spec", SPARSIFY, ids=lambda spec: spec.name)
@pytest.mark.parametrize("f", [8, 24, 1864, 15680])
def test_sparsify24_of_any_bits(spec: KernelSpec, f: int, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(f)
    words = torch.randint(-(2**15), 2**15, (777, f), dtype=torch.int16, device=device, generator=generator)
    h = words.view(TORCH_DTYPE[spec.family.dtype])
    problem = Problem(spec.family, 777, f)
    o = Operands(a=h, out=launch.allocate(problem, device))
    assert_right(problem, spec.config, o)
    if spec.family.activation is NONE:
        assert same_bits(o.out, reference.sparsify24(h, NONE))


def test_rounded_sums_decide_the_selection(built: dict[KernelSpec, BuiltKernel], device: torch.device) -> None:
    # 1.0, 1.001, 1.002, 1.003 are one bf16 number, so the lower indices win although their sums are smaller.
    spec = next(spec for spec in FUSED if spec.family == Family(Op.GEMM_RELU2_24, DType.BF16, RELU2))
    problem = Problem(spec.family, 65, 256, 64)
    x = torch.zeros(65, 64, dtype=torch.bfloat16, device=device)
    x[:, :2] = torch.tensor([1.0, 2.0**-10])
    w1 = torch.zeros(256, 64, dtype=torch.bfloat16, device=device)
    w1[:, 0] = 1.0
    w1[:, 1] = torch.arange(256, device=device) % 4
    o = Operands(a=x, b=w1, out=launch.allocate(problem, device))
    launch.run(spec, o)
    assert bool((o.out.values == 1.0).all())
    zero_groups_everywhere = torch.full(metadata_shape(65, 256), 0x44444444, dtype=torch.int32, device=device)
    assert torch.equal(o.out.metadata, zero_groups_everywhere)  # positions 0 and 1, as a group of zeros has


TYPICAL = (
    KernelConfig(tile_m=128, stream_k=True),
    KernelConfig(tile_m=128),
    KernelConfig(tile_m=192, producer=Producer.THREAD, stream_k=True),
    KernelConfig(tile_m=128, cluster_m=1, producer=Producer.ALL),
    KernelConfig(tile_m=64, tile_n=128, cluster_m=1, producer=Producer.ALL),
    KernelConfig(tile_m=64, tile_n=128, cluster_m=1, producer=Producer.ALL, stream_k=True),
)
FEW = [
    spec_of(family, dataclasses.replace(config, stages=space.max_stages(family, config, TARGET)))
    for family in (
        Family(Op.GEMM, DType.BF16, RELU2, bias=True),
        Family(Op.GEMM_RELU2_24, DType.FP16, RELU2, bias=True),
        Family(Op.SPGEMM, DType.BF16, bias=True),
        Family(Op.SPGEMM, DType.BF16, bias=True, residual=True),
    )
    for config in TYPICAL
    if space.supports_config(family, dataclasses.replace(config, stages=3), TARGET).ok
] + [spec for spec in SPARSIFY if spec.family.activation is RELU2]
"""Both producers of every GEMM, with and without stream-K, and sparsify24; of the portable family
two tiles, one of them split too."""
SPECS += FEW


def few(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("spec", FEW, ids=lambda spec: spec.name)(test)


def in_a_wider_matrix(t: Tensor | None, extra: int = 24) -> Tensor | None:
    """The same matrix as a view with a longer row stride, surrounded by NaN."""
    if t is None or t.dim() != 2:
        return t
    rows, columns = t.shape
    wide = torch.full((rows + 2, columns + extra), math.nan, dtype=t.dtype, device=t.device)
    wide[1 : rows + 1, 8 : columns + 8] = t
    return wide[1 : rows + 1, 8 : columns + 8]


def packed_in_a_taller_matrix(
    m: int, f: int, dtype: torch.dtype, device: torch.device
) -> tuple[Sparse24, Tensor, Tensor]:
    """A Sparse24 with rows and blocks around it, which hold 7."""
    values = torch.full((m + 2, row_stride(f)), 7.0, dtype=dtype, device=device)
    rows, *block = metadata_shape(m, f)
    metadata = torch.full((rows + 2, *block), 7, dtype=torch.int32, device=device)
    inside = values[1 : m + 1]
    inside[:, f // 2 :] = 0.0
    return Sparse24(inside[:, : f // 2], metadata[1 : rows + 1], (m, f)), values, metadata


@few
@pytest.mark.parametrize("m", [1, 65, 200])
def test_row_strides_and_nothing_outside_is_written(spec: KernelSpec, m: int, device: torch.device) -> None:
    n = 320 if spec.config.producer is Producer.THREAD else 328
    problem = Problem(spec.family, m, n, 0 if spec.family.op is Op.SPARSIFY24 else 200)
    o = workload.operands_for(problem, 0.5, device, seed=3)
    dtype = TORCH_DTYPE[spec.family.dtype]
    a = in_a_wider_matrix(o.a) if isinstance(o.a, Tensor) else o.a
    strided = dataclasses.replace(o, a=a, b=in_a_wider_matrix(o.b, 40), residual=in_a_wider_matrix(o.residual, 16))
    if isinstance(o.out, Sparse24):
        out, values, metadata = packed_in_a_taller_matrix(m, n, dtype, device)
        assert_right(problem, spec.config, dataclasses.replace(strided, out=out))
        assert row_padding_is_zero(out)
        assert bool((values[[0, -1]] == 7.0).all())
        assert bool((metadata[[0, -1]] == 7).all())
    else:
        wide = torch.full((m + 2, n + 24), 7.0, dtype=dtype, device=device)
        out = wide[1 : m + 1, 8 : n + 8]
        assert_right(problem, spec.config, dataclasses.replace(strided, out=out))
        wide[1 : m + 1, 8 : n + 8] = 7.0
        assert bool((wide == 7.0).all())


@few
def test_100_runs_give_the_same_bits(spec: KernelSpec, device: torch.device) -> None:
    problem = Problem(spec.family, 1500, 3712, 0 if spec.family.op is Op.SPARSIFY24 else 2688)
    o = workload.operands_for(problem, 0.3, device, seed=5)
    assert_right(problem, spec.config, o)
    again = dataclasses.replace(o, out=launch.allocate(problem, device))
    differ = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(100):
        workload.poison(again.out)
        launch.run(spec, again)
        differ += (bits(again.out) != bits(o.out)).sum()
        if isinstance(o.out, Sparse24):
            differ += (again.out.metadata != o.out.metadata).sum()
    assert int(differ) == 0


def test_counts_add_up_over_calls(device: torch.device) -> None:
    spec = next(s for s in SWEEP[Op.GEMM_RELU2_24] if s.family.count_nonzeros)
    problem = Problem(spec.family, 300, 512, 136)
    o = workload.operands_for(problem, 0.5, device)
    launch.run(spec, o)
    once = o.counts.clone()
    launch.run(spec, o)
    assert int(once.sum()) > 0
    assert torch.equal(o.counts, 2 * once)


@pytest.mark.parametrize("op", list(SWEEP))
def test_no_rows_are_no_launch(op: Op, device: torch.device) -> None:
    spec = SWEEP[op][0]
    problem = Problem(spec.family, 0, 256, 0 if op is Op.SPARSIFY24 else 64)
    launch.run(spec, workload.operands_for(problem, 0.5, device))
    torch.cuda.synchronize()


def test_no_kernel_spills_or_serialises_its_mmas(built: dict[KernelSpec, BuiltKernel]) -> None:
    emulated = {spec for spec in built if PORTABLE and spec.family.scaled}  # by 16-bit MMAs: for tests only
    spilling = {
        k.meta.name: k.meta.spill_bytes for k in built.values() if k.meta.spill_bytes and k.spec not in emulated
    }
    assert not spilling
    warned = {k.meta.name: k.meta.warnings for k in built.values() if any("(C75" in w for w in k.meta.warnings)}
    assert not warned
