"""Kept memory comes from another thread, and the current stream is told; without a GPU, streams are stand-ins."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from srelu24.runtime.kept_memory import allocate_kept


def test_on_a_cpu_it_is_just_made() -> None:
    threads: list[int] = []

    def make() -> tuple[Tensor, ...]:
        threads.append(threading.get_ident())
        return (torch.zeros(3),)

    (made,) = allocate_kept(make, torch.device("cpu"))
    assert made.tolist() == [0.0, 0.0, 0.0]
    assert threads == [threading.get_ident()]


def test_on_a_gpu_another_thread_allocates_and_the_current_stream_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    stream = SimpleNamespace(wait_stream=lambda other: told.append(("waits for", other)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the default stream")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def make() -> tuple[SimpleNamespace, ...]:
        told.append(threading.get_ident())
        return tuple(SimpleNamespace(record_stream=lambda s, n=n: told.append((n, s))) for n in range(2))

    allocate_kept(make, torch.device("cuda", 0))  # type: ignore[arg-type]
    thread, waits, *recorded = told
    assert thread != threading.get_ident()
    assert waits == ("waits for", "the default stream")
    assert recorded == [(0, stream), (1, stream)]
