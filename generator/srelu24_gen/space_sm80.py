"""The space of the mma.sync kernels: which configurations compile and fit, which are worth trying, where to start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from srelu24_gen.bindings import K_BLOCK_BYTES, footprint, max_stages
from srelu24_gen.families import Verdict, trains
from srelu24_gen.spec import DType, Family, KernelConfig, Problem, Producer
from srelu24_gen.target import SYSTEM_SHARED_BYTES, GpuTarget

_TILES = ((128, 256), (256, 128), (128, 128), (64, 256), (64, 128))
"""Rows and columns, the largest first: a warp has 64x64 of them, in the smallest 32x64."""
_FP8_ARCHS = ("sm_89", "sm_90", "sm_120", "sm_121")
"""What the MMAs of 8-bit floats are for. ptxas makes 16-bit ones of them for other later architectures, data-centre
Blackwell's among them, which is slower than 16 bits; Hopper's too, where the kernels are there to be tested."""
_LEAST_STAGES = 2
_DEFAULT_GROUP = 8
_RASTER_GROUPS = (4, _DEFAULT_GROUP, 16)


def supports_family(family: Family, target: GpuTarget) -> Verdict:
    """No training, no promoted sums, and 8-bit floats where the architecture has instructions for them."""
    if trains(family):
        return Verdict(False, "the kernels of a training step are wgmma kernels; mma.sync has none")
    if family.promote:
        return Verdict(False, "the mma.sync kernels have no registers for promoted sums")
    if DType.E4M3 in (family.dtype, family.out) and target.arch not in _FP8_ARCHS:
        return Verdict(False, f"{target.arch} has no mma.sync of 8-bit floats; {', '.join(_FP8_ARCHS)} have")
    return Verdict(True)


def supports_sizes(problem: Problem, config: KernelConfig) -> Verdict:
    """Every configuration takes all sizes."""
    return Verdict(True)


def supports_config(family: Family, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether the GEMM of ``family`` can be built as ``config`` for ``target``; sizes do not matter."""
    c = config
    if c.producer is not Producer.ALL:
        return Verdict(False, f"the mma.sync kernels load with all threads; producer is {c.producer.value}, not all")
    if (c.tile_m, c.tile_n) not in _TILES:
        tiles = ", ".join(f"{m}x{n}" for m, n in _TILES)
        return Verdict(False, f"a tile of {c.tile_m}x{c.tile_n} is not one of {tiles}")
    if c.tile_k != _tile_k(family):
        return Verdict(False, f"tile_k = {c.tile_k} is not {_tile_k(family)}, {K_BLOCK_BYTES} bytes of a row")
    if c.cluster_m != 1:
        return Verdict(False, f"cluster_m = {c.cluster_m}; the mma.sync kernels have no clusters, it must be 1")
    if c.raster_group < 1:
        return Verdict(False, f"raster_group = {c.raster_group} must be at least 1")
    if c.stages < _LEAST_STAGES:
        return Verdict(False, f"stages = {c.stages}; loads are ahead of the MMAs with at least {_LEAST_STAGES}")
    if c.stream_k and family.residual and c.tile_m * c.tile_n >= 128 * 256:
        return Verdict(False, f"a {c.tile_m}x{c.tile_n} tile has no registers left for a residual where K is split")
    size = footprint(family, c)
    if size.shared_bytes > target.smem_per_block:
        return Verdict(
            False, f"{c.stages} stages need {size.shared_bytes} bytes of shared memory; {target.smem_per_block} there"
        )
    return Verdict(True)


def tiles() -> tuple[tuple[int, int], ...]:
    """Rows and columns of every tile."""
    return _TILES


def is_timed(config: KernelConfig) -> bool:
    """No tile is served by the cost model, which is not fitted to these kernels; the default's is as good as any."""
    return True


def configs(problem: Problem, target: GpuTarget) -> Iterator[KernelConfig]:
    """What may be worth trying; not all of it is valid. The ring takes all shared memory, or half of it, so that a
    second CTA of a multiprocessor works while this one stores."""
    few_tiles = -(-problem.m // 128) * -(-problem.n // 256) < target.sm_count
    for tile_m, tile_n in _TILES:
        base = _config(problem.family, tile_m, tile_n, target.smem_per_block)
        half = max_stages(problem.family, base, (target.smem_per_block - SYSTEM_SHARED_BYTES) // 2)
        for stages in dict.fromkeys((base.stages, half)):
            for group in (_DEFAULT_GROUP,) if few_tiles else _RASTER_GROUPS:
                yield dataclasses.replace(base, stages=stages, raster_group=group)
        if few_tiles:
            yield dataclasses.replace(base, stream_k=True)


def default(problem: Problem, target: GpuTarget) -> KernelConfig:
    """The largest tile that has three stages and no more rows than the problem, but 64."""
    enough = [
        config
        for tile_m, tile_n in _TILES
        if (config := _config(problem.family, tile_m, tile_n, target.smem_per_block)).stages > _LEAST_STAGES
        and (tile_m == 64 or tile_m // 2 < problem.m)
    ]
    return enough[0] if enough else _config(problem.family, *_TILES[-1], target.smem_per_block)


def batch_invariant(config: KernelConfig) -> KernelConfig:
    """Every configuration is that does not split K: all use one MMA."""
    return dataclasses.replace(config, stream_k=False)


def _config(family: Family, tile_m: int, tile_n: int, shared_bytes: int) -> KernelConfig:
    """That tile with a ring as deep as fits."""
    config = KernelConfig(
        tile_m, tile_n, _tile_k(family), cluster_m=1, producer=Producer.ALL, raster_group=_DEFAULT_GROUP
    )
    return dataclasses.replace(config, stages=max_stages(family, config, shared_bytes))


def _tile_k(family: Family) -> int:
    return K_BLOCK_BYTES // family.dtype.bytes
