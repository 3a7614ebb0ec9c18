"""The space of the mma.sync kernels: which configurations compile and fit, which are worth trying, where to start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from srelu24_gen.bindings import footprint, max_stages
from srelu24_gen.families import Verdict, trains
from srelu24_gen.spec import WIDE_TYPES, Family, KernelConfig, Problem, Producer
from srelu24_gen.target import SYSTEM_SHARED_BYTES, GpuTarget

_TILES = ((128, 256), (256, 128), (128, 128), (64, 256), (64, 128))
"""Rows and columns, the largest first: a warp has 64x64 of them, in the smallest 32x64."""
_TILE_K = 64
"""128 bytes of a row: one swizzle, and one word of E."""
_LEAST_STAGES = 2
_DEFAULT_GROUP = 8
_RASTER_GROUPS = (4, _DEFAULT_GROUP, 16)


def supports_family(family: Family) -> Verdict:
    """16-bit types: mma.sp of 8-bit floats, which came with sm_89, has no kernel here."""
    if trains(family):
        return Verdict(False, "the kernels of a training step are wgmma kernels; mma.sync has none")
    if family.dtype not in WIDE_TYPES or family.out is not None:
        result = f" to {family.out.value}" if family.out else ""
        return Verdict(False, f"the mma.sync kernels take bf16 and fp16, not {family.dtype.value}{result}")
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
    if c.tile_k != _TILE_K:
        return Verdict(False, f"tile_k = {c.tile_k} is not {_TILE_K}, one word of E")
    if c.cluster_m != 1:
        return Verdict(False, f"cluster_m = {c.cluster_m}; the mma.sync kernels have no clusters, it must be 1")
    if c.stream_k:
        return Verdict(False, "the mma.sync kernels do not split tiles along K; stream_k must be off")
    if c.raster_group < 1:
        return Verdict(False, f"raster_group = {c.raster_group} must be at least 1")
    if c.stages < _LEAST_STAGES:
        return Verdict(False, f"stages = {c.stages}; loads are ahead of the MMAs with at least {_LEAST_STAGES}")
    size = footprint(family, c)
    if size.shared_bytes > target.smem_per_block:
        return Verdict(
            False, f"{c.stages} stages need {size.shared_bytes} bytes of shared memory; {target.smem_per_block} there"
        )
    return Verdict(True)


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
    """Every configuration is: none splits K, and all use one MMA."""
    return config


def _config(family: Family, tile_m: int, tile_n: int, shared_bytes: int) -> KernelConfig:
    """That tile with a ring as deep as fits."""
    config = KernelConfig(tile_m, tile_n, _TILE_K, cluster_m=1, producer=Producer.ALL, raster_group=_DEFAULT_GROUP)
    return dataclasses.replace(config, stages=max_stages(family, config, shared_bytes))
