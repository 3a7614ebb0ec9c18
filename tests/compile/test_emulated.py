"""The mma.sync kernels as they are rendered, run on the CPU: every load, MMA and store against the contract.

``emulator/`` stands in for CUDA and CUTLASS: what each lane holds is as the PTX ISA has it, copies land only when they
are waited for, and an ldmatrix with bank conflicts stops the test. Races are not found; compute-sanitizer does that.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from srelu24 import reference, verify
from srelu24.arguments import Arguments, encode_mma_sync
from srelu24.launch import Operands
from srelu24.sparse24 import Sparse24
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
CONFIGS = tuple(
    KernelConfig(tile_m, tile_n, 64, cluster_m=1, stages=stages, producer=Producer.ALL, raster_group=2)
    for tile_m, tile_n, stages in ((64, 128, 2), (128, 128, 3))
)
SIZES = ((70, 136, 328), (1, 24, 8), (131, 8, 136))


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize(
    "spec",
    [KernelSpec(family, config, "sm_80") for family, config in itertools.product(FAMILIES, CONFIGS)],
    ids=lambda spec: spec.name,
)
def test_a_kernel_computes_the_contract(spec: KernelSpec, tmp_path: Path) -> None:
    run = compiled(spec, tmp_path)
    for m, n, k in SIZES:
        problem = Problem(spec.family, m, n, k)
        operands, arguments = operands_of(problem)
        block, grid = encode_mma_sync(spec, arguments)
        run(ctypes.cast(block.address, ctypes.POINTER(ctypes.c_void_p))[0], grid)
        found = verify.check(problem, operands)
        assert found.ok, f"{m}x{n}x{k}: {found.detail}"


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


def operands_of(problem: Problem) -> tuple[Operands, Arguments]:
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
    o = Operands(a=a, b=b, out=out, bias=bias, residual=residual if family.residual else None, counts=counts)
    a_values = a.values if isinstance(a, Sparse24) else a
    out_values = out.values if isinstance(out, Sparse24) else out
    arguments = Arguments(
        a=a_values.data_ptr(),
        b=b.data_ptr(),
        out=out_values.data_ptr(),
        metadata=a.metadata.data_ptr() if isinstance(a, Sparse24) else 0,
        out_metadata=out.metadata.data_ptr() if isinstance(out, Sparse24) else 0,
        bias=bias.data_ptr(),
        residual=0 if o.residual is None else o.residual.data_ptr(),
        counts=0 if counts is None else counts.data_ptr(),
        partials=0,
        flags=0,
        m=m,
        n=n,
        k=k,
        a_stride=a_values.stride(0),
        b_stride=b.stride(0),
        out_stride=out_values.stride(0),
        residual_stride=n,
    )
    return o, arguments
