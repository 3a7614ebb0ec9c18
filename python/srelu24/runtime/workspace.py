"""What kernels that split a tile along K pass between their CTAs, kept from launch to launch."""

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
    """The workspace of the current stream, whose launches take turns; inside a CUDA graph one of the graph's own.

    It only grows, in both parts: two kernels of which one needs more sums and the other more flags would else take it
    from each other at every launch, and each time pay for an allocation and a new parameter block.
    """
    if torch.cuda.is_current_stream_capturing():
        return _new(flags, floats, device)
    key = (device.index, stream(device.index))
    found = _workspaces.get(key)
    if found is None or found.flags.numel() < flags or found.partials.numel() < floats:
        if found is not None:
            flags, floats = max(flags, found.flags.numel()), max(floats, found.partials.numel())
        found = _workspaces[key] = Workspace(*allocate_kept(partial(_new, flags, floats, device), device))
    return found


def _new(flags: int, floats: int, device: torch.device) -> Workspace:
    return Workspace(
        torch.empty(floats, dtype=torch.float32, device=device),
        torch.zeros(flags, dtype=torch.int32, device=device),
    )
