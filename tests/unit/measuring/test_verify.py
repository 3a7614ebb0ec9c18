"""Verification: right kernels pass whatever their order of summing, and each kind of wrong output is caught."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srelu24.measuring import verify, workload
from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24, pack_metadata, unpack_metadata
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem

NONE, RELU2 = Activation.NONE, Activation.RELU2
M, N, K = 70, 264, 136

FAMILIES = [
    Family(Op.GEMM_RELU2_24, DType.BF16, RELU2),
    Family(Op.GEMM_RELU2_24, DType.FP16, RELU2, bias=True, count_nonzeros=True),
    Family(Op.SPGEMM, DType.BF16, bias=True, residual=True),
    Family(Op.SPGEMM, DType.FP16),
    Family(Op.GEMM, DType.BF16, RELU2, bias=True),
    Family(Op.GEMM, DType.FP16),
    Family(Op.SPARSIFY24, DType.BF16, RELU2),
    Family(Op.SPARSIFY24, DType.FP16),
]


def fake_kernel(problem: Problem, o: Operands, accumulate: torch.dtype = torch.float32) -> None:
    """The contract itself, with sums of the given precision, as if a kernel had written the outputs."""
    family, out = problem.family, o.out
    result: Tensor | Sparse24
    if family.op is Op.SPARSIFY24:
        assert isinstance(o.a, Tensor)
        result = reference.sparsify24(o.a, family.activation)
    elif family.op is Op.GEMM_RELU2_24:
        assert isinstance(o.a, Tensor)
        assert o.b is not None
        result = reference.gemm_relu2_24(o.a, o.b, o.bias, accumulate=accumulate)
        if o.counts is not None:
            o.counts.add_(reference.count_nonzeros(o.a, o.b, o.bias, accumulate=accumulate))
    elif family.op is Op.SPGEMM:
        assert isinstance(o.a, Sparse24)
        assert o.b is not None
        result = reference.spgemm(o.a, o.b, o.bias, o.residual, accumulate=accumulate)
    else:
        assert isinstance(o.a, Tensor)
        assert o.b is not None
        result = reference.gemm(o.a, o.b, o.bias, o.residual, family.activation, accumulate=accumulate)
    if isinstance(result, Sparse24):
        assert isinstance(out, Sparse24)
        out.values.copy_(result.values)
        out.metadata.copy_(result.metadata)
    else:
        assert isinstance(out, Tensor)
        out.copy_(result)


def operands(problem: Problem, density: float = 0.3, seed: int = 0) -> Operands:
    o = workload.operands_for(problem, density, "cpu", seed)
    if o.counts is not None:
        o.counts.zero_()
    return o


def solved(family: Family, m: int = M, n: int = N, k: int = K, density: float = 0.3) -> tuple[Problem, Operands]:
    problem = Problem(family, m, n, 0 if family.op is Op.SPARSIFY24 else k)
    o = operands(problem, density)
    fake_kernel(problem, o)
    return problem, o


def packed(o: Operands) -> Sparse24:
    assert isinstance(o.out, Sparse24)
    return o.out


def dense_out(o: Operands) -> Tensor:
    assert isinstance(o.out, Tensor)
    return o.out


@given(
    st.sampled_from(FAMILIES),
    st.sampled_from([0, 1, 63, 64, 65, 130]),
    st.sampled_from([8, 24, 256, 264]),
    st.sampled_from([8, 64, 200]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 100),
)
def test_the_contract_passes_at_any_precision_of_the_sums(
    family: Family, m: int, n: int, k: int, density: float, seed: int
) -> None:
    problem = Problem(family, m, n, 0 if family.op is Op.SPARSIFY24 else k)
    if k == 8 and density == 0.1:
        density = 0.3  # cannot be reached with so few products
    for accumulate in (torch.float32, torch.float64):
        o = operands(problem, density, seed)
        fake_kernel(problem, o, accumulate)
        found = verify.check(problem, o)
        assert found.ok, found.detail


@pytest.mark.parametrize("family", FAMILIES[:6], ids=lambda f: f.name)
def test_another_order_of_k_passes_and_a_lost_product_does_not(family: Family) -> None:
    problem = Problem(family, M, N, 1024)
    o = operands(problem)
    order = torch.randperm(1024)
    a = o.a.to_dense() if isinstance(o.a, Sparse24) else o.a
    assert o.b is not None
    products = a.float()[:, order] @ o.b.float()[:, order].T

    def finish(acc: Tensor) -> None:
        acc = acc + sum(t.float() for t in (o.bias, o.residual) if t is not None)
        identity = torch.eye(N, dtype=a.dtype)
        # Let the reference finish from the sums: a product with the identity adds nothing to their rounding.
        if family.op is Op.SPGEMM or family.activation is NONE:
            dense_out(o).copy_(acc.to(a.dtype))
        elif family.op is Op.GEMM:
            dense_out(o).copy_(reference.gemm(acc.to(a.dtype), identity, activation=RELU2))
        else:
            pruned = reference.sparsify24(acc.to(a.dtype), RELU2)
            packed(o).values.copy_(pruned.values)
            packed(o).metadata.copy_(pruned.metadata)
            if o.counts is not None:
                o.counts.copy_((acc.to(a.dtype) > 0).sum(0))

    finish(products)
    found = verify.check(problem, o)
    assert found.ok, found.detail
    finish(products - a.float()[:, :16] @ o.b.float()[:, :16].T)
    assert not verify.check(problem, o).ok


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.op is not Op.SPARSIFY24], ids=lambda f: f.name)
def test_sums_in_storage_precision_are_caught(family: Family) -> None:
    problem, o = solved(family, k=512)
    acc = torch.zeros(M, N, dtype=torch.bfloat16)
    a = o.a.to_dense() if isinstance(o.a, Sparse24) else o.a
    assert o.b is not None
    for k in range(0, 512, 16):
        acc += (a[:, k : k + 16].float() @ o.b[:, k : k + 16].float().T).bfloat16()
    sloppy = acc.to(a.dtype)
    if isinstance(o.out, Tensor):
        o.out.copy_(sloppy if family.activation is NONE else sloppy.relu() ** 2)
    else:
        o.out.values.copy_(reference.sparsify24(sloppy, RELU2).values)
    assert not verify.check(problem, o).ok


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("poisoned", [math.nan, math.inf])
def test_a_value_that_is_not_a_number_never_passes(family: Family, poisoned: float) -> None:
    problem, o = solved(family)
    target = o.out.values if isinstance(o.out, Sparse24) else o.out
    target[69, 131 if isinstance(o.out, Sparse24) else 263] = poisoned
    found = verify.check(problem, o)
    assert not found.ok
    assert "row 69" in found.detail
    assert found.max_error == math.inf


def flip(o: Operands, row: int, group: int, nibble: int) -> None:
    """Overwrite one nibble of the output's metadata."""
    s = packed(o)
    nibbles = unpack_metadata(s.metadata, *s.shape).clone()
    nibbles[row, group] = nibble
    s.metadata.copy_(pack_metadata(nibbles))


PACKED = [f for f in FAMILIES if f.op in (Op.GEMM_RELU2_24, Op.SPARSIFY24)]


@pytest.mark.parametrize("family", PACKED, ids=lambda f: f.name)
@pytest.mark.parametrize("nibble", [0x0, 0x1, 0x5, 0xF])
def test_illegal_nibbles_are_caught(family: Family, nibble: int) -> None:
    problem, o = solved(family)
    flip(o, 66, 65, nibble)
    assert not verify.check(problem, o).ok


@pytest.mark.parametrize("family", PACKED, ids=lambda f: f.name)
def test_garbage_in_the_padding_is_caught(family: Family) -> None:
    problem, o = solved(family)
    metadata = packed(o).metadata
    # Rows from 70 to 128 and columns from 264 to 512 are padding.
    for block in ((1, 0, 127, 0), (0, 1, 5, 3)):
        before = metadata[block].clone()
        metadata[block] = 0x4444_0444
        found = verify.check(problem, o)
        assert not found.ok
        assert "metadata" in found.detail
        metadata[block] = before
    assert verify.check(problem, o).ok


def select(o: Operands, m: int, f: int, choose: Callable[[Tensor], Tensor]) -> None:
    """Prune again with another choice: ``choose`` gives int64 positions [M, F/4, 2] from squares [M, F/4, 4]."""
    assert isinstance(o.a, Tensor)
    assert o.b is not None
    bias = 0 if o.bias is None else o.bias.float()
    rounded = (o.a.float() @ o.b.float().T + bias).relu().to(o.a.dtype)
    groups = rounded.view(m, f // 4, 4)
    positions = choose(groups.float()).sort(-1).values
    s = packed(o)
    s.values.copy_((groups * groups).gather(2, positions).flatten(1))
    s.metadata.copy_(pack_metadata((positions[..., 0] | positions[..., 1] << 2).to(torch.uint8)))


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda f: f.name)
def test_keeping_anything_but_the_two_largest_is_caught(family: Family) -> None:
    problem, o = solved(family)
    select(o, M, N, lambda groups: groups.argsort(dim=-1, descending=True, stable=True)[..., :2])
    assert verify.check(problem, o).ok
    for choice in ((0, 2), (1, 2), (2, 3)):
        select(o, M, N, lambda groups, c=list(choice): groups.argsort(dim=-1, descending=True, stable=True)[..., c])
        found = verify.check(problem, o)
        assert not found.ok
        assert "selection" in found.detail


def test_ties_go_to_the_lower_index() -> None:
    problem = Problem(FAMILIES[0], 64, 256, 8)
    o = operands(problem)
    assert isinstance(o.a, Tensor)
    assert o.b is not None
    o.b.copy_(o.b[:1].abs().expand(256, 8))  # every column is the same
    o.a.abs_()
    select(o, 64, 256, lambda groups: torch.tensor([0, 1]).expand(*groups.shape[:2], 2))
    assert verify.check(problem, o).ok
    select(o, 64, 256, lambda groups: torch.tensor([0, 2]).expand(*groups.shape[:2], 2))
    assert not verify.check(problem, o).ok


@pytest.mark.parametrize("by", [1, -1])
def test_wrong_counts_are_caught(by: int) -> None:
    problem, o = solved(FAMILIES[1])
    assert o.counts is not None
    o.counts[263] += by
    found = verify.check(problem, o)
    assert not found.ok
    assert "count" in found.detail
    assert "column 263" in found.detail


@pytest.mark.parametrize("family", FAMILIES[:6], ids=lambda f: f.name)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_inputs_pass_when_the_contract_is_followed(family: Family, special: float) -> None:
    problem = Problem(family, M, N, K)
    o = operands(problem)
    (o.a.values if isinstance(o.a, Sparse24) else o.a)[3, 5] = special
    fake_kernel(problem, o)
    found = verify.check(problem, o)
    assert found.ok, found.detail
    if math.isnan(special) and isinstance(o.out, Tensor):
        o.out.nan_to_num_(0.0)
        assert not verify.check(problem, o).ok


def test_fp16_overflow_follows_the_contract() -> None:
    problem = Problem(FAMILIES[1], M, N, K)
    o = operands(problem, 1.0)
    assert isinstance(o.a, Tensor)
    o.a.mul_(100)  # squares beyond 65504
    fake_kernel(problem, o)
    assert packed(o).values.isinf().any()
    assert verify.check(problem, o).ok
    packed(o).values.clamp_(max=65504)  # saturating instead
    assert not verify.check(problem, o).ok


def test_sparsify24_is_compared_bit_for_bit() -> None:
    problem, o = solved(FAMILIES[7], density=0.5)
    assert isinstance(o.a, Tensor)
    o.a[:, 0:4] = torch.tensor([-0.0, -0.0, -0.0, -0.0])
    fake_kernel(problem, o)
    assert verify.check(problem, o).ok
    packed(o).values[7, 0] = 0.0
    found = verify.check(problem, o)
    assert not found.ok
    assert "row 7, column 0" in found.detail
    fake_kernel(problem, o)
    values = packed(o).values.view(torch.int16)
    values[9, 50] += 1  # one unit in the last place
    assert not verify.check(problem, o).ok


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_verify_runs_the_kernel_on_poisoned_outputs(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, o = solved(family)
    config = KernelConfig(stages=3)
    ran: list[KernelSpec] = []

    def lazy(spec: KernelSpec, given: Operands) -> None:
        ran.append(spec)

    monkeypatch.setattr(launch, "run", lazy)
    found = verify.verify(problem, config, o)
    assert ran == [KernelSpec(family, config)]
    assert not found.ok, "the right output of an earlier run was still there"

    monkeypatch.setattr(launch, "run", lambda spec, given: fake_kernel(problem, given))
    found = verify.verify(problem, config, o)
    assert found.ok, found.detail
    assert found.max_error < 0.1


def test_large_outputs_are_checked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, o = solved(FAMILIES[1], m=200)
    whole = verify.check(problem, o)
    monkeypatch.setattr(verify, "CHUNK_ELEMENTS", 64 * N)
    assert verify.check(problem, o) == whole
    packed(o).values[199, 3] += 1
    found = verify.check(problem, o)
    assert not found.ok
    assert "row 199, column 3" in found.detail


def test_the_callers_matmul_precision_is_left_as_it_was() -> None:
    problem, o = solved(FAMILIES[5])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert verify.check(problem, o).ok
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_operands_of_another_problem_are_refused() -> None:
    problem, o = solved(FAMILIES[0])
    with pytest.raises(ValueError, match="no packed output"):
        verify.check(dataclasses.replace(problem, n=N + 8), o)
