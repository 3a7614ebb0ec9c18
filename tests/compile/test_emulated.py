"""The mma.sync kernels as they are rendered, run on the CPU: every load, MMA and store against the contract.

``emulator/`` stands in for CUDA and CUTLASS: what each lane holds is as the PTX ISA has it, copies land only when they
are waited for, and an ldmatrix with bank conflicts stops the test. Races are not found; compute-sanitizer does that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from srelu24.measuring import verify, workload
from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import (
    Arguments,
    Operands,
    encode_mma_sync,
    plan_mma_sync,
    row_stride,
    scale_arguments,
)
from srelu24_gen.paths import templates_dir
from srelu24_gen.render import render
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem, Producer

EMULATOR = Path(__file__).parent / "emulator"
COMPILER = shutil.which("g++")
FAMILIES = (
    Family(Op.GEMM, DType.BF16, bias=True),
    Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2, bias=True, count_nonzeros=True),
    Family(Op.SPGEMM, DType.BF16, bias=True, residual=True),
)
FP8_FAMILIES = (
    Family(Op.GEMM, DType.E4M3, out=DType.BF16, weight=DType.E5M2),
    Family(Op.GEMM_RELU2_24, DType.E4M3, Activation.RELU2, out=DType.BF16),
    Family(Op.GEMM_RELU2_24, DType.E4M3, Activation.RELU2, bias=True, out=DType.E4M3),
    Family(Op.SPGEMM, DType.E4M3, bias=True, residual=True, out=DType.BF16),
)
TILES = ((64, 128, 2), (128, 128, 3))
SIZES = ((70, 136, 328), (1, 24, 8), (131, 8, 136))
FP8_SIZES = ((70, 144, 336), (1, 48, 16))


SM_COUNT = 24
"""Of the emulated GPU: more than the tiles of every problem here, so that K decides how often it is cut."""


def spec_of(family: Family, tile_m: int, tile_n: int, stages: int, stream_k: bool = False) -> KernelSpec:
    tile_k = 128 // family.dtype.bytes
    config = KernelConfig(tile_m, tile_n, tile_k, cluster_m=1, stages=stages, producer=Producer.ALL, raster_group=2)
    config = dataclasses.replace(config, stream_k=stream_k)
    return KernelSpec(family, config, "sm_89")


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize(
    "spec",
    [spec_of(family, *tile) for family, tile in itertools.product(FAMILIES, TILES)],
    ids=lambda spec: spec.name,
)
def test_a_kernel_computes_the_contract(spec: KernelSpec, tmp_path: Path) -> None:
    run = compiled(spec, tmp_path)
    for m, n, k in SIZES:
        problem = Problem(spec.family, m, n, k)
        launch_and_check(run, spec, problem, operands_of(problem))


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize(
    "spec",
    [spec_of(family, *tile) for family, tile in zip(FP8_FAMILIES, itertools.cycle(TILES), strict=False)],
    ids=lambda spec: spec.name,
)
def test_an_8_bit_kernel_computes_its_contract(spec: KernelSpec, tmp_path: Path) -> None:
    run = compiled(spec, tmp_path)
    for m, n, k in FP8_SIZES:
        problem = Problem(spec.family, m, n, k)
        launch_and_check(run, spec, problem, workload.operands_for(problem, 0.5, "cpu"))


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize(
    "spec",
    [spec_of(family, 64, 128, 2, stream_k=True) for family in (*FAMILIES, FP8_FAMILIES[3])],
    ids=lambda spec: spec.name,
)
def test_a_kernel_that_splits_k_computes_the_same(spec: KernelSpec, tmp_path: Path) -> None:
    run = compiled(spec, tmp_path)
    for m, n, k in ((70, 16, 2320), (1, 16, 1040), (1, 16, 336)):
        problem = Problem(spec.family, m, n, k)
        operands = workload.operands_for(problem, 0.5, "cpu") if spec.family.scaled else operands_of(problem)
        launch_and_check(run, spec, problem, operands)


def launch_and_check(run: ctypes._NamedFuncPointer, spec: KernelSpec, problem: Problem, operands: Operands) -> None:
    plan, slices = plan_mma_sync(spec, problem.m, problem.n, problem.k, SM_COUNT)
    assert (slices > 1) == (spec.config.stream_k and problem.k > 1024)
    partials = torch.full((plan.tiles * (slices - 1) * spec.config.tile_m * spec.config.tile_n,), float("nan"))
    flags = torch.zeros(plan.tiles, dtype=torch.int32)
    arguments = arguments_of(problem, operands)._replace(partials=partials.data_ptr(), flags=flags.data_ptr())
    block, grid = encode_mma_sync(spec, arguments, SM_COUNT)
    run(ctypes.cast(block.address, ctypes.POINTER(ctypes.c_void_p))[0], grid)
    found = verify.check(problem, operands)
    assert found.ok, f"{problem}: {found.detail}"
    assert not flags.any(), "the next launch finds the flags as this one did"


def compiled(spec: KernelSpec, folder: Path) -> ctypes._NamedFuncPointer:
    assert COMPILER
    source, library = folder / "kernel.cuh", folder / "kernel.so"
    source.write_text(render(spec).source)
    options = ["-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread"]
    folders = (f"-I{EMULATOR / 'include'}", f"-I{templates_dir() / 'include'}")
    command = [COMPILER, *options, *folders, f'-DKERNEL="{source}"', str(EMULATOR / "main.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    run = ctypes.CDLL(str(library)).run
    run.argtypes = (ctypes.c_void_p, ctypes.c_int)
    run.restype = None
    return run


def operands_of(problem: Problem) -> Operands:
    """Small whole numbers, whose sums are exact; outputs that nothing has been written to."""
    family, (m, n, k) = problem.family, (problem.m, problem.n, problem.k)
    draw = torch.Generator().manual_seed(m)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=draw).bfloat16()

    dense, b, bias, residual = matrix(m, k), matrix(n, k), matrix(n), matrix(m, n)
    a = reference.sparsify24(dense, Activation.NONE) if family.op is Op.SPGEMM else dense
    out: torch.Tensor | Sparse24 = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    if family.op is Op.GEMM_RELU2_24:
        out = Sparse24.empty(m, n, torch.bfloat16, "cpu")
        out.values.fill_(float("nan"))
        out.metadata.fill_(-1)
    counts = torch.zeros(n, dtype=torch.int32) if family.count_nonzeros else None
    return Operands(a=a, b=b, out=out, bias=bias, residual=residual if family.residual else None, counts=counts)


def arguments_of(problem: Problem, o: Operands) -> Arguments:
    a_values = o.a.values if isinstance(o.a, Sparse24) else o.a
    out_values = o.out.values if isinstance(o.out, Sparse24) else o.out
    assert o.b is not None
    return Arguments(
        a=a_values.data_ptr(),
        b=o.b.data_ptr(),
        out=out_values.data_ptr(),
        metadata=o.a.metadata.data_ptr() if isinstance(o.a, Sparse24) else 0,
        out_metadata=o.out.metadata.data_ptr() if isinstance(o.out, Sparse24) else 0,
        bias=0 if o.bias is None else o.bias.data_ptr(),
        residual=0 if o.residual is None else o.residual.data_ptr(),
        counts=0 if o.counts is None else o.counts.data_ptr(),
        partials=0,
        flags=0,
        m=problem.m,
        n=problem.n,
        k=problem.k,
        a_stride=row_stride(a_values),
        b_stride=o.b.stride(0),
        out_stride=out_values.stride(0),
        residual_stride=problem.n,
        scales=None if o.scales is None else scale_arguments(o.scales),
    )
