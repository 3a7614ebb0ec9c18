"""What is compared: the method, dense training, and the method with one part left out (arXiv 2503.16672)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srelu24.bench.ablation.model import FFNStep, Transformer
from srelu24.bench.ablation.results import Variant
from srelu24.nn.conversion import convert
from srelu24.training import reference
from srelu24.training.order import NEIGHBOURS
from srelu24.training.recipe import LayerState, Recipe
from srelu24.training.reference import Pruning

_CHANGES: dict[Variant, dict[str, Any]] = {
    Variant.NO_WARMUP: {"warmup_steps": 0},
    Variant.NAIVE_BACKWARD: {"dense_features": 0.0},
    Variant.NO_PERMUTATION: {"token_stride": NEIGHBOURS},
}


def attach(variant: Variant, model: Transformer, *, warmup_steps: int, refresh: int) -> Recipe | None:
    """Have the plain FFNs of ``model`` compute as the variant does, by the recipe that is returned if it has one."""
    if variant is Variant.DENSE:
        return None
    recipe = Recipe(**({"warmup_steps": warmup_steps, "refresh": refresh} | _CHANGES.get(variant, {})))
    if variant not in (Variant.REFERENCE, Variant.NO_MASK_REUSE):
        convert(model, recipe=recipe)
        return recipe
    for index, ffn in enumerate(model.ffns):
        layer = recipe.layer(f"blocks.{index}.ffn", ffn.up.weight)  # type: ignore[arg-type]
        ffn.step = _on_the_reference(layer, variant is Variant.REFERENCE)
    return recipe


def _on_the_reference(layer: LayerState, reuse_masks: bool) -> FFNStep:
    return lambda x, w1, w2: _on_reference(x, w1, w2, layer, reuse_masks)


def _on_reference(x: Tensor, w1: Tensor, w2: Tensor, layer: LayerState, reuse_masks: bool) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, w1, w2 = (t.to(torch.get_autocast_dtype(kind)) for t in (x, w1, w2))
    y: Tensor = _ReferenceStep.apply(x.flatten(0, -2), w1, w2, layer, reuse_masks)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class _ReferenceStep(torch.autograd.Function):
    """The step on the reference wherever it runs, and without mask reuse, which is not the method and no option of a
    recipe."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, layer: LayerState, reuse_masks: bool) -> Tensor:
        recipe = layer.recipe
        ctx.pruning = Pruning(layer.dense_features.clone(), recipe.token_stride, reuse_masks) if recipe.sparse else None
        with torch.autocast(x.device.type, enabled=False):
            step = reference.forward(x, w1, w2, pruning=ctx.pruning, accumulate=None)
        layer.count(step.counts, x.shape[0])
        ctx.save_for_backward(x, w1, w2, step.hidden)
        return step.y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        d = reference.backward(g.contiguous(), *ctx.saved_tensors, pruning=ctx.pruning, accumulate=None)
        return d.x, d.w1, d.w2, None, None
