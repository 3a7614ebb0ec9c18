"""Scales for the 8-bit layers of a model, from data as :func:`srelu24.profile` takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from srelu24.fp8 import recipes
from srelu24.fp8.recipes import Static
from srelu24.nn.data import Data, batches, feed


def calibrate(run: Callable[[Any], object], data: Data) -> list[Static]:
    """Find the scales of every :class:`srelu24.Static` recipe that ``run`` uses.

    Meanwhile their layers run as ``rowwise``, so that they need no scale yet; gradients are off, and what
    torch.compile has compiled runs eagerly. One calibration at a time in a process.

    Args:
        run: a model, or a function that is called with each batch.
        data: batches like those to come: a tensor, a tuple or list of arguments or a mapping of keyword arguments each;
            or one tensor or mapping alone.

    Returns:
        The recipes that were met, in order, now calibrated.

    Raises:
        Unsupported: no Static recipe was met, or a layer's S was zero throughout, or not finite.
    """
    if isinstance(run, nn.Module):
        model = run
        return recipes.calibrate(lambda batch: feed(model, batch), batches(data))
    return recipes.calibrate(run, batches(data))
