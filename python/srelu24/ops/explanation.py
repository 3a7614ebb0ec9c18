"""explain(): which kernels a call would run, with which configuration, from which record and why; or why none runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from srelu24.db.choice import SPARSE, Choice
from srelu24.fp8 import kernels
from srelu24.fp8 import ops as fp8_ops
from srelu24.fp8 import plain as fp8_plain
from srelu24.fp8.quantize import QuantizedWeight
from srelu24.fp8.recipes import ScaleRecipe
from srelu24.numerics.dtypes import DTYPES
from srelu24.runtime.dense import WAYS
from srelu24.runtime.dispatch import BATCH, choose, choose_ffn, gpu_of, missing
from srelu24.runtime.operands import autocast, check_ffn, check_mode, check_tensor, differentiated, kernel_reason
from srelu24.training import step
from srelu24.training.recipe import LayerState, Recipe
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, KernelSpec, Problem
from srelu24_gen.target import GpuTarget


@dataclass(frozen=True, slots=True)
class ExplainedKernel:
    """One of the kernels that a call runs."""

    problem: Problem
    spec: KernelSpec
    choice: Choice


@dataclass(frozen=True, slots=True)
class Explanation:
    """What :func:`srelu24.ffn` does with some operands; ``print`` it.

    Attributes:
        runs: "kernels" (sparse), "reference" (CPU) or "dense".
        why: one sentence; for "dense" the reason of the fallback, or why dense is faster and in which way it runs.
        kernels: those of ours that run: GEMM1 and GEMM2, or of a dense FFN what is not cuBLAS.
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


def explain(
    x: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    mode: str = "auto",
    deterministic: str = "run",
    recipe: ScaleRecipe | str | None = None,
    activation: str = Activation.RELU2,
) -> Explanation:
    """Say what :func:`srelu24.ffn` would run with the same arguments, without running it.

    Raises:
        Unsupported: the operands do not fit together, or the recipe is one of training.
    """
    check_tensor("x", x)
    mode = check_mode(mode, deterministic)
    if isinstance(recipe, LayerState | Recipe):
        raise Unsupported("explain knows inference only; what a training recipe does, recipe.watch() measures.")
    if recipe is not None or isinstance(w1, QuantizedWeight) or isinstance(w2, QuantizedWeight):
        if mode != "auto":
            raise Unsupported("a recipe decides what runs; leave mode and deterministic out.")
        if recipe is not None and isinstance(w1, Tensor) and isinstance(w2, Tensor):
            reason = fp8_plain.dense_reason(x, w1, w2, b1, b2)
            if reason is not None:
                return Explanation("dense", reason)
            x, b1, b2 = autocast(x, b1, b2)  # type: ignore[assignment]
            w1, w2 = fp8_plain.quantized(w1), fp8_plain.quantized(w2)
        q1, q2, known = fp8_ops.check(x, w1, w2, b1, b2, recipe)
        reason = fp8_ops.dense_reason(x, q1, q2, b1, b2)
        if reason is not None:
            return Explanation("dense", reason)
        if not x.is_cuda:
            return Explanation("reference", f"8-bit, recipe {known.name}; x is on {x.device}")
        target, rows = gpu_of(x.device), x.reshape(-1, x.shape[-1])
        parts = kernels.problems(known.name, rows, q1.values, q2.values, b1, b2)
        why = f"{target.name}, {target.arch}, {target.kernels}; 8-bit, recipe {known.name}"
        return _unless_missing(Explanation("kernels", why, tuple(_explain_kernel(p, target) for p in parts)), mode)
    x, w1, w2, b1, b2 = autocast(x, w1, w2, b1, b2)  # type: ignore[assignment]
    check_ffn(x, w1, w2, b1, b2)
    rows = x.reshape(-1, x.shape[-1])
    reason = kernel_reason(rows, w1, w2, b1, b2)
    if reason is None and differentiated(x, w1, w2, b1, b2):
        reason = "an operand requires gradients; under torch.no_grad() the kernels run"
    if reason is not None:
        return Explanation("nothing" if mode == BATCH else "dense", reason)
    if not x.is_cuda:
        if mode == "dense":
            return Explanation("dense", "dense was asked for")
        return Explanation("reference", f"x is on {x.device}; the kernels need a CUDA device")
    shape = Shape(rows.shape[0], x.shape[-1], w1.shape[0])
    kind = (DTYPES[x.dtype], b1 is not None, b2 is not None)
    return _unless_missing(explain_kernels(shape, *kind, gpu_of(x.device), mode, Activation(activation)), mode)


def explain_kernels(
    shape: Shape,
    dtype: DType,
    b1: bool,
    b2: bool,
    target: GpuTarget,
    mode: str = "auto",
    activation: Activation = Activation.RELU2,
) -> Explanation:
    """What runs for operands of these sizes on a GPU, which this machine need not have.

    Raises:
        Unsupported: no kernel computes the sparse FFN.
    """
    choice = choose_ffn(shape, dtype, b1, b2, target, activation)
    where = f"{target.name}, {target.arch}, {target.kernels}"
    way = {"auto": choice.way, SPARSE: SPARSE, BATCH: SPARSE, "dense": choice.dense_way}[mode]
    why = choice.why if mode == "auto" else f"{mode} was asked for"
    if way == SPARSE:
        pair = tuple(_explain_kernel(p, target, mode == BATCH) for p in shape.gemms(dtype, b1, b2, activation))
        return Explanation("kernels", f"{where}; {why}", pair)
    own = shape.dense_gemms(dtype, b1, b2, activation)[: {"cublas": 0, "mixed": 1, "gemm": 2}[way]]
    return Explanation("dense", f"{where}; {why}; {WAYS[way]}", tuple(_explain_kernel(p, target) for p in own))


def explain_step(x: Tensor, w1: Tensor, b1: Tensor | None, b2: Tensor | None, layer: LayerState) -> Explanation:
    """What the training steps of a layer launch for x [M, D]: the kernels of the dense and of the sparse phase.

    Raises:
        Unsupported: no kernel takes these sizes.
    """
    (m, d), f, recipe = x.shape, w1.shape[0], layer.recipe
    biases = b1 is not None, b2 is not None
    reason = step.reason_against(x, f, recipe.token_stride, recipe.kernels, *biases)
    if reason is not None:
        return Explanation("reference", f"by a training recipe; {reason}")
    target, phase = gpu_of(x.device), "sparse" if recipe.sparse else "dense, in its warm-up"
    why = f"{target.name}, {target.arch}, {target.kernels}; by a training recipe, now {phase}"
    problems = step.problems_of(Shape(m, d, f), DTYPES[x.dtype], *biases)
    return Explanation("kernels", why, tuple(_explain_kernel(p, target) for p in problems))


def _unless_missing(explanation: Explanation, mode: str) -> Explanation:
    """The explanation, or what runs instead where this machine can neither find nor compile one of its kernels."""
    reason = next(filter(None, (missing(k.spec) for k in explanation.kernels)), None)
    return explanation if reason is None else Explanation("nothing" if mode == BATCH else "dense", reason)


def _explain_kernel(problem: Problem, target: GpuTarget, batch: bool = False) -> ExplainedKernel:
    choice = choose(problem, target, batch)
    return ExplainedKernel(problem, KernelSpec(problem.family, choice.config, target.arch), choice)
