"""What ``space.supports`` accepts compiles: every tile of every family, without a spill or a serialised MMA.

Of a tile's variants (producer, cluster, stream-K) the one that needs the most registers stands for the others;
``pytest --every-candidate`` compiles all of them, in both 16-bit types, which takes hours on two cores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from srelu24_gen import space
from srelu24_gen.compile import BuildStore, BuiltKernel, build_many
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem, Producer
from srelu24_gen.target import TARGETS, GpuTarget

pytestmark = pytest.mark.slow
PORTABLE_OPS = (Op.GEMM, Op.GEMM_RELU2_24, Op.SPGEMM, Op.SPARSIFY24, Op.QUANTIZE_ROWS, Op.SQUARE_ROWS)
"""For them an L40S stands: it has 8-bit instructions, and the least shared memory."""
SIZES = ((64, 4096, 4096), (1024, 2048, 8192), (512, 6144, 24576), (16384, 8192, 4096))
"""Few tiles and many, short and long sums: what they have as candidates is all there is."""
FLAGS, TYPES = (False, True), (None, *DType)


def families(op: Op) -> list[Family]:
    options = (Activation, FLAGS, FLAGS, FLAGS, TYPES, TYPES, FLAGS, FLAGS, FLAGS, FLAGS, FLAGS)
    every = (Family(op, dtype, *rest) for dtype in DType for rest in itertools.product(*options))
    return [family for family in every if space.supports_family(family).ok]


def specs(family: Family, target: GpuTarget) -> Iterator[KernelSpec]:
    """Every binary that a problem of some size has among its candidates."""
    found: dict[KernelConfig, None] = {}
    for m, n, k in SIZES:
        problem = Problem(family, m, n, k if family.op.multiplies else 0)
        if space.supports_problem(problem, target).ok:
            found |= dict.fromkeys(config.compiled() for config in space.candidates(problem, target))
    return (KernelSpec(family, config, target.arch) for config in found)


def hungriest(of_tile: list[KernelSpec]) -> KernelSpec:
    """The variant whose threads have the least registers for the most work."""
    return max(of_tile, key=lambda s: (s.config.producer is Producer.THREAD, s.config.stream_k, -s.config.cluster_m))


def stands_for_all(spec: KernelSpec) -> bool:
    """bf16 and fp16 differ in the names of instructions alone."""
    return DType.FP16 not in (spec.family.dtype, spec.family.out)


@pytest.mark.parametrize(("gpu", "op"), [("h200", op) for op in Op] + [("l40s", op) for op in PORTABLE_OPS])
def test_every_tile_compiles_without_a_fault(gpu: str, op: Op, store: BuildStore, pytestconfig: pytest.Config) -> None:
    target = TARGETS[gpu]
    every = [spec for family in families(op) if space.has_kernel(family, target).ok for spec in specs(family, target)]
    if not pytestconfig.getoption("--every-candidate"):
        by_tile: dict[tuple[Family, int, int], list[KernelSpec]] = {}
        for spec in filter(stands_for_all, every):
            by_tile.setdefault((spec.family, spec.config.tile_m, spec.config.tile_n), []).append(spec)
        every = [hungriest(of_tile) for of_tile in by_tile.values()]
    assert every
    faults = {}
    for spec, built in zip(every, build_many(every, store=store), strict=True):
        if fault := built.meta.fault if isinstance(built, BuiltKernel) else str(built):
            faults[spec.name] = fault
    print(f"{len(every)} kernels of {op.value} for {target.arch} compiled")
    assert faults == {}
