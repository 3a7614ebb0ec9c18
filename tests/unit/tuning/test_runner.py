"""The real runner, as far as it goes without a GPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import cpu_session
from fake_gpu import GEMM2, H200, OTHERS
from on_the_cpu import OnTheCpu
from rows import record
from srelu24.db.database import Database
from srelu24.runtime.dense import WAYS
from srelu24.tuning import tuner
from srelu24.tuning.search import FEWEST
from srelu24.tuning.tuner import tune_ffn
from srelu24_gen import space
from srelu24_gen.errors import CompileError
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelSpec


def test_builds_come_as_they_are_done_and_stop_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [KernelSpec(GEMM2.family, c) for c in OTHERS[1][:5]]
    attempted: list[KernelSpec] = []

    def fake_build_many(wanted: Sequence[KernelSpec], *, jobs: int, on_done: Callable[..., None]) -> None:
        assert jobs >= 1
        for spec in wanted:
            attempted.append(spec)
            on_done(spec, CompileError(spec.name))
            time.sleep(0.05)

    monkeypatch.setattr(tuner, "build_many", fake_build_many)
    monkeypatch.setattr(tuner, "gpu_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = tuner.GpuRunner(torch.device("cuda:0"))
    assert [(spec, str(error)) for spec, error in gpu.build(specs)] == [(spec, spec.name) for spec in specs]

    attempted.clear()
    for _ in gpu.build(specs):
        break
    time.sleep(0.3)
    assert len(attempted) < len(specs)

    def fails(*_: object, **__: object) -> None:
        raise CompileError("nothing can be built")

    monkeypatch.setattr(tuner, "build_many", fails)
    with pytest.raises(CompileError, match="nothing can be built"):
        list(gpu.build(specs))


def test_the_whole_chain_on_a_cpu(tmp_path: Path) -> None:
    shape = Shape(40, 64, 264)
    db = Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")
    # A winner of another size is tried first; here it is one that is wrong.
    wrong = dataclasses.replace(space.default(shape.gemms(DType.BF16)[1], H200), stages=cpu_session.WRONG_STAGES)
    db.put(record(4096, 64, 264, config=wrong.to_dict()))
    report = tune_ffn(*shape, DType.BF16, bias=True, db=db, runner=OnTheCpu(), budget_s=2.0)
    assert [r.problem for r in report.records] == list(shape.gemms(DType.BF16, True, True))
    assert report.tried >= 2 * FEWEST
    assert {(f.stage, f.reason.partition(":")[0]) for f in report.failures} == {("screen", "wrong result")}
    assert set(report.records[0].evidence.dense) == set(WAYS)
    assert all(t.outcome == "ok" for t in db.all_trials() if t.config != wrong.to_dict())
