"""The differentiable FFN as torch.library ops, with their autograd formulas and fake kernels.

    ffn_train            forward: y, what the backward needs, non-zeros per feature
    ffn_train_backward   all gradients that are needed
    ffn_train_into       the same, weight gradients added to buffers
    ffn_recipe           forward where no gradient is recorded
    hidden_kept          what pruning keeps, for the metrics

A step runs on the kernels where they take it (:mod:`srelu24.training.step`); everything else, and the backward pass of
a dense step, is the reference in plain PyTorch. ``sparse`` is a bool [] on the host, read when an op runs, so that the
end of the warm-up changes no code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srelu24.runtime.fallback import warn_reference
from srelu24.runtime.operands import autocast, check_ffn, differentiated, has_tangent
from srelu24.training import reference, step
from srelu24.training.recipe import LayerState
from srelu24.training.reference import Forward, Gradients, Needed, Pruning
from srelu24_gen.errors import Unsupported

_library = torch.library.Library("srelu24", "FRAGMENT")
_PRUNING = "Tensor sparse, Tensor dense_features, int? token_stride"
_STEP = f"{_PRUNING}, bool kernels"
_SAVED = f"Tensor g, Tensor x, Tensor w1, Tensor w2, Tensor hidden, {_PRUNING}, bool[] needed"
_FFN = "Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2"
_library.define(
    f"ffn_train({_FFN}, {_STEP}, Tensor? w1_grad, Tensor? w2_grad) -> (Tensor y, Tensor hidden, Tensor counts)"
)
_library.define(f"ffn_train_backward({_SAVED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"ffn_train_into({_SAVED}, Tensor(a!) w1_grad, Tensor(b!) w2_grad) -> (Tensor, Tensor, Tensor)")
_library.define(f"ffn_recipe({_FFN}, {_STEP}) -> Tensor")
_library.define(f"hidden_kept(Tensor hidden, Tensor x, int f, {_PRUNING}) -> Tensor")

_DOUBLE_BACKWARD = (
    "srelu24.ffn was differentiated twice, and it has no second derivative; leave create_graph off, "
    "or train this layer in plain PyTorch."
)


def ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, layer: LayerState) -> Tensor:
    """:func:`srelu24.ffn` by the recipe that ``layer`` belongs to. Under autocast operands are cast first.

    Raises:
        Unsupported: ranks, sizes, types or devices do not fit together, or not with the layer's state.
    """
    x, w1, w2, b1, b2 = autocast(x, w1, w2, b1, b2)  # type: ignore[assignment]
    check_ffn(x, w1, w2, b1, b2)
    if has_tangent(x, w1, w2, b1, b2):
        raise Unsupported("a training recipe has no forward-mode derivative; use backward(), or leave the recipe out.")
    f, flag = w1.shape[0], layer.recipe.sparse_flag
    if f != len(layer.counts) or layer.counts.device != x.device:
        raise Unsupported(
            f"layer {layer.name!r} of the recipe is for F = {len(layer.counts)} on {layer.counts.device}, and w1 has "
            f"F = {f} on {x.device}; make the recipe's layers when the model is where it will train."
        )
    rows = x.reshape(-1, x.shape[-1])
    pruning = (flag, layer.dense_features, layer.recipe.token_stride)
    how = (*pruning, layer.recipe.kernels)
    if differentiated(x, w1, w2, b1, b2):
        y, hidden, counts = torch.ops.srelu24.ffn_train(rows, w1, w2, b1, b2, *how, layer.w1_grad, layer.w2_grad)
        layer.count(counts, rows.shape[0])
        if layer.recipe.metrics is not None:
            layer.observe(
                counts, torch.ops.srelu24.hidden_kept(hidden.detach(), rows.detach(), f, *pruning), rows.shape[0]
            )
    else:
        y = torch.ops.srelu24.ffn_recipe(rows, w1, w2, b1, b2, *how)
    return y.view(x.shape)  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------- the steps


def _forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    sparse: Tensor,
    dense_features: Tensor,
    token_stride: int | None,
    kernels: bool,
) -> Forward:
    pruning = _pruning(sparse, dense_features, token_stride)
    reason = step.reason_against(x, w1.shape[0], token_stride, kernels, b1 is not None or b2 is not None)
    if reason is not None and x.is_cuda:
        warn_reference(reason)
    with _exact(x):
        if reason is not None:
            return reference.forward(x, w1, w2, b1, b2, pruning=pruning, accumulate=_accumulate(x))
        if pruning is None:
            return step.dense_forward(x, w1, w2, b1, b2)
        return step.forward(x, w1, w2, b1, b2, pruning)


def _ffn_train(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    done = _forward(*operands[:-2])  # the buffers for gradients are the backward pass's
    return done.y, done.hidden, done.counts


def _ffn_recipe(*operands: Any) -> Tensor:
    return _forward(*operands).y


def _gradients(
    g: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    sparse: Tensor,
    dense_features: Tensor,
    token_stride: int | None,
    needed: list[bool],
    w1_grad: Tensor | None = None,
    w2_grad: Tensor | None = None,
) -> Gradients:
    """Those of the weights are already in their buffers, where there are any."""
    pruning, wanted = _pruning(sparse, dense_features, token_stride), Needed(*needed)
    m, f = x.shape[0], w1.shape[0]
    if step.keeps_packed(hidden):
        if pruning is not None:
            with _exact(x):
                return step.backward(
                    g, x, w1, w2, hidden, pruning=pruning, needed=wanted, w1_grad=w1_grad, w2_grad=w2_grad
                )
        hidden = step.dense_part(hidden, m, f)
    with _exact(x):
        d = reference.backward(g, x, w1, w2, hidden, pruning=pruning, needed=wanted, accumulate=_accumulate(x))
    for buffer, gradient in ((w1_grad, d.w1), (w2_grad, d.w2)):
        if buffer is not None and gradient is not None:
            buffer += gradient
    return d


def _ffn_train_backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    d = _gradients(g, x, *rest)
    return tuple(_stored(gradient, x) for gradient in (d.x, d.w1, d.w2, d.b1, d.b2))


def _ffn_train_into(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    d = _gradients(g, x, *rest)
    return _stored(d.x, x), _stored(d.b1, x), _stored(d.b2, x)


def _hidden_kept(
    hidden: Tensor,
    x: Tensor,
    f: int,
    sparse: Tensor,
    dense_features: Tensor,
    token_stride: int | None,
) -> Tensor:
    """int64 [2]: non-zeros of S, and of S pruned along tokens; during the warm-up those that pruning would leave."""
    pruning = Pruning(dense_features, token_stride)
    if step.keeps_packed(hidden):
        if sparse.item():
            return torch.stack(step.kept(hidden, x.shape[0], f, pruning))
        hidden = step.dense_part(hidden, x.shape[0], f)
    s = hidden if sparse.item() else torch.where(reference.kept_along_features(hidden), hidden, 0.0)
    both = torch.where(reference.kept_along_tokens(s, pruning), s, 0.0)
    return torch.stack([(left != 0).sum() for left in (s, both)])


def _pruning(sparse: Tensor, dense_features: Tensor, token_stride: int | None) -> Pruning | None:
    return Pruning(dense_features, token_stride) if sparse.item() else None


def _accumulate(x: Tensor) -> torch.dtype | None:
    """The contract's fp32 sums on a CPU; on a GPU the products of PyTorch, which sum in fp32 and round once more."""
    return torch.float32 if x.dtype.itemsize == 2 and x.device.type == "cpu" else None


def _stored(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


def _exact(x: Tensor) -> torch.autocast:
    """Autocast off: the reference chooses its own types."""
    return torch.autocast(x.device.type, enabled=False)


# ----------------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, w2, _, _, sparse, dense_features, ctx.token_stride, _, w1_grad, w2_grad = inputs
    _, hidden, counts = output
    ctx.mark_non_differentiable(hidden, counts)
    ctx.set_materialize_grads(False)
    # Saved tensors are refused once they have changed. That is right for the flag and the ranking, and wrong for the
    # buffers, which other micro-batches add to.
    ctx.save_for_backward(x, w1, w2, hidden, sparse, dense_features)
    ctx.buffers = (w1_grad, w2_grad)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    saved = (g.contiguous(), *ctx.saved_tensors, ctx.token_stride)
    needed = list(ctx.needs_input_grad[:5])
    wanted: tuple[Tensor | None, ...]
    if ctx.buffers[0] is None:
        wanted = torch.ops.srelu24.ffn_train_backward(*saved, needed)
    else:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise Unsupported(_DOUBLE_BACKWARD)
        dx, db1, db2 = torch.ops.srelu24.ffn_train_into(*saved, needed, *ctx.buffers)
        needed[1] = needed[2] = False
        wanted = (dx, None, None, db1, db2)
    return (*(d if wants else None for d, wants in zip(wanted, needed, strict=True)), *(None,) * 6)


def _refuse_double_backward(ctx: Any, *gradients: Any) -> None:
    raise Unsupported(_DOUBLE_BACKWARD)


# ------------------------------------------------------------------------------------------------------- fake kernels


def _ffn_train_fake(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Any,
    b2: Any,
    sparse: Tensor,
    dense: Tensor,
    token_stride: int | None,
    kernels: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    m, f = x.shape[0], w1.shape[0]
    packs = step.reason_against(x, f, token_stride, kernels, b1 is not None or b2 is not None) is None
    hidden = x.new_empty(step.hidden_size(m, f)) if packs else x.new_empty(m, f)
    return x.new_empty(x.shape), hidden, x.new_empty(f, dtype=torch.int32)


def _fakes(needed: list[bool], *shapes: tuple[int, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape if wants else (0,)) for wants, shape in zip(needed, shapes, strict=True))


def _ffn_train_backward_fake(
    g: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    s: Tensor,
    d: Tensor,
    t: int | None,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    return _fakes(needed, x.shape, w1.shape, w2.shape, w1.shape[:1], w2.shape[:1], like=x)


def _ffn_train_into_fake(g: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needed = rest[-3]
    return _fakes([needed[0], *needed[3:]], x.shape, w1.shape[:1], w2.shape[:1], like=x)


def _ffn_recipe_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _hidden_kept_fake(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(2, dtype=torch.int64)


for _name, _run, _fake in (
    ("ffn_train", _ffn_train, _ffn_train_fake),
    ("ffn_train_backward", _ffn_train_backward, _ffn_train_backward_fake),
    ("ffn_train_into", _ffn_train_into, _ffn_train_into_fake),
    ("ffn_recipe", _ffn_recipe, _ffn_recipe_fake),
    ("hidden_kept", _hidden_kept, _hidden_kept_fake),
):
    _library.impl(_name, _run, "CPU")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"srelu24::{_name}", _fake, lib=_library)
torch.library.register_autograd("srelu24::ffn_train", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("srelu24::ffn_train_backward", _refuse_double_backward, lib=_library)
