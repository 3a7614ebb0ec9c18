"""Kernels of a model built and loaded ahead of serving, or of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srelu24.fp8.recipes import ScaleRecipe, Static
from srelu24.nn.modules import Linear24, SquaredReLUFFN, is_plain
from srelu24.nn.sites import check_module
from srelu24.numerics.dtypes import DTYPES
from srelu24.ops.explanation import Explanation, explain, explain_step
from srelu24.training import step
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

    Each distinct layer then runs once on zeros. Call it on the serving process's device, after ``model.to``. Layers of
    a training recipe get the kernels of their whole steps, forward and backward, of the warm-up and after it.

    Args:
        model: with :class:`SquaredReLUFFN` or :class:`Linear24` layers in it, such as :func:`srelu24.convert` makes.
        tokens: number or numbers of rows M that serving will meet: batch times sequence length, and batch alone for
            decoding.

    Returns:
        What runs, by layer size and number of tokens; dense, or in training the reference, where no kernel serves, with
        the reason.

    Raises:
        Unsupported: no numbers of tokens, or one is not positive, or the model has no converted layer, or one with a
            static recipe that is not calibrated.
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
        plans = [_plan(layer, m) for layer in layers for m in counts]
        _build(plan.warmed.explanation for plan in plans)
        for plan in plans:
            plan.load()
    for device in {plan.x.device for plan in plans if plan.x.is_cuda}:
        torch.cuda.synchronize(device)
    return [plan.warmed for plan in plans]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A layer, zeros to run it on, and what it will run."""

    layer: SquaredReLUFFN | Linear24
    x: Tensor
    warmed: Warmed

    def load(self) -> None:
        """Load the kernels: those of one call by making it, those of a training step by their names."""
        layer, explanation = self.layer, self.warmed.explanation
        self.layer(self.x)
        trains = isinstance(layer, SquaredReLUFFN) and isinstance(layer.recipe, LayerState)
        if trains and explanation is not None and explanation.runs == "kernels":
            biases = layer.up.bias is not None, layer.down.bias is not None  # type: ignore[union-attr]
            step.load(self.warmed.shape, DTYPES[self.x.dtype], *biases, self.x.device)


def _build(explanations: Iterable[Explanation | None]) -> None:
    specs = {kernel.spec for each in explanations if each is not None for kernel in each.kernels}
    for outcome in build_many(specs) if specs else ():
        if not isinstance(outcome, BuiltKernel):
            raise outcome


def _plan(layer: SquaredReLUFFN | Linear24, m: int) -> _Plan:
    if isinstance(layer, Linear24):
        x = layer.weight.new_zeros((m, layer.in_features))
        return _Plan(layer, x, Warmed(Shape(m, layer.out_features, layer.in_features), None))
    up, down = layer.up, layer.down
    first = next(up.parameters())
    x = first.new_zeros((m, int(up.in_features)))  # type: ignore[arg-type]
    shape = Shape(m, int(up.in_features), int(up.out_features))  # type: ignore[arg-type]
    return _Plan(layer, x, Warmed(shape, _explain(layer, x, up, down)))


def _explain(layer: SquaredReLUFFN, x: Tensor, up: nn.Module, down: nn.Module) -> Explanation:
    if not (is_plain(up) and is_plain(down)):
        return Explanation("dense", "a layer is more than a plain nn.Linear")
    w1, w2, b1, b2 = up.weight, down.weight, up.bias, down.bias
    if isinstance(layer.recipe, LayerState):
        return explain_step(x, w1, b1, b2, layer.recipe)  # type: ignore[arg-type]
    if isinstance(layer.recipe, Static):
        layer.recipe.scales_on(x.device)  # raises before anything is compiled
    return explain(x, w1, w2, b1, b2, mode=layer.mode, recipe=layer.recipe)  # type: ignore[arg-type]


def _distinct(model: nn.Module) -> Iterable[SquaredReLUFFN | Linear24]:
    """One layer of each size, type, device and training recipe: the others run the same kernels. In 8 bits every layer:
    each has weights of its own to quantise."""
    seen = set()
    for module in model.modules():
        if not isinstance(module, SquaredReLUFFN | Linear24):
            continue
        recipe = getattr(module, "recipe", None)
        own = module if isinstance(recipe, ScaleRecipe) else recipe and recipe.recipe
        parameters = tuple((p.shape, p.dtype, p.device, name) for name, p in sorted(module.named_parameters()))
        key = type(module), own, module.mode, parameters
        if key not in seen:
            seen.add(key)
            yield module
