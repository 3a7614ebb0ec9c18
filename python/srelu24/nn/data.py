"""How data is handed to a model, by :func:`srelu24.profile` and :func:`srelu24.calibrate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Data = Iterable[Any] | Mapping[str, Any] | Tensor
"""Batches, one after the other, or one tensor or mapping alone."""


def batches(data: Data) -> Iterable[Any]:
    """The batches of ``data``; any mapping is one, such as a tokenizer's BatchEncoding."""
    return [data] if isinstance(data, Tensor | Mapping) else data


def feed(model: nn.Module, batch: Any) -> Any:
    """Call the model: with the items of a mapping by keyword, of a tuple or list by position, else with the batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)
