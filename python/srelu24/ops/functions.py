"""The public operations: they check what they are given and call the ops of :mod:`srelu24.ops.library`.

CUDA tensors run the kernels, CPU tensors the reference (:mod:`srelu24.numerics.reference`). What the kernels cannot do
runs as dense PyTorch with one warning per reason; :func:`srelu24.explain` says which and why. Wrong input
(ranks, sizes or types that do not fit together) raises :class:`srelu24_gen.errors.Unsupported`, a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srelu24.fp8 import ops as fp8_ops
from srelu24.fp8 import plain as fp8_plain
from srelu24.fp8.quantize import QuantizedWeight
from srelu24.fp8.recipes import ScaleRecipe
from srelu24.numerics.activations import rule_of
from srelu24.numerics.dtypes import FragmentOrder
from srelu24.numerics.sparse24 import Sparse24
from srelu24.ops.library import dense_linear, fallback_ffn
from srelu24.runtime.fallback import FallbackWarning as FallbackWarning
from srelu24.runtime.fallback import warn_dense
from srelu24.runtime.operands import (
    autocast,
    autocasting,
    check_ffn,
    check_matrix,
    check_mode,
    check_tensor,
    check_vector,
    differentiated,
    is_dtensor,
    transformed,
)
from srelu24.training import ops as training_ops
from srelu24.training.recipe import LayerState, Recipe
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, pruning_op

NO_BACKWARD = "gradients are recorded, and only ffn with a recipe trains sparsely; wrap inference in torch.no_grad()"


# ---------------------------------------------------------------------------------------------- public functions


def ffn(
    x: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    mode: str = "auto",
    deterministic: str = "run",
    recipe: ScaleRecipe | str | LayerState | None = None,
    activation: str = Activation.RELU2,
) -> Tensor:
    """Squared-ReLU feed-forward network with the hidden activations pruned to 2:4 on the fly.

    ``prune24(relu(x w1^T + b1)^2) w2^T + b2``, arXiv 2503.16672 section 3, numerics in docs/numerics.md.
    On a GPU, "auto" runs it dense and unpruned where the sparse kernels do not win (few tokens), by the times in the
    tuning database or else a cautious model; :func:`srelu24.explain` says which. Without a supported GPU, dtype or
    size, without the kernel where nothing can compile it, and while gradients are recorded, it runs dense with one
    warning.

    Args:
        x: [..., D], bf16 or fp16. Row stride a multiple of 16 bytes, last dimension contiguous.
        w1: [F, D]. w2: [D, F]. D and F multiples of 8.
        b1: [F]. b2: [D].
        mode: "auto", "sparse" (always prune) or "dense" (never). On a CPU "auto" prunes.
        deterministic: "run": the same inputs give the same bits in every run. "batch": a token's bits do not depend on
            the other tokens or their number either; the sparse kernels run, some per cent slower where stream-K is
            given up, and nothing falls back to dense.
        recipe: compute in 8-bit floats: "rowwise", "predicted" or a :class:`srelu24.Static` (docs/fp8.md). w1 and w2
            then come from :func:`srelu24.quantize_weight`; plain ones are quantised at the first call, kept, and
            quantised again once they have changed. D and F are multiples of 16. Or train sparsely: the layer's state,
            of :meth:`srelu24.Recipe.layer` (docs/training.md); any float type. A recipe decides alone what is dense
            and when: mode and deterministic are left out.
        activation: "relu2", or "relu" for models that were trained with plain ReLU; a recipe knows squared ReLU alone.

    Returns:
        [..., D] in the type of ``x``.

    Raises:
        Unsupported: ranks, sizes, types or devices do not fit together; or deterministic is "batch" where only
            dense PyTorch computes the result.
        CompileError, LaunchError: a kernel could not be built or launched.
    """
    check_tensor("x", x)
    mode = check_mode(mode, deterministic)
    if activation != Activation.RELU2:
        _check_activation(activation, recipe, w1, w2)
    if recipe is not None or isinstance(w1, QuantizedWeight) or isinstance(w2, QuantizedWeight):
        return _ffn_by_recipe(x, w1, w2, b1, b2, mode, recipe)
    if autocasting(x):
        x, w1, w2, b1, b2 = autocast(x, w1, w2, b1, b2)  # type: ignore[assignment]
    check_ffn(x, w1, w2, b1, b2)
    if differentiated(x, w1, w2, b1, b2):
        return fallback_ffn(NO_BACKWARD, mode, x, w1, w2, b1, b2, activation)
    if x.dim() == 2:
        return torch.ops.srelu24.ffn(x, w1, w2, b1, b2, mode, activation)  # type: ignore[no-any-return]
    y: Tensor = torch.ops.srelu24.ffn(x.reshape(-1, x.shape[-1]), w1, w2, b1, b2, mode, activation)
    return y.view(*x.shape[:-1], w2.shape[0])


def _check_activation(activation: str, recipe: object, *weights: Tensor | QuantizedWeight) -> None:
    """Refuse, before anything runs, an activation that no kernel prunes, and one that a recipe does not know."""
    rule_of(activation)
    pruning_op(Activation(activation))
    if recipe is not None or any(isinstance(w, QuantizedWeight) for w in weights):
        raise Unsupported(f"a recipe computes squared ReLU, not {activation}; leave the recipe out.")


def _ffn_by_recipe(
    x: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    b1: Tensor | None,
    b2: Tensor | None,
    mode: str,
    recipe: ScaleRecipe | str | LayerState | None,
) -> Tensor:
    if isinstance(recipe, Recipe):
        raise Unsupported(
            "recipe is a whole srelu24.Recipe; give the state of this layer, from recipe.layer(name, w1)."
        )
    if mode != "auto":
        raise Unsupported("a recipe decides what runs; leave mode and deterministic out.")
    if any(is_dtensor(t) for t in (x, w1, w2)):
        raise Unsupported("a recipe does not run on DTensors, as of tensor parallelism; leave the recipe out.")
    if transformed():
        raise Unsupported("a recipe does not run under torch.func; use torch.autograd, or leave the recipe out.")
    if isinstance(w1, Tensor) and isinstance(w2, Tensor) and recipe is not None:
        if isinstance(recipe, LayerState):
            return training_ops.ffn(x, w1, w2, b1, b2, recipe)
        return fp8_plain.ffn(x, w1, w2, b1, b2, recipe)
    if isinstance(recipe, LayerState):
        raise Unsupported("a training recipe needs plain weights, and one of these is quantised.")
    return fp8_ops.ffn(x, w1, w2, b1, b2, recipe)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Dense ``act(x w^T + bias)``, activation "none", "relu2" or "relu": x [..., K], w [N, K], bias [N] -> [..., N].

    Raises:
        Unsupported: ranks, sizes, types or devices do not fit together.
    """
    rule_of(activation)
    check_tensor("x", x)
    if x.dim() < 1:
        raise Unsupported("x has no dimensions; it must be [..., K].")
    if autocasting(x):
        x, w, bias = autocast(x, w, bias)  # type: ignore[assignment]
    check_matrix("w", w, (None, x.shape[-1]), x)
    check_vector("bias", bias, w.shape[0], x)
    if differentiated(x, w, bias):
        warn_dense(NO_BACKWARD)
        return dense_linear(x, w, bias, activation)
    y: Tensor = torch.ops.srelu24.linear(x.reshape(-1, x.shape[-1]), w, bias, activation)
    return y.view(*x.shape[:-1], w.shape[0])


def gemm_24(x: Tensor, w1: Tensor, b1: Tensor | None = None, activation: str = Activation.RELU2) -> Sparse24:
    """First GEMM of the layer, fused: ``prune24(act(x w1^T + b1))``, x [M, D], w1 [F, D], b1 [F] -> packed [M, F].

    Args:
        activation: "relu2" or "relu".

    Raises:
        Unsupported: the operands do not fit together, no kernel takes them or prunes after that activation, or
            gradients are recorded.
    """
    rule_of(activation)
    op = pruning_op(Activation(activation))
    _check_gemm1(x, w1, b1)
    values, metadata = getattr(torch.ops.srelu24, op.value)(x, w1, b1)
    return Sparse24(values, metadata, (x.shape[0], w1.shape[0]))


def gemm_relu2_24(x: Tensor, w1: Tensor, b1: Tensor | None = None) -> Sparse24:
    """:func:`gemm_24` with squared ReLU: ``prune24(relu(x w1^T + b1)^2)``, x [M, D], w1 [F, D], b1 [F] -> packed [M,
    F].

    Raises:
        Unsupported: the operands do not fit together, no kernel takes them, or gradients are recorded.
    """
    return gemm_24(x, w1, b1)


def gemm_relu2_24_count(x: Tensor, w1: Tensor, b1: Tensor | None = None) -> tuple[Sparse24, Tensor]:
    """:func:`gemm_relu2_24`, and for every feature the rows where it is not zero before pruning: int32 [F].

    Raises:
        Unsupported: as :func:`gemm_relu2_24`.
    """
    _check_gemm1(x, w1, b1)
    values, metadata, counts = torch.ops.srelu24.gemm_relu2_24_count(x, w1, b1)
    return Sparse24(values, metadata, (x.shape[0], w1.shape[0])), counts


def sparsify24(h: Tensor, activation: str = "relu2") -> Sparse24:
    """Dense [M, F] to packed 2:4 along F.

    "relu2" keeps the two largest of each 4 of relu(h), squared; "relu" those as they are; "none" the two of largest
    magnitude.

    Raises:
        Unsupported: not a 2-D bf16 or fp16 tensor that the kernel can read; the message says why.
    """
    rule_of(activation)
    check_matrix("h", h, (None, None), h)
    _refuse_gradients(h)
    values, metadata = torch.ops.srelu24.sparsify24(h, activation)
    return Sparse24(values, metadata, (h.shape[0], h.shape[1]))


def matmul(s: Sparse24, w2: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``S w2^T + bias + residual`` on the sparse tensor cores: S [M, F] packed, w2 [D, F] -> [M, D].

    Raises:
        Unsupported: ranks, sizes, types or devices do not fit together.
    """
    if not isinstance(s, Sparse24):
        raise Unsupported(f"s is a {type(s).__name__}; a Sparse24 is needed: pack it with srelu24.sparsify24.")
    if s.order is not FragmentOrder.BITS16:
        raise Unsupported(f"{s} is for the 8-bit kernels; matmul needs bf16 or fp16 values with 16-bit metadata.")
    check_matrix("w2", w2, (None, s.shape[1]), s.values)
    check_vector("bias", bias, w2.shape[0], s.values)
    if residual is not None:
        check_matrix("residual", residual, (s.shape[0], w2.shape[0]), s.values)
    _refuse_gradients(w2, bias, residual)
    return torch.ops.srelu24.matmul(s.values, s.metadata, w2, bias, residual)  # type: ignore[no-any-return]


def _check_gemm1(x: Tensor, w1: Tensor, b1: Tensor | None) -> None:
    check_matrix("x", x, (None, None), x)
    check_matrix("w1", w1, (None, x.shape[1]), x)
    check_vector("b1", b1, w1.shape[0], x)
    _refuse_gradients(x, w1, b1)


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if differentiated(*tensors):
        raise Unsupported(f"A packed operand has no dense form to fall back to: {NO_BACKWARD}.")


def linear24(a: Tensor, w: Tensor, bias: Tensor | None = None, *, mode: str = "auto") -> Tensor:
    """``prune24(a) w^T + bias``: of every 4 neighbours along F the 2 of largest magnitude enter the product.

    On a GPU, "auto" is dense and unpruned where :func:`srelu24.ffn` of these sizes would be (few tokens). Where no
    kernel takes the operands, and while gradients are recorded, it is dense with one warning.

    Args:
        a: [..., F], bf16 or fp16; squared-ReLU activations, so that pruning drops little.
        w: [D, F]. bias: [D].
        mode: "auto", "sparse" (always prune) or "dense" (never). On a CPU "auto" prunes.

    Returns:
        [..., D] in the type of ``a``.

    Raises:
        Unsupported: ranks, sizes, types or devices do not fit together.
    """
    mode = check_mode(mode, "run")
    check_tensor("a", a)
    if a.dim() < 1:
        raise Unsupported("a has no dimensions; it must be [..., F].")
    if autocasting(a):
        a, w, bias = autocast(a, w, bias)  # type: ignore[assignment]
    check_matrix("w", w, (None, a.shape[-1]), a)
    check_vector("bias", bias, w.shape[0], a)
    if differentiated(a, w, bias):
        warn_dense(NO_BACKWARD)
        return dense_linear(a, w, bias, Activation.NONE)
    y: Tensor = torch.ops.srelu24.linear24(a.reshape(-1, a.shape[-1]), w, bias, mode)
    return y.view(*a.shape[:-1], w.shape[0])
