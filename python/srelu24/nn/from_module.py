"""Widths of the squared-ReLU FFNs of a real model, built without memory on PyTorch's meta device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from srelu24.nn import sites
from srelu24.nn.modules import SquaredReLUFFN
from srelu24_gen.errors import Unsupported


def widths_of(reference: str) -> list[tuple[int, int]]:
    """D and F of every FFN that :func:`srelu24.convert` would change, or has, each once, in the model's order.

    The model is what ``package.module:factory`` makes: called without arguments, on the meta device, so that no weights
    are made.

    Raises:
        Unsupported: it cannot be imported or called, or the model has no squared-ReLU FFN; the message says what the
            first one that looks like an FFN is instead.
    """
    model = _build(reference)
    candidates = sites.find(model)
    found = [_widths(module.up, module.down) for module in model.modules() if isinstance(module, SquaredReLUFFN)]
    found += [_widths(site.up, site.down) for site in candidates if site.kind != "other"]
    if not found:
        why = f" ({candidates[0].path or 'the model'}: {candidates[0].why})" if candidates else ""
        raise Unsupported(f"{reference} has no squared-ReLU FFN{why}; give --d-model and --d-ff")
    return list(dict.fromkeys(found))


def _widths(up: Any, down: Any) -> tuple[int, int]:
    return int(up.in_features), int(down.in_features)


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
