"""The real runner, as far as it goes without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from fake_gpu import GEMM2, H200, OTHERS
from srelu24 import tune
from srelu24_gen.errors import CompileError
from srelu24_gen.spec import KernelSpec


def test_builds_come_as_they_are_done_and_stop_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [KernelSpec(GEMM2.family, c) for c in OTHERS[1][:5]]
    attempted: list[KernelSpec] = []

    def fake_build_many(wanted: Sequence[KernelSpec], *, jobs: int, on_done: Callable[..., None]) -> None:
        assert jobs >= 1
        for spec in wanted:
            attempted.append(spec)
            on_done(spec, CompileError(spec.name))
            time.sleep(0.05)

    monkeypatch.setattr(tune, "build_many", fake_build_many)
    monkeypatch.setattr(tune, "gpu_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = tune.GpuRunner(torch.device("cuda:0"))
    assert [(spec, str(error)) for spec, error in gpu.build(specs)] == [(spec, spec.name) for spec in specs]

    attempted.clear()
    for _ in gpu.build(specs):
        break
    time.sleep(0.3)
    assert len(attempted) < len(specs)

    def fails(*_: object, **__: object) -> None:
        raise CompileError("nothing can be built")

    monkeypatch.setattr(tune, "build_many", fails)
    with pytest.raises(CompileError, match="nothing can be built"):
        list(gpu.build(specs))
