"""Kernels of a model built and loaded ahead of serving."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from srelu24.fp8.recipes import ScaleRecipe
from srelu24.nn.modules import Linear24, SquaredReLUFFN, is_plain
from srelu24.nn.sites import check_module
from srelu24.ops.explanation import Explanation, explain
from srelu24.training.recipe import LayerState
from srelu24_gen.compile import BuiltKernel, build_many
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape


@dataclass(frozen=True, slots=True)
class Warmed:
    """One size of FFN at one number of tokens; ``explanation`` is None for a :class:`Linear24`."""

    shape: Shape
    explanation: Explanation | None


def warmup(model: nn.Module, tokens: int | Iterable[int]) -> list[Warmed]:
    """Builds, side by side, and loads every kernel that the model's converted layers need, so that no request waits.

    Each distinct layer then runs once on zeros. Call it on the serving process's device, after ``model.to``.

    Args:
        model: with :class:`SquaredReLUFFN` or :class:`Linear24` layers in it, such as :func:`srelu24.convert` makes.
        tokens: number or numbers of rows M that serving will meet: batch times sequence length, and batch alone for
            decoding.

    Returns:
        What runs, by layer size and number of tokens; dense where no kernel serves, with the reason.

    Raises:
        Unsupported: no numbers of tokens, or one is not positive, or the model has no converted layer.
        CompileError, LaunchError: a kernel could not be built or loaded.
    """
    counts = [tokens] if isinstance(tokens, int) else list(tokens) if isinstance(tokens, Iterable) else []
    if not counts or any(not isinstance(m, int) or isinstance(m, bool) or m < 1 for m in counts):
        raise Unsupported(f"tokens are {tokens!r}; at least one positive number of rows is needed.")
    check_module(model)
    layers = list(_distinct(model))
    if not layers:
        raise Unsupported(
            f"{type(model).__name__} has no SquaredReLUFFN or Linear24; convert it with srelu24.convert first."
        )
    with torch.no_grad():
        warmed = [(layer, *_asked(layer, m)) for layer in layers for m in counts]
        specs = {k.spec for _, _, told in warmed if told.explanation is not None for k in told.explanation.kernels}
        for outcome in build_many(specs) if specs else ():
            if not isinstance(outcome, BuiltKernel):
                raise outcome
        for layer, x, _ in warmed:
            layer(x)
    for device in {x.device for _, x, _ in warmed if x.is_cuda}:
        torch.cuda.synchronize(device)
    return [told for _, _, told in warmed]


def _asked(layer: SquaredReLUFFN | Linear24, m: int) -> tuple[torch.Tensor, Warmed]:
    """Zeros to run the layer on, and what it will run."""
    if isinstance(layer, Linear24):
        x = layer.weight.new_zeros((m, layer.in_features))
        return x, Warmed(Shape(m, layer.out_features, layer.in_features), None)
    up, down = layer.up, layer.down
    first = next(up.parameters())
    x = first.new_zeros((m, int(up.in_features)))  # type: ignore[arg-type]
    told = Explanation("dense", "a layer is more than a plain nn.Linear")
    if isinstance(layer.recipe, LayerState):
        told = Explanation("reference", "by a training recipe, in plain PyTorch")
    elif is_plain(up) and is_plain(down):
        weights = (up.weight, down.weight, up.bias, down.bias)
        told = explain(x, *weights, mode=layer.mode, recipe=layer.recipe)  # type: ignore[arg-type]
    return x, Warmed(Shape(m, int(up.in_features), int(up.out_features)), told)  # type: ignore[arg-type]


def _distinct(model: nn.Module) -> Iterable[SquaredReLUFFN | Linear24]:
    """One layer of each size, type and device: the others run the same kernels. In 8 bits each has its own weights."""
    seen = set()
    for module in model.modules():
        if not isinstance(module, SquaredReLUFFN | Linear24):
            continue
        own = module if isinstance(getattr(module, "recipe", None), ScaleRecipe) else None
        parameters = ((p.shape, p.dtype, p.device, name) for name, p in sorted(module.named_parameters()))
        key = own, module.mode, tuple(parameters)
        if (type(module), key) not in seen:
            seen.add((type(module), key))
            yield module
