"""Which options of a family go together, whatever computes it; and the answer that :mod:`srelu24_gen.space` gives."""

from __future__ import annotations

from dataclasses import dataclass

from srelu24_gen.bindings import PACKING_OPS
from srelu24_gen.spec import EPILOGUES, PRUNED_ACTIVATIONS, WIDE_TYPES, Activation, DType, Family, Op, Problem


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a configuration is valid; if not, one sentence says why."""

    ok: bool
    reason: str = ""


def trains(family: Family) -> bool:
    """Whether it is a kernel of a training step."""
    ops = (Op.GEMM_DRELU2_24, Op.SPGEMM_TOKENS, Op.TRANSPOSE, Op.DENSE_COLUMNS)
    return family.op in ops or family.tokens or family.permuted


def supports_training_sizes(problem: Problem) -> Verdict:
    """Groups along tokens are whole blocks of 16, and what lies along a swizzled row is whole rows of 64."""
    if problem.family.op is Op.TRANSPOSE:
        return Verdict(True) if problem.m % 8 == 0 else Verdict(False, f"M = {problem.m} is not a multiple of 8")
    if problem.tokens % 16:
        return Verdict(False, f"{problem.tokens} tokens are not a multiple of 16; pad the batch")
    for width in problem.widths:
        if width % 64:
            return Verdict(False, f"a width of {width} is not a multiple of 64; pad the layer's width")
    return Verdict(True)


def supports_family(family: Family) -> Verdict:
    """Whether the family's options go together."""
    op = family.op
    if op.prunes and family.activation is not PRUNED_ACTIVATIONS[op]:
        only = PRUNED_ACTIVATIONS[op].value
        return Verdict(False, f"{op.value} always applies {only}; its activation must be {only}")
    if op is Op.SPGEMM and family.activation is not Activation.NONE:
        return Verdict(False, "spgemm has no activation; it is the second GEMM of the layer")
    if family.count_nonzeros and not op.prunes:
        return Verdict(False, f"only GEMMs that prune count non-zeros, not {op.value}")
    if family.residual and op is not Op.SPGEMM:
        return Verdict(False, f"only spgemm adds a residual, not {op.value}")
    if family.bias and not (op.prunes or op in (Op.GEMM, Op.SPGEMM)):
        return Verdict(False, f"{op.value} takes no bias")
    verdict = _supports_training_options(family)
    return _supports_types(family) if verdict.ok else verdict


def _supports_training_options(family: Family) -> Verdict:
    op = family.op
    if op is Op.GEMM_DRELU2_24 and not family.tokens:
        return Verdict(False, "gemm_drelu2_24 always packs along tokens")
    if op in (Op.GEMM_DRELU2_24, Op.SPGEMM_TOKENS) and family.activation is not Activation.NONE:
        return Verdict(False, f"{op.value} has no activation")
    if family.tokens and op not in PACKING_OPS:
        return Verdict(False, f"only GEMMs with a packed output pack along tokens, not {op.value}")
    if family.permuted and (not op.multiplies or op is Op.SPGEMM_TOKENS or family.residual):
        return Verdict(False, f"{op.value}{' with a residual' * family.residual} has no rows to permute")
    for name in ("accumulate", "transposed"):
        if getattr(family, name) and op is not Op.SPGEMM_TOKENS:
            return Verdict(False, f"only spgemm_tokens has an output that is {name}, not {op.value}")
    if (family.tokens or (family.permuted and family.activates)) and not _has_gradient(family):
        return Verdict(False, f"the kernels of a training step have no gradient of {family.activation.value}")
    if (family.tokens or family.permuted) and family.dtype not in WIDE_TYPES:
        return Verdict(False, f"a training step does not take {family.dtype.value}")
    return Verdict(True)


def _has_gradient(family: Family) -> bool:
    return family.op is Op.GEMM_DRELU2_24 or EPILOGUES[family.activation].trains


_RESULTS: dict[tuple[Op, DType], tuple[DType | None, ...]] = {
    **{(op, dtype): (None,) for op in (Op.GEMM, *PRUNED_ACTIVATIONS, Op.SPGEMM, Op.SPARSIFY24) for dtype in WIDE_TYPES},
    (Op.GEMM, DType.E4M3): WIDE_TYPES,
    (Op.GEMM_RELU2_24, DType.E4M3): (DType.BF16, DType.E4M3),
    (Op.SPGEMM, DType.E4M3): WIDE_TYPES,
    **{(Op.QUANTIZE_ROWS, dtype): (DType.E4M3,) for dtype in WIDE_TYPES},
    (Op.SQUARE_ROWS, DType.BF16): (DType.E4M3,),
    **{(Op.GEMM_DRELU2_24, dtype): (None,) for dtype in WIDE_TYPES},
    **{(Op.SPGEMM_TOKENS, dtype): (None, DType.FP32) for dtype in WIDE_TYPES},
    (Op.TRANSPOSE, DType.BF16): (None,),  # they move 16 bits, whatever these mean
    (Op.DENSE_COLUMNS, DType.BF16): (None,),
}
"""Types of the result for a type of A; None is that type."""


def _supports_types(family: Family) -> Verdict:
    op, dtype = family.op, family.dtype
    results = _RESULTS.get((op, dtype))
    if results is None:
        return Verdict(False, f"{op.value} does not take {dtype.value}")
    if family.out not in results:
        given = family.out.value if family.out else "of its own type"
        wanted = " or ".join(r.value if r else "of its own type" for r in results)
        return Verdict(False, f"the result of {op.value} on {dtype.value} is {wanted}, not {given}")
    if not family.scaled and (family.weight or family.promote):
        return Verdict(False, f"{op.value} on {dtype.value} has no other type of weight and no promoted sums")
    if family.weight not in (None, DType.E5M2):
        return Verdict(False, f"a weight beside {dtype.value} is {dtype.value} or e5m2, not {family.weight}")
    if family.scaled and not EPILOGUES[family.activation].scales:
        return Verdict(False, f"the 8-bit kernels have no {family.activation.value}")
    if family.scaled and family.count_nonzeros:
        return Verdict(False, f"the 8-bit {op.value} does not count non-zeros")
    if not op.multiplies and op is not Op.SPARSIFY24 and family.activation is not Activation.NONE:
        return Verdict(False, f"{op.value} has no activation")
    return Verdict(True)
