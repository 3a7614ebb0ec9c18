"""One hypothesis profile for all unit tests: no deadlines on slow machines, few enough examples to stay fast.

And the training kernels, played on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import played_kernels
from srelu24.bench import step as bench_step
from srelu24.runtime import dispatch
from srelu24.training import kernels, movers, step

settings.register_profile("srelu24", deadline=None, max_examples=60)
settings.load_profile("srelu24")
torch.set_num_threads(1)  # of small tensors: threads bring nothing, and cost much where others have the cores


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    """No test sees what another one's tuning database made the dispatcher choose."""
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training kernels are there, on the CPU: each function does what its kernel does, with the reference."""
    for function in ("dense_hidden", "pruned_hidden", "product", "hidden_gradient", "weight_gradient"):
        monkeypatch.setattr(kernels, function, getattr(played_kernels, function))
    for mover in ("transposed", "dense_columns", "clear_columns"):
        monkeypatch.setattr(movers, mover, getattr(played_kernels, mover))
    for user in (step, bench_step):
        monkeypatch.setattr(user, "reason_against", lambda *_: None)
    monkeypatch.setattr(bench_step, "require_gpu", lambda _: None)
