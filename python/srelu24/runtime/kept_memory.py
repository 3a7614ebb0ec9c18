"""GPU memory that outlives the call that allocates it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def allocate_kept(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """What ``make`` allocates and fills, for the current stream alone, in memory that no CUDA graph's pool owns.

    While a graph is prepared (TorchInductor's CUDA graph trees, ``torch.cuda.use_mem_pool``) what this thread
    allocates belongs to the graph, which finds fault with anything that is kept. So another thread allocates, on the
    default stream, and the current stream waits for it. Not to be called while the current stream is captured.
    """
    if device.type != "cuda":
        return make()

    def elsewhere() -> tuple[Tensor, ...]:
        with torch.cuda.device(device):
            return make()

    with ThreadPoolExecutor(max_workers=1) as thread:
        made = thread.submit(elsewhere).result()
    current = torch.cuda.current_stream(device)
    current.wait_stream(torch.cuda.default_stream(device))
    for tensor in made:
        tensor.record_stream(current)  # once dropped, it is not handed out again before this stream is done with it
    return made
