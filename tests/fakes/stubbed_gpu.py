"""A GPU for the tensors of the CPU, up to the driver: kernels are chosen, built and encoded, and not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from srelu24.fp8 import ops as fp8_ops
from srelu24.ops import explanation
from srelu24.runtime import dense, dispatch, gemm, launch, operands, pair, rows, workspace
from srelu24.training import kernels, movers, step
from srelu24_gen.spec import KernelSpec
from srelu24_gen.target import GpuTarget

_USERS_OF_GPU = (dispatch, explanation, fp8_ops, movers, operands, step)
_USERS_OF_STREAM = (dense, gemm, kernels, pair, rows, workspace)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on the GPU; ``x.as_subclass(OnGpu)``."""

    is_cuda = True


def loaded_kernel(sm_count: int = 132, launched: Callable[..., None] = lambda *_: None) -> Any:
    """A kernel as the loader gives it, which hands its launches to ``launched``."""
    return SimpleNamespace(device=0, sm_count=sm_count, threads=128, launch=launched)


@contextmanager
def stubbed(
    monkeypatch: pytest.MonkeyPatch,
    target: GpuTarget,
    build: Callable[[KernelSpec], Any],
    launched: Callable[..., None] = lambda *_: None,
) -> Iterator[None]:
    """Every kernel comes from ``build`` and is given to ``launched``."""
    kernel = loaded_kernel(target.sm_count, launched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch, "build", build)
    monkeypatch.setattr(launch, "load", lambda *_, **__: kernel)
    for user in (gemm, rows):
        monkeypatch.setattr(user, "ArgumentBlock", lambda content: SimpleNamespace(address=1))
    for user in (gemm, kernels):
        monkeypatch.setattr(user, "tensor_map", lambda *_, **__: b"")
    for user in _USERS_OF_GPU:
        monkeypatch.setattr(user, "gpu_of", lambda device: target)
    for user in _USERS_OF_STREAM:
        monkeypatch.setattr(user, "stream", lambda device: 0)
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(workspace, "allocate_kept", lambda make, device: make())
    allocate, cpu = workspace._allocate, torch.device("cpu")
    monkeypatch.setattr(workspace, "_allocate", lambda flags, floats, device: allocate(flags, floats, cpu))
    _forget()
    yield
    _forget()


def _forget() -> None:
    for cached in (launch.launcher_for, kernels.launcher_for, movers.launcher_for):
        cached.cache_clear()
    dispatch.clear_cache()
