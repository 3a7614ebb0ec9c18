"""GPU memory that outlives the call that allocates it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def allocate_kept(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """Call ``make`` so that the tensors it allocates and fills lie in memory that no CUDA graph's pool owns, for use on
    the current stream alone.

    While a graph is prepared (TorchInductor's CUDA graph trees, ``torch.cuda.use_mem_pool``) what this thread
    allocates belongs to the graph, and the graph reports tensors that outlive it as errors. So another thread
    allocates, on the default stream, and the current stream waits for it. This must not be called while the current
    stream is captured.
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
