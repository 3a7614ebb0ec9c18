"""The 8-bit forward of plain weights, as modules hold them: quantised at the first call, and again once they changed.

The 8-bit form of a weight is kept here, as long as the weight lives, so that state dicts, copies and pickles hold the
plain weights alone. The op ``ffn_fp8_plain`` takes the plain weights and compares them, whenever it runs, with those
that were quantised, so compiled code sees changes too. A replayed CUDA graph does not compare: capture it again after a
change.

A change is seen by the weight's storage and by PyTorch's version counter, which counts every in-place operation but
writes through ``.data``; follow those by ``torch.autograd.graph.increment_version(w)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from srelu24.fp8 import ops, recipes
from srelu24.fp8.operands import FfnOperands, PlainOperands
from srelu24.fp8.quantize import QuantizedWeight, quantize_weight
from srelu24.fp8.recipes import ScaleRecipe, Static
from srelu24.numerics.activations import squared_relu
from srelu24.runtime.fallback import warn_dense
from srelu24.runtime.kept_memory import allocate_kept
from srelu24.runtime.operands import autocast, check_matrix, check_vector
from srelu24_gen.errors import Unsupported

_library = torch.library.Library("srelu24", "FRAGMENT")
_library.define(
    "ffn_fp8_plain(Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, str recipe, Tensor? scales, "
    "Tensor(a!) saturated) -> Tensor"
)


def ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, recipe: ScaleRecipe | str) -> Tensor:
    """:func:`srelu24.ffn` by an 8-bit recipe on plain weights: x [..., D] -> [..., D] in the type of x, or autocast's.

    Raises:
        Unsupported: operands or recipe do not fit together, or a weight that is not finite.
    """
    known = recipes.resolve(recipe)
    reason = dense_reason(x, w1, w2, b1, b2)
    if reason is not None:
        warn_dense(reason)
        return torch.nn.functional.linear(squared_relu(torch.nn.functional.linear(x, w1, b1)), w2, b2)
    x, b1, b2 = autocast(x, b1, b2)  # type: ignore[assignment]
    if isinstance(known, Static) and recipes.calibrating():
        return ops.ffn(x, quantized(w1), quantized(w2), b1, b2, known)
    given = PlainOperands(
        x=x.reshape(-1, x.shape[-1]),
        w1=w1,
        w2=w2,
        b1=b1,
        b2=b2,
        recipe=known.name,
        scales=known.scales_on(x.device) if isinstance(known, Static) else None,
        saturated=known.counter(x.device),
    )
    y: Tensor = torch.ops.srelu24.ffn_fp8_plain(*given)
    return y.view(*x.shape[:-1], w2.shape[0])


def dense_reason(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> str | None:
    """Why a call runs dense and in the type of x, or None.

    Raises:
        Unsupported: the operands do not fit together.
    """
    x, b1, b2 = autocast(x, b1, b2)  # type: ignore[assignment]
    if x.dim() < 1 or not x.dtype.is_floating_point:
        raise Unsupported(f"x is {x.dtype} {list(x.shape)}; floating-point [..., D] is needed.")
    d, f = x.shape[-1], w1.shape[0] if w1.dim() else 0
    for name, weight, shape in (("w1", w1, (None, d)), ("w2", w2, (d, f))):
        check_matrix(name, weight, shape, weight)  # any type: autocast leaves weights as they are
        if weight.device != x.device:
            raise Unsupported(f"{name} is on {weight.device} and x on {x.device}; move both to one device.")
    check_vector("b1", b1, f, x)
    check_vector("b2", b2, d, x)
    return ops.dense_reason(x, w1, w2, b1, b2)


class _Kept(NamedTuple):
    """A weight in 8 bits, and what it was made from."""

    storage: StorageWeakRef
    version: int
    weight: QuantizedWeight


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def quantized(w: Tensor) -> QuantizedWeight:
    """``w`` [N, K] by :func:`srelu24.quantize_weight` in e4m3: its kept form, or a new one where it has changed.

    A weight that was made under ``torch.inference_mode`` has no version and is quantised in every call.

    Raises:
        Unsupported: as :func:`srelu24.quantize_weight`; or a CUDA graph is captured and the weight has changed.
    """
    kept: _Kept | None = _kept.get(w)
    if kept is not None and kept.storage.cdata == w.untyped_storage()._cdata and kept.version == w._version:
        return kept.weight
    if w.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            raise Unsupported("a weight has to be quantised, and a CUDA graph is captured; run the layer once before.")
        torch.cuda.current_stream(w.device).synchronize()  # the weight may still be written
    # Noted before the weight is read, so that the next call sees a change that comes in between.
    storage, version = StorageWeakRef(w.untyped_storage()), None if w.is_inference() else w._version
    weight = QuantizedWeight(*allocate_kept(lambda: _quantize_and_wait(w), w.device))
    if version is not None:
        _kept[w] = _Kept(storage, version, weight)
    return weight


def _quantize_and_wait(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    made = quantize_weight(w)
    if w.is_cuda:
        torch.cuda.current_stream(w.device).synchronize()  # threads on other streams will read it
    return made.values, made.scale, made.row_norm


def _ffn(*given: Any) -> Tensor:
    o = PlainOperands(*given)
    q1, q2 = quantized(o.w1), quantized(o.w2)
    operands = FfnOperands(
        x=o.x,
        w1=q1.values,
        w1_scale=q1.scale,
        w2=q2.values,
        w2_scale=q2.scale,
        b1=o.b1,
        b2=o.b2,
        recipe=o.recipe,
        basis=q1.row_norm if o.scales is None else o.scales,
        saturated=o.saturated,
    )
    return torch.ops.srelu24.ffn_fp8(*operands)  # type: ignore[no-any-return]


def _ffn_fake(*given: Any) -> Tensor:
    o = PlainOperands(*given)
    return o.x.new_empty((o.x.shape[0], o.w2.shape[0]))


_library.impl("ffn_fp8_plain", _ffn, "CUDA")
_library.impl("ffn_fp8_plain", _ffn, "CPU")
torch.library.register_fake("srelu24::ffn_fp8_plain", _ffn_fake)
