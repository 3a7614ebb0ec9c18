"""GPU memory that outlives the call that allocates it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def allocate_kept(make: Callable[[], T], device: torch.device) -> T:
    """What ``make`` allocates and fills, in memory that no CUDA graph's pool owns.

    While a graph is prepared (TorchInductor's CUDA graph trees, ``torch.cuda.use_mem_pool``) what this thread
    allocates belongs to the graph, which finds fault with anything that is kept. So another thread allocates, on the
    default stream, and the current stream waits for it. Not to be called while the current stream is captured.
    """

    def elsewhere() -> T:
        with torch.cuda.device(device):
            return make()

    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(max_workers=1) as thread:
        made = thread.submit(elsewhere).result()
    torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    return made
