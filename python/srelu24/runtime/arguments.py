"""What a GEMM is launched on, as numbers; and the parameter block that the mma.sync kernels take of it.

The layout mirrors ``templates/include/srelu24/sm80/params.cuh``: keep them in step.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import NamedTuple

from srelu24.runtime.loader import ArgumentBlock
from srelu24_gen.bindings import E_VECTOR_COLUMNS, PACKING_OPS
from srelu24_gen.spec import KernelSpec
from srelu24_gen.work_plan import WorkPlan, plan_work


class Arguments(NamedTuple):
    """Everything a GEMM's parameter block depends on: addresses, sizes, and row strides in elements."""

    a: int
    b: int
    out: int
    metadata: int
    out_metadata: int
    bias: int
    residual: int
    counts: int
    partials: int
    flags: int
    m: int
    n: int
    k: int
    a_stride: int
    b_stride: int
    out_stride: int
    residual_stride: int
    scales: tuple[int, ...] = ()
    """ScaleParams of ``params.cuh``, or nothing."""
    tokens: tuple[int, ...] = ()
    """TokenParams of ``params.cuh``, or nothing."""


def fast_divmod(divisor: int) -> bytes:
    """cutlass::FastDivmod (cutlass/fast_math.h): divides 31-bit numbers by a multiplication and a shift."""
    if divisor == 1:
        return struct.pack("<iII", 1, 0, 0)
    power = 31 + (divisor - 1).bit_length()
    return struct.pack("<iII", divisor, -(-(1 << power) // divisor), power - 32)


def raster_params(plan: WorkPlan) -> bytes:
    """RasterParams of ``raster.cuh``."""
    return b"".join(
        (
            struct.pack("<4i", plan.tiles, plan.tiles_n, plan.group, plan.tiles_m // plan.group),
            fast_divmod(plan.group * plan.tiles_n),
            fast_divmod(plan.group),
            fast_divmod(plan.tiles_m % plan.group or plan.group),
        )
    )


class SlicedPlan(NamedTuple):
    """The tiles of an mma.sync kernel, whole, and how many CTAs share each along K."""

    work: WorkPlan
    slices: int


def plan_mma_sync(spec: KernelSpec, m: int, n: int, k: int, sm_count: int) -> SlicedPlan:
    """A CTA a tile, or with ``stream_k`` as many as there are multiprocessors, but a tile is not cut finer than pays. A
    packed output has whole vectors of E."""
    if spec.family.op in PACKING_OPS:
        n = -(-n // E_VECTOR_COLUMNS) * E_VECTOR_COLUMNS
    work = plan_work(dataclasses.replace(spec.config, stream_k=False), m, n, k, sm_count)
    most = min(sm_count // work.tiles, math.isqrt(work.tile_units)) if spec.config.stream_k else 1
    return SlicedPlan(work, max(1, most))


def encode_mma_sync(spec: KernelSpec, x: Arguments, sm_count: int) -> tuple[ArgumentBlock, int]:
    """GemmParams of ``sm80/params.cuh``, and the grid."""
    plan, slices = plan_mma_sync(spec, x.m, x.n, x.k, sm_count)
    pointers = (x.a, x.b, x.metadata, x.out, x.out_metadata, x.bias, x.residual, x.counts)
    strides = (x.a_stride, x.b_stride, x.out_stride, x.residual_stride)
    content = struct.pack("<8Q4q4i", *pointers, *strides, x.m, x.n, x.k, plan.k_blocks) + raster_params(plan)
    content += struct.pack("<4x5Q2i", *(x.scales or (0,) * 7))
    content += fast_divmod(slices) + struct.pack("<2i4x2Q", *divmod(plan.tile_units, slices), x.partials, x.flags)
    return ArgumentBlock(content), plan.tiles * slices
