"""The kernels beyond 2^31 elements: large matrices, and small ones whose rows lie far apart."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from srelu24.measuring import verify, workload
from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands
from srelu24_gen import space
from srelu24_gen.spec import Activation, DType, Family, KernelSpec, Op, Problem
from srelu24_gen.target import target_by_key

TARGET = target_by_key("h200")
BIG_M, BIG_F = 140_000, 32_768
BIG = {
    "gemm": Problem(Family(Op.GEMM, DType.BF16), BIG_M, BIG_F, 64),
    "fused": Problem(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), BIG_M, BIG_F, 64),
    "sparsify": Problem(Family(Op.SPARSIFY24, DType.BF16, Activation.RELU2), BIG_M, BIG_F),
    "packed in": Problem(Family(Op.SPGEMM, DType.BF16), BIG_M, 64, BIG_F),
    "residual": Problem(Family(Op.SPGEMM, DType.BF16, residual=True), BIG_M, BIG_F // 2, 64),
}


def spec_of(problem: Problem) -> KernelSpec:
    return KernelSpec(problem.family, space.default(problem, TARGET), TARGET.arch)


BIG_SPECS = {name: spec_of(problem) for name, problem in BIG.items()}
STRIDED = [
    spec_of(Problem(family, 3000, 2304, 136))
    for family in (Family(Op.GEMM, DType.FP16, bias=True), Family(Op.SPGEMM, DType.FP16, residual=True))
]
SPECS = [*BIG_SPECS.values(), *STRIDED]


def rows_are_right(problem: Problem, o: Operands, first: int, rows: int = 192) -> None:
    """Check some rows of a launch as if they were all: whole blocks of 64, or up to the end."""

    def part(x: Tensor | Sparse24) -> Tensor | Sparse24:
        stop = min(first + rows, problem.m)
        if not isinstance(x, Sparse24):
            return x[first:stop]
        blocks = x.metadata[first // 64 : -(-stop // 64)]
        return Sparse24(x.values[first:stop], blocks, (stop - first, x.shape[1]))

    piece = dataclasses.replace(problem, m=min(rows, problem.m - first))
    o = dataclasses.replace(o, a=part(o.a), out=part(o.out), residual=None if o.residual is None else part(o.residual))
    found = verify.check(piece, o)
    assert found.ok, f"rows from {first}: {found.detail}"


SAMPLES = (0, BIG_M // 2 // 64 * 64, (BIG_M - 100) // 64 * 64)


def test_more_than_2_to_the_31_elements(device: torch.device) -> None:
    data = workload.make_ffn(BIG_M, 64, BIG_F, DType.BF16, 0.3, device, seed=9)
    hidden = Operands(a=data.x, b=data.w1, out=launch.allocate(BIG["gemm"], device))
    launch.run(BIG_SPECS["gemm"], hidden)
    fused = Operands(a=data.x, b=data.w1, out=launch.allocate(BIG["fused"], device))
    workload.poison(fused.out)
    launch.run(BIG_SPECS["fused"], fused)
    pruned = Operands(a=hidden.out, out=launch.allocate(BIG["sparsify"], device))
    workload.poison(pruned.out)
    launch.run(BIG_SPECS["sparsify"], pruned)
    for first in SAMPLES:
        rows_are_right(BIG["gemm"], hidden, first)
        rows_are_right(BIG["fused"], fused, first)
        rows_are_right(BIG["sparsify"], pruned, first)
    assert torch.equal(pruned.out.values, fused.out.values)
    assert torch.equal(pruned.out.metadata, fused.out.metadata)


def test_sparse_gemm_of_more_than_2_to_the_31_elements(device: torch.device) -> None:
    h = torch.empty(BIG_M, BIG_F, dtype=torch.bfloat16, device=device).normal_()
    s = launch.allocate(BIG["sparsify"], device)
    launch.run(BIG_SPECS["sparsify"], Operands(a=h, out=s))
    del h
    w2 = torch.randn(64, BIG_F, device=device).bfloat16() / 128
    packed_in = Operands(a=s, b=w2, out=launch.allocate(BIG["packed in"], device))
    workload.poison(packed_in.out)
    launch.run(BIG_SPECS["packed in"], packed_in)
    small = workload.operands_for(dataclasses.replace(BIG["residual"], m=64), 0.5, device)
    narrow = reference.sparsify24(torch.randn(BIG_M, 64, device=device).bfloat16(), Activation.RELU2)
    residual = torch.empty(BIG_M, BIG_F // 2, dtype=torch.bfloat16, device=device).normal_()
    wide = Operands(a=narrow, b=small.b, residual=residual, out=torch.full_like(residual, math.nan))
    launch.run(BIG_SPECS["residual"], wide)
    for first in SAMPLES:
        rows_are_right(BIG["packed in"], packed_in, first)
        rows_are_right(BIG["residual"], wide, first)


@pytest.mark.parametrize("spec", STRIDED, ids=lambda spec: spec.name)
def test_strides_beyond_2_to_the_31_elements(spec: KernelSpec, device: torch.device) -> None:
    problem, stride = Problem(spec.family, 3000, 2304, 136), 1 << 20
    # One store for all operands, side by side in its rows.
    store = torch.empty(3000, stride, dtype=torch.float16, device=device)
    o = workload.operands_for(problem, 0.5, device)

    def far(t: Tensor, column: int) -> Tensor:
        view = store[: t.shape[0], column : column + t.shape[1]]
        view.copy_(t)
        return view

    o = dataclasses.replace(
        o,
        a=far(o.a, 0) if isinstance(o.a, Tensor) else o.a,
        b=far(o.b, 1 << 16),
        out=far(o.out, 2 << 16),
        residual=None if o.residual is None else far(o.residual, 3 << 16),
    )
    found = verify.verify(problem, spec.config, o, TARGET.arch)
    assert found.ok, found.detail
