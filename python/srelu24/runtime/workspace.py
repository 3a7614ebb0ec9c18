"""Workspaces: the memory through which CTAs that share a tile along K pass sums, kept from launch to launch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from srelu24.runtime.kept_memory import allocate_kept
from srelu24.runtime.loader import stream


class Workspace(NamedTuple):
    """fp32 sums, and int32 flags that are zero between launches."""

    partials: Tensor
    flags: Tensor


_workspaces: dict[tuple[int, int], Workspace] = {}


def workspace(flags: int, floats: int, device: torch.device) -> Workspace:
    """A workspace of at least this size for the current stream, whose launches run one after the other. While a CUDA
    graph is captured it is a new one, which belongs to the graph.

    The kept workspace never shrinks in either part. Otherwise two kernels, one of which needs more sums and the other
    more flags, would replace each other's at every launch, and pay for an allocation and a new parameter block each
    time.
    """
    if torch.cuda.is_current_stream_capturing():
        return _allocate(flags, floats, device)
    key = (device.index, stream(device.index))
    found = _workspaces.get(key)
    if found is None or found.flags.numel() < flags or found.partials.numel() < floats:
        if found is not None:
            flags, floats = max(flags, found.flags.numel()), max(floats, found.partials.numel())
        found = _workspaces[key] = Workspace(*allocate_kept(partial(_allocate, flags, floats, device), device))
    return found


def _allocate(flags: int, floats: int, device: torch.device) -> Workspace:
    return Workspace(
        torch.empty(floats, dtype=torch.float32, device=device),
        torch.zeros(flags, dtype=torch.int32, device=device),
    )
