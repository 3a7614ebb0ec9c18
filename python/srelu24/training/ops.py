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

from typing import Any, NamedTuple

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


class RecipeOperands(NamedTuple):
    """Of ``ffn_recipe``.

    Attributes:
        x: [M, D]. w1: [F, D]. w2: [D, F]. b1: [F]. b2: [D].
        sparse: bool [] on the host: whether the step is sparse.
        dense_features: int64 [n].
        token_stride: of the groups along tokens (:mod:`srelu24.training.order`).
        kernels: whether the kernels may run the step.
    """

    x: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    sparse: Tensor
    dense_features: Tensor
    token_stride: int | None
    kernels: bool


class TrainOperands(NamedTuple):
    """Of ``ffn_train``: those of ``ffn_recipe``, and where the backward pass adds the gradients of the weights."""

    x: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    sparse: Tensor
    dense_features: Tensor
    token_stride: int | None
    kernels: bool
    w1_grad: Tensor | None
    w2_grad: Tensor | None


class BackwardOperands(NamedTuple):
    """Of ``ffn_train_backward``, and with buffers of ``ffn_train_into``.

    Attributes:
        g: dL/dY [M, D].
        hidden: what the forward pass kept.
        needed: which of the gradients of x, w1, w2, b1 and b2.
    """

    g: Tensor
    x: Tensor
    w1: Tensor
    w2: Tensor
    hidden: Tensor
    sparse: Tensor
    dense_features: Tensor
    token_stride: int | None
    needed: list[bool]
    w1_grad: Tensor | None = None
    w2_grad: Tensor | None = None


class KeptOperands(NamedTuple):
    """Of ``hidden_kept``: what a forward pass of x [M, D] kept, and the layer's hidden width."""

    hidden: Tensor
    x: Tensor
    f: int
    sparse: Tensor
    dense_features: Tensor
    token_stride: int | None


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
    f, recipe = w1.shape[0], layer.recipe
    if f != len(layer.counts) or layer.counts.device != x.device:
        raise Unsupported(
            f"layer {layer.name!r} of the recipe is for F = {len(layer.counts)} on {layer.counts.device}, and w1 has "
            f"F = {f} on {x.device}; make the recipe's layers when the model is where it will train."
        )
    rows = x.reshape(-1, x.shape[-1])
    given = RecipeOperands(
        x=rows,
        w1=w1,
        w2=w2,
        b1=b1,
        b2=b2,
        sparse=recipe.sparse_flag,
        dense_features=layer.dense_features,
        token_stride=recipe.token_stride,
        kernels=recipe.kernels,
    )
    if not differentiated(x, w1, w2, b1, b2):
        y = torch.ops.srelu24.ffn_recipe(*given)
        return y.view(x.shape)  # type: ignore[no-any-return]
    train = TrainOperands(*given, w1_grad=layer.w1_grad, w2_grad=layer.w2_grad)
    y, hidden, counts = torch.ops.srelu24.ffn_train(*train)
    layer.count(counts, rows.shape[0])
    if recipe.metrics is not None:
        watched = KeptOperands(
            hidden=hidden.detach(),
            x=rows.detach(),
            f=f,
            sparse=given.sparse,
            dense_features=given.dense_features,
            token_stride=given.token_stride,
        )
        layer.observe(counts, torch.ops.srelu24.hidden_kept(*watched), rows.shape[0])
    return y.view(x.shape)  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------- the steps


def _forward(o: RecipeOperands | TrainOperands) -> Forward:
    """The step's forward pass, on the kernels where they take it."""
    x, w1, w2, b1, b2 = o.x, o.w1, o.w2, o.b1, o.b2
    pruning = _make_pruning(o.sparse, o.dense_features, o.token_stride)
    reason = _reason_against(o)
    if reason is not None and x.is_cuda:
        warn_reference(reason)
    with _without_autocast(x):
        if reason is not None:
            return reference.forward(x, w1, w2, b1, b2, pruning=pruning, accumulate=_choose_sum_type(x))
        if pruning is None:
            return step.dense_forward(x, w1, w2, b1, b2)
        return step.forward(x, w1, w2, b1, b2, pruning)


def _reason_against(o: RecipeOperands | TrainOperands) -> str | None:
    """Why the kernels do not take the step, or None. Looks at no values."""
    return step.reason_against(o.x, o.w1.shape[0], o.token_stride, o.kernels, o.b1 is not None, o.b2 is not None)


def _ffn_train(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    done = _forward(TrainOperands(*given))
    return done.y, done.hidden, done.counts


def _ffn_recipe(*given: Any) -> Tensor:
    return _forward(RecipeOperands(*given)).y


def _compute_gradients(o: BackwardOperands) -> Gradients:
    """The gradients that are needed; those of the weights are added to their buffers, where there are any."""
    x, w1, w2 = o.x, o.w1, o.w2
    pruning, needed = _make_pruning(o.sparse, o.dense_features, o.token_stride), Needed(*o.needed)
    hidden = o.hidden
    if step.keeps_packed(hidden):
        if pruning is not None:
            with _without_autocast(x):
                return step.backward(
                    o.g, x, w1, w2, hidden, pruning=pruning, needed=needed, w1_grad=o.w1_grad, w2_grad=o.w2_grad
                )
        hidden = step.dense_part(hidden, x.shape[0], w1.shape[0])
    with _without_autocast(x):
        d = reference.backward(o.g, x, w1, w2, hidden, pruning=pruning, needed=needed, accumulate=_choose_sum_type(x))
    for buffer, gradient in ((o.w1_grad, d.w1), (o.w2_grad, d.w2)):
        if buffer is not None and gradient is not None:
            buffer += gradient
    return d


def _ffn_train_backward(*given: Any) -> tuple[Tensor, ...]:
    o = BackwardOperands(*given)
    d = _compute_gradients(o)
    return tuple(_round_to_storage(gradient, o.x) for gradient in (d.x, d.w1, d.w2, d.b1, d.b2))


def _ffn_train_into(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    o = BackwardOperands(*given)
    d = _compute_gradients(o)
    return _round_to_storage(d.x, o.x), _round_to_storage(d.b1, o.x), _round_to_storage(d.b2, o.x)


def _hidden_kept(*given: Any) -> Tensor:
    """int64 [2]: non-zeros of S, and of S pruned along tokens; during the warm-up those that pruning would leave."""
    o = KeptOperands(*given)
    hidden, pruning = o.hidden, Pruning(o.dense_features, o.token_stride)
    if step.keeps_packed(hidden):
        if o.sparse.item():
            return torch.stack(step.kept(hidden, o.x.shape[0], o.f, pruning))
        hidden = step.dense_part(hidden, o.x.shape[0], o.f)
    s = hidden if o.sparse.item() else torch.where(reference.kept_along_features(hidden), hidden, 0.0)
    both = torch.where(reference.kept_along_tokens(s, pruning), s, 0.0)
    return torch.stack([(left != 0).sum() for left in (s, both)])


def _make_pruning(sparse: Tensor, dense_features: Tensor, token_stride: int | None) -> Pruning | None:
    return Pruning(dense_features, token_stride) if sparse.item() else None


def _choose_sum_type(x: Tensor) -> torch.dtype | None:
    """The type in which the reference sums products of 16-bit operands: on a CPU the contract's fp32. None on a GPU:
    PyTorch's own products sum in fp32 there, and round the result to storage."""
    return torch.float32 if x.dtype.itemsize == 2 and x.device.type == "cpu" else None


def _round_to_storage(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


def _without_autocast(x: Tensor) -> torch.autocast:
    """Autocast off: the reference chooses its own types."""
    return torch.autocast(x.device.type, enabled=False)


# ----------------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    o = TrainOperands(*inputs)
    _, hidden, counts = output
    ctx.mark_non_differentiable(hidden, counts)
    ctx.set_materialize_grads(False)
    ctx.token_stride = o.token_stride
    # Saved tensors are refused once they have changed. That is right for the flag and the ranking, and wrong for the
    # buffers, which other micro-batches add to.
    ctx.save_for_backward(o.x, o.w1, o.w2, hidden, o.sparse, o.dense_features)
    ctx.buffers = (o.w1_grad, o.w2_grad)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return _spread_over_inputs(Gradients())
    asked: Any = TrainOperands(*ctx.needs_input_grad)  # a bool for every input
    needed = Needed(x=asked.x, w1=asked.w1, w2=asked.w2, b1=asked.b1, b2=asked.b2)
    x, w1, w2, hidden, sparse, dense_features = ctx.saved_tensors
    saved = BackwardOperands(
        g=g.contiguous(),
        x=x,
        w1=w1,
        w2=w2,
        hidden=hidden,
        sparse=sparse,
        dense_features=dense_features,
        token_stride=ctx.token_stride,
        needed=_flags(needed),
    )
    w1_grad, w2_grad = ctx.buffers
    if w1_grad is None:
        dx, dw1, dw2, db1, db2 = torch.ops.srelu24.ffn_train_backward(*saved[:-2])
    else:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise Unsupported(_DOUBLE_BACKWARD)
        dx, db1, db2 = torch.ops.srelu24.ffn_train_into(*saved._replace(w1_grad=w1_grad, w2_grad=w2_grad))
        dw1 = dw2 = None
    return _spread_over_inputs(
        Gradients(
            x=dx if needed.x else None,
            w1=dw1 if needed.w1 else None,
            w2=dw2 if needed.w2 else None,
            b1=db1 if needed.b1 else None,
            b2=db2 if needed.b2 else None,
        )
    )


def _flags(needed: Needed) -> list[bool]:
    """The list of bools that the ops take."""
    return [needed.x, needed.w1, needed.w2, needed.b1, needed.b2]


def _spread_over_inputs(d: Gradients) -> tuple[Tensor | None, ...]:
    """A gradient or None for every input of ``ffn_train``, in the order in which autograd takes them."""
    return tuple(getattr(d, name, None) for name in TrainOperands._fields)


def _refuse_double_backward(ctx: Any, *gradients: Any) -> None:
    raise Unsupported(_DOUBLE_BACKWARD)


# ------------------------------------------------------------------------------------------------------- fake kernels


def _ffn_train_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    o = TrainOperands(*given)
    x, (m, f) = o.x, (o.x.shape[0], o.w1.shape[0])
    hidden = x.new_empty(step.hidden_size(m, f)) if _reason_against(o) is None else x.new_empty(m, f)
    return x.new_empty(x.shape), hidden, x.new_empty(f, dtype=torch.int32)


def _ffn_train_backward_fake(*given: Any) -> tuple[Tensor, ...]:
    o = BackwardOperands(*given)
    return _allocate_gradients(o, x=o.x.shape, w1=o.w1.shape, w2=o.w2.shape, b1=o.w1.shape[:1], b2=o.w2.shape[:1])


def _ffn_train_into_fake(*given: Any) -> tuple[Tensor, ...]:
    o = BackwardOperands(*given)
    return _allocate_gradients(o, x=o.x.shape, b1=o.w1.shape[:1], b2=o.w2.shape[:1])


def _allocate_gradients(o: BackwardOperands, **shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """For each of these gradients: empty where it is not needed."""
    needed = Needed(*o.needed)
    return tuple(o.x.new_empty(shape if getattr(needed, name) else (0,)) for name, shape in shapes.items())


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
