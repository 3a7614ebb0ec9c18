"""Which kernels a call would run, with which configuration, from which record, and why; or why none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from srelu24.dispatch import Choice, choose, gpu_of
from srelu24.launch import DTYPES
from srelu24.operands import autocast, check_ffn, differentiated, kernel_reason
from srelu24_gen.spec import Activation, Family, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget


@dataclass(frozen=True, slots=True)
class ExplainedKernel:
    """One kernel of the answer."""

    problem: Problem
    spec: KernelSpec
    choice: Choice


@dataclass(frozen=True, slots=True)
class Explanation:
    """What :func:`srelu24.ffn` does with some operands; ``print`` it.

    Attributes:
        runs: "kernels", "reference" (CPU) or "dense".
        why: one sentence; for "dense" the reason of the fallback.
        kernels: GEMM1 and GEMM2 where kernels run, else empty.
    """

    runs: str
    why: str
    kernels: tuple[ExplainedKernel, ...] = ()

    def __str__(self) -> str:
        lines = [f"runs: {self.runs} ({self.why})"]
        for k in self.kernels:
            record = k.choice.record
            lines += [
                f"  {k.problem}",
                f"    kernel  {k.spec.name}, raster group {k.spec.config.raster_group}",
                f"    config  from {k.choice.source}: {k.choice.why}",
            ]
            if record is not None:
                lines.append(f"    record  {record.evidence.ms:.4g} ms measured {record.evidence.when}")
        return "\n".join(lines)


def explain(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None = None, b2: Tensor | None = None) -> Explanation:
    """Say what ``srelu24.ffn(x, w1, w2, b1, b2)`` would run, without running it.

    Raises:
        Unsupported: the operands do not fit together.
    """
    x, w1, w2, b1, b2 = autocast(x, w1, w2, b1, b2)  # type: ignore[assignment]
    check_ffn(x, w1, w2, b1, b2)
    rows = x.reshape(-1, x.shape[-1])
    reason = kernel_reason(rows, w1, w2, b1, b2)
    if reason is not None:
        return Explanation("dense", reason)
    if differentiated(x, w1, w2, b1, b2):
        return Explanation("dense", "an operand requires gradients; under torch.no_grad() the kernels run")
    if not x.is_cuda:
        return Explanation("reference", f"x is on {x.device}; the kernels need a CUDA device")
    target = gpu_of(x.device)
    m, d, f = rows.shape[0], x.shape[-1], w1.shape[0]
    dtype = DTYPES[x.dtype]
    gemm1 = Problem(Family(Op.GEMM_RELU2_24, dtype, Activation.RELU2, bias=b1 is not None), m, f, d)
    gemm2 = Problem(Family(Op.SPGEMM, dtype, bias=b2 is not None), m, d, f)
    return Explanation("kernels", f"{target.name}, {target.arch}", tuple(_explained(p, target) for p in (gemm1, gemm2)))


def _explained(problem: Problem, target: GpuTarget) -> ExplainedKernel:
    choice = choose(problem, target)
    return ExplainedKernel(problem, KernelSpec(problem.family, choice.config, target.arch), choice)
