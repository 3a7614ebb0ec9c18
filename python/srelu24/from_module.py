"""Widths of the FFNs of a real model, built without memory on PyTorch's meta device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from srelu24_gen.errors import Unsupported


def widths_of(reference: str) -> list[tuple[int, int]]:
    """D and F of every FFN of the model that ``package.module:factory`` makes, each once, in the model's order.

    The factory is called without arguments, on the meta device, so that no weights are made.

    Raises:
        Unsupported: it cannot be imported or called, or the model has no FFN of two linear layers.
    """
    model = _build(reference)
    found = ffn_widths(model)
    if not found:
        raise Unsupported(
            f"{reference} has no module with two Linear layers [F, D] and [D, F] and no gate; give --d-model and --d-ff"
        )
    return found


def ffn_widths(model: nn.Module) -> list[tuple[int, int]]:
    """D and F of every module whose own Linear layers are [F, D] and [D, F]; a gated FFN has one more."""
    found: dict[tuple[int, int], None] = {}
    for module in model.modules():
        layers = [child for child in module.children() if isinstance(child, nn.Linear)]
        if len(layers) == 2:
            up, down = sorted(layers, key=lambda layer: layer.in_features)
            wider = up.out_features > up.in_features
            if wider and (up.out_features, up.in_features) == (down.in_features, down.out_features):
                found[up.in_features, up.out_features] = None
    return list(found)


def _build(reference: str) -> nn.Module:
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise Unsupported(f"{reference!r} is not package.module:factory, such as mymodels.gpt:make_model")
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise Unsupported(f"{reference} cannot be imported ({error}); check the name and the Python path") from error
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:  # whatever a foreign factory raises
        reason = (str(error).splitlines() or [""])[0]
        raise Unsupported(f"{reference}() failed on the meta device with {type(error).__name__}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise Unsupported(f"{reference}() gave a {type(model).__name__}; a torch.nn.Module is needed")
    return model
