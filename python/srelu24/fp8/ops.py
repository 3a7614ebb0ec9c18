"""``srelu24.ffn(..., recipe=...)``: the 8-bit forward as a torch.library op. CUDA tensors run the kernels, CPU
tensors the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srelu24.fp8 import kernels, recipes, reference
from srelu24.fp8.operands import FfnOperands
from srelu24.fp8.quantize import QuantizedRows, QuantizedWeight, inverse_scale, quantize_rows, scale
from srelu24.fp8.recipes import Rowwise, ScaleRecipe, Static
from srelu24.numerics.activations import squared_relu
from srelu24.numerics.dtypes import DTYPES, STORAGE_DTYPES, WIDE_NAMES, FragmentOrder
from srelu24.runtime.dispatch import gpu_of
from srelu24.runtime.fallback import reason_of, warn_dense
from srelu24.runtime.operands import ALIGNMENT, DISABLED, check_vector, differentiated, kernel_reason
from srelu24_gen import space
from srelu24_gen.errors import ToolchainError, Unsupported
from srelu24_gen.spec import DType, Family, Op

_library = torch.library.Library("srelu24", "FRAGMENT")
_library.define(
    "ffn_fp8(Tensor x, Tensor w1, Tensor w1_scale, Tensor w2, Tensor w2_scale, Tensor? b1, Tensor? b2, str recipe, "
    "Tensor basis, Tensor(a!) saturated) -> Tensor"
)


def ffn(
    x: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    b1: Tensor | None,
    b2: Tensor | None,
    recipe: ScaleRecipe | str | None,
) -> Tensor:
    """:func:`srelu24.ffn` with quantised weights: x [..., D] -> [..., D] in the type of x.

    Raises:
        Unsupported: operands or recipe do not fit together.
    """
    q1, q2, recipe = check(x, w1, w2, b1, b2, recipe)
    rows = x.reshape(-1, x.shape[-1])
    reason = dense_reason(x, q1, q2, b1, b2)
    if reason is not None:
        warn_dense(reason)
        return _run_dense(x, q1, q2, b1, b2)
    if isinstance(recipe, Static) and recipes.calibrating():
        recipes.observe(recipe, _find_row_amax(rows, q1, b1))
        recipe = recipes.resolve(Rowwise.name)
    given = FfnOperands(
        x=rows,
        w1=q1.values,
        w1_scale=q1.scale,
        w2=q2.values,
        w2_scale=q2.scale,
        b1=b1,
        b2=b2,
        recipe=recipe.name,
        basis=recipe.scales_on(x.device) if isinstance(recipe, Static) else q1.row_norm,
        saturated=recipe.counter(x.device),
    )
    y: Tensor = torch.ops.srelu24.ffn_fp8(*given)
    return y.view(*x.shape[:-1], q2.shape[0])


def check(
    x: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    b1: Tensor | None,
    b2: Tensor | None,
    recipe: ScaleRecipe | str | None,
) -> tuple[QuantizedWeight, QuantizedWeight, ScaleRecipe]:
    """The weights and the recipe, once they are known to fit x.

    Raises:
        Unsupported: they do not fit together.
    """
    if recipe is None:
        raise Unsupported("the weights are quantised and there is no recipe; give recipe='rowwise', for example")
    known = recipes.resolve(recipe)
    if not isinstance(w1, QuantizedWeight) or not isinstance(w2, QuantizedWeight):
        raise Unsupported(
            f"recipe {known.name!r} needs quantised weights; give both from srelu24.quantize_weight, or both plain"
        )
    if x.dim() < 1 or not x.dtype.is_floating_point:
        raise Unsupported(f"x is {x.dtype} {list(x.shape)}; floating-point [..., D] is needed.")
    d, f = x.shape[-1], w1.shape[0]
    for name, weight, shape in (("w1", w1, (f, d)), ("w2", w2, (d, f))):
        if tuple(weight.shape) != shape:
            raise Unsupported(f"{name} has shape {list(weight.shape)}; {list(shape)} is needed.")
        if weight.device != x.device:
            raise Unsupported(f"{name} is on {weight.device} and x on {x.device}; move both to one device.")
    check_vector("b1", b1, f, x)
    check_vector("b2", b2, d, x)
    return w1, w2, known


def dense_reason(
    x: Tensor, w1: Tensor | QuantizedWeight, w2: Tensor | QuantizedWeight, b1: Tensor | None, b2: Tensor | None
) -> str | None:
    """Why a call whose operands fit together runs dense and in the type of x, or None. The weights may be plain ones,
    not quantised yet."""
    if DISABLED:
        return "SRELU24_DISABLE is set"
    if x.dtype not in STORAGE_DTYPES:
        return f"the type of x is {x.dtype}, and the 8-bit forward takes {WIDE_NAMES}"
    for name, width in (("D", x.shape[-1]), ("F", w1.shape[0])):
        if width == 0 or width % FragmentOrder.BITS8.granule:
            return f"{name} = {width} is not a positive multiple of {FragmentOrder.BITS8.granule}"
    if differentiated(x, b1, b2, *(w for w in (w1, w2) if isinstance(w, Tensor))):
        return "gradients are recorded, and the 8-bit forward has no backward; wrap inference in torch.no_grad()"
    if torch.compiler.is_compiling():  # there are no addresses yet; the op looks at them
        return None
    quantized = [w for w in (w1, w2) if isinstance(w, QuantizedWeight)]
    if x.is_cuda and any(t.data_ptr() % ALIGNMENT for w in quantized for t in (w.values, w.scale)):
        return f"a quantised weight does not start at a multiple of {ALIGNMENT} bytes"
    reason = kernel_reason(x.reshape(-1, x.shape[-1]), b1, b2)
    if reason is None and x.is_cuda:
        verdict = space.has_kernel(Family(Op.QUANTIZE_ROWS, DTYPES[x.dtype], out=DType.E4M3), gpu_of(x.device))
        return None if verdict.ok else verdict.reason
    return reason


def _run_dense(x: Tensor, w1: QuantizedRows, w2: QuantizedRows, b1: Tensor | None, b2: Tensor | None) -> Tensor:
    """The FFN without pruning, its weights widened to the type of x."""
    h = squared_relu(torch.nn.functional.linear(x, w1.dequantize(x.dtype), b1))
    return torch.nn.functional.linear(h, w2.dequantize(x.dtype), b2)


def _find_row_amax(x: Tensor, w1: QuantizedWeight, b1: Tensor | None) -> Tensor:
    if x.is_cuda:
        return kernels.row_amax(x, w1.values, w1.scale, b1)
    return reference.row_amax(reference.gemm_relu2_24(quantize_rows(x), w1, b1).values)


def _ffn_cpu(*given: Any) -> Tensor:
    o = FfnOperands(*given)
    r = reference.gemm_relu2_24(quantize_rows(o.x), o.rows1, o.b1)
    if o.recipe == Static.name:
        s_scale, inverse = o.basis
    else:
        rowwise = o.recipe == Rowwise.name
        amax = reference.row_amax(r.values) if rowwise else reference.predicted_amax(o.x, o.basis, o.b1)
        s_scale, inverse = scale(amax), inverse_scale(amax)
    s, count = reference.square_to_e4m3(r, inverse)
    o.saturated.add_(count)
    return reference.spgemm(s, s_scale, o.rows2, o.b2, dtype=o.x.dtype)


def _ffn_fake(*given: Any) -> Tensor:
    o = FfnOperands(*given)
    return o.x.new_empty((o.x.shape[0], o.w2.shape[0]))


def _ffn_cuda(*given: Any) -> Tensor:
    o = FfnOperands(*given)
    if kernel_reason(o.x) is not None:  # a traced call may bring rows as the kernels cannot read them
        o = o._replace(x=o.x.clone(memory_format=torch.contiguous_format))
    try:
        return kernels.forward(o)
    except ToolchainError as error:
        warn_dense(reason_of(error))
        return _run_dense(o.x, o.rows1, o.rows2, o.b1, o.b2)


_library.impl("ffn_fp8", _ffn_cuda, "CUDA")
_library.impl("ffn_fp8", _ffn_cpu, "CPU")
torch.library.register_fake("srelu24::ffn_fp8", _ffn_fake)
