"""Is the output of a training kernel right? docs/training.md says what it has to be, plain PyTorch what that is here.

What a kernel sums is held to the intervals of :mod:`srelu24.measuring.verify`: rows are put in order, and a weight
gradient is a product with the transpose. What it prunes along tokens has to be, value by value, what pruning its own
output gives.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from srelu24.measuring.verify import (
    BLOCK_ROWS,
    CHUNK_ELEMENTS,
    Check,
    Findings,
    Wrong,
    accumulators,
    check_dense,
    check_packed,
    exact_float32,
    nibbles,
    passed,
    unpack,
)
from srelu24.measuring.workload_step import by_position, poison_outputs
from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.launch import Operands
from srelu24.training import kernels
from srelu24.training.kernels import TrainingOperands
from srelu24.training.order import row_order, token_order
from srelu24.training.packed import TokenSparse24
from srelu24_gen.spec import Activation, KernelConfig, KernelSpec, Op, Problem

ROOT_ERROR = 2.0**-20
"""Of 2 dS sqrt(S) before it is rounded, relative: the root is approximate, and there are two products in fp32."""


def verify(problem: Problem, config: KernelConfig, operands: TrainingOperands, arch: str = "sm_90a") -> Check:
    """Poison the outputs, run the kernel once, and compare all it wrote with an independent reference.

    Arguments and errors as of :func:`srelu24.measuring.verify.verify`.
    """
    before = None
    if problem.family.accumulate:
        assert isinstance(operands.out, Tensor)
        before = operands.out.clone()
    else:
        poison_outputs(operands)
    kernels.run(KernelSpec(problem.family, config, arch), operands)
    return check(problem, operands, before)


@torch.no_grad()
def check(problem: Problem, o: TrainingOperands, before: Tensor | None = None) -> Check:
    """Compare outputs that are already there with the contract. Works on any device.

    Args:
        before: what ``out`` was, where the kernel adds to it.
    """
    with exact_float32():
        if problem.family.op is Op.SPGEMM_TOKENS:
            return check_dense(problem, _over_tokens(problem, o, before))
        rows = row_order(problem.m, o.token_stride, o.b.device)
        if problem.family.op is Op.SPGEMM:
            assert isinstance(o.a, Sparse24)
            assert isinstance(o.out, Tensor)
            return check_dense(problem, Operands(a=o.a, b=o.b, bias=o.bias, out=o.out[rows]))
        assert isinstance(o.a, Tensor)
        in_order = Operands(a=o.a[rows], b=o.b, bias=o.bias, out=o.out, counts=o.counts)
        if problem.family.op is Op.GEMM_RELU2_24:
            first = check_packed(problem, in_order)
        else:
            first = _check_hidden_gradient(problem, o, in_order)
        return _check_along_tokens(o, first) if first.ok else first


def _over_tokens(problem: Problem, o: TrainingOperands, before: Tensor | None) -> Operands:
    """A weight gradient as the product that it is, of A^T [M, K] and B^T [N, K], with K by position."""
    assert isinstance(o.a, TokenSparse24)
    assert isinstance(o.out, Tensor)
    out = o.out
    if problem.family.transposed:
        out, before = out.T, None if before is None else before.T
    positions = token_order(problem.k, o.token_stride, o.b.device)
    return Operands(a=o.a.transposed(), b=o.b[positions].T, residual=before, out=out)


def _check_hidden_gradient(problem: Problem, o: TrainingOperands, in_order: Operands) -> Check:
    """dY1 [M, N] on the places of S: 2 round(G W2) sqrt(S), rounded, and zero where S is."""
    assert isinstance(o.out, Sparse24)
    assert o.saved is not None
    findings, storage = Findings("kept value"), o.out.dtype
    try:
        for row0, acc, noise in accumulators(problem, in_order):
            row1 = row0 + len(acc)
            s = unpack(o.saved, row0, row1)
            acc, noise = acc.gather(1, s.columns), noise.gather(1, s.columns)
            low, exact, high = (_gradient(ds.to(storage), s.values) for ds in (acc - noise, acc, acc + noise))
            low, high = low - low.abs() * ROOT_ERROR, high + high.abs() * ROOT_ERROR
            findings.compare(o.out.values[row0:row1], low.to(storage), high.to(storage), exact.to(storage), row0)
    except Wrong as wrong:
        return Check(False, findings.max_error, str(wrong))
    return passed(findings)


def _gradient(ds: Tensor, s: Tensor) -> Tensor:
    """In fp32, before it is rounded."""
    return torch.where(s == 0, 0.0, 2 * ds.float() * s.float().sqrt())


def _check_along_tokens(o: TrainingOperands, first: Check) -> Check:
    """The form along tokens of an output that is right: what pruning the output along tokens gives."""
    along, packed = o.along_tokens, o.out
    assert along is not None
    assert isinstance(packed, Sparse24)
    m, f = packed.shape
    rows, features = (max(CHUNK_ELEMENTS // other // BLOCK_ROWS, 1) * BLOCK_ROWS for other in (f, m))
    findings = Findings("kept value along tokens, row counting features,")
    try:
        dense = by_position(torch.cat([unpack(packed, r, min(r + rows, m)).dense for r in range(0, m, rows)]))
        for f0 in range(0, f, features):
            _compare_along_tokens(along, dense[:, f0 : f0 + features], f0, findings)
    except Wrong as wrong:
        return Check(False, findings.max_error, str(wrong))
    return dataclasses.replace(first, detail=f"{first.detail}; {findings.total} along tokens")


def _compare_along_tokens(along: TokenSparse24, dense: Tensor, f0: int, findings: Findings) -> None:
    """Features from f0 (a multiple of 64) on: ``dense`` [M, features], rows by position."""
    m, features = dense.shape
    expected = reference.sparsify24(dense.T.contiguous(), Activation.NONE)
    blocks = slice(f0 // BLOCK_ROWS, (f0 + features) // BLOCK_ROWS)
    places, wanted = (nibbles(e)[:, : m // 4] for e in (along.metadata[blocks], expected.metadata))
    Findings("2:4 selection along tokens, row counting features,").require(
        places == wanted, f0, lambda i: f"nibble {places[i].item():#x}, expected {wanted[i].item():#x}"
    )
    exact = expected.values
    findings.compare(along.values[:, f0 : f0 + features].T, exact, exact, exact, f0)
