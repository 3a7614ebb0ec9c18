"""``srelu24 db``: what differs, what is stale, what is dropped, and what is right when it runs again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from srelu24.cli import main
from srelu24.db import health
from srelu24.db.database import Database
from srelu24.db.records import ChainStep, Evidence, Trial, TuningRecord
from srelu24.tuning import recheck, worker
from srelu24_gen import compile as compiler
from srelu24_gen import paths
from srelu24_gen.errors import RenderError, ToolchainError
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op
from srelu24_gen.target import TARGETS, Toolchain

SPGEMM = Family(Op.SPGEMM, DType.BF16)
CONFIG = KernelConfig(tile_m=128, stages=3)
OTHER = dataclasses.replace(CONFIG, cluster_m=1)
H200 = TARGETS["h200"]


def key_of(spec: KernelSpec) -> str:
    """Stands in for templates and compiler."""
    return f"key of {spec.name}"


@pytest.fixture(autouse=True)
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The database of the command line, empty, and keys that need no compiler."""
    (tmp_path / "shipped").mkdir()
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(paths, "shipped_records_dir", lambda: tmp_path / "shipped")
    monkeypatch.setattr(compiler, "key_of", key_of)
    return Database.open()


def record(m: int = 4096, config: KernelConfig = CONFIG, **changes: Any) -> TuningRecord:
    """A record whose kernel is today's, unless `digest` says otherwise."""
    key = key_of(KernelSpec(SPGEMM, config))
    evidence = {"ms": 1.0, "default_ms": 1.1, "samples": 20, "source_digest": key, "when": "2026-01-01T00:00:00Z"}
    names = {"digest": "source_digest"}
    evidence |= {names.get(n, n): changes.pop(n) for n in ("ms", "digest", "when", "versions") if n in changes}
    fields = {"family": SPGEMM, "n": 4096, "k": 16384, "arch": "sm_90a", "gpu": "h200", "density": 0.1}
    fields |= {"m": m, "config": config.to_dict(), "evidence": Evidence(**evidence)}
    return TuningRecord(**(fields | changes))


def trial(digest: str, config: KernelConfig = CONFIG, **changes: Any) -> Trial:
    fields = {"family": SPGEMM, "m": 8, "n": 4096, "k": 16384, "arch": "sm_90a", "gpu": "h200", "density": 0.1}
    fields |= {"config": config.to_dict(), "stage": "screen", "outcome": "ok", "source_digest": digest}
    return Trial(**(fields | changes))


def put(db: Database, *records: TuningRecord) -> None:
    for each in records:
        db.put(each)


def ship(db: Database, *records: TuningRecord) -> None:
    other = Database.open(user=db.user_file.with_name("maintainer.sqlite"))
    put(other, *records)
    other.export(db.shipped_folder)


def srelu24(*arguments: str, code: int = 0, typed: str | None = None) -> SimpleNamespace:
    result = CliRunner().invoke(main.app, ["db", *arguments], input=typed)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return SimpleNamespace(stdout=result.stdout, stderr=result.stderr)


def printed(*arguments: str, code: int = 0) -> Any:
    return json.loads(srelu24(*arguments, "--json", code=code).stdout)


# --- diff ---


def test_diff_tells_new_changed_faster_same_and_missing(db: Database, tmp_path: Path) -> None:
    ship(db, record(2, ms=3.0), record(3, ms=1.0), record(4), record(5), record(6, ms=3.0))
    faster, slower = record(2, OTHER, ms=2.0), record(3, ms=4.0, when="2026-02-01T00:00:00Z")
    put(db, record(1), faster, slower, record(4), record(6, density=0.5))
    expected = [
        (1, "new", None),
        (2, "config", 1.5),
        (3, "evidence", 0.25),
        (4, "same", 1.0),
        (5, "missing", None),
        (6, "evidence", None),  # timed on other data: the times say nothing
    ]
    found = printed("diff")
    assert [((d["yours"] or d["theirs"])["m"], d["what"], d["speedup"]) for d in found] == expected
    assert found[1]["yours"]["config"] == OTHER.to_dict()
    assert found[1]["theirs"]["config"] == CONFIG.to_dict()

    table = srelu24("diff")
    assert "1.500x" in table.stdout
    assert "0.250x" in table.stdout
    assert " 4x4096" not in table.stdout  # the same
    assert " 5x4096" not in table.stdout  # shipped, never tuned here
    assert table.stderr.strip() == "1 new, 1 with another config, 2 with other evidence, 1 the same, 1 only theirs"

    file = tmp_path / "theirs.json"
    Database.open(user=db.user_file.with_name("maintainer.sqlite")).export(file)
    assert printed("diff", str(file)) == printed("diff", str(db.shipped_folder)) == found
    assert " 5x4096" in srelu24("diff", str(file)).stdout


def test_diff_knows_a_default_left_out_from_another_config() -> None:
    short = record(config=CONFIG)
    del short.config["raster_group"]
    (found,) = health.diff([record()], [short])
    assert found.what == "evidence"
    (found,) = health.diff([record()], [msgspec.structs.replace(short, config={"tile_x": 1})])
    assert found.what == "config"


sides = st.dictionaries(st.integers(1, 9), st.tuples(st.sampled_from([CONFIG, OTHER]), st.floats(0.1, 10)))


@given(sides, sides)
def test_diff_seen_from_the_other_side_is_its_mirror(
    a: dict[int, tuple[KernelConfig, float]], b: dict[int, tuple[KernelConfig, float]]
) -> None:
    ours, theirs = ([record(m, config, ms=ms) for m, (config, ms) in side.items()] for side in (a, b))
    mirrored = {"new": "missing", "missing": "new"}
    forth, back = health.diff(ours, theirs), health.diff(theirs, ours)
    assert len(forth) == len(a.keys() | b.keys())
    for one, other in zip(forth, back, strict=True):
        assert (one.yours, one.theirs) == (other.theirs, other.yours)
        assert mirrored.get(one.what, one.what) == other.what
        if one.speedup is not None:
            assert other.speedup is not None
            assert one.speedup * other.speedup == pytest.approx(1)
    assert {d.what for d in health.diff(ours, ours)} <= {"same"}


@pytest.mark.parametrize("name", ["none.json", "text.json", "empty"])
def test_what_is_no_export_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.json").write_text("no records")
    (tmp_path / "empty").mkdir()
    for command in ("diff", "import"):
        result = srelu24(command, str(tmp_path / name), code=1)
        assert name in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""


# --- one GPU ---


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["stale"], ["show", "spgemm"]])
def test_an_unknown_gpu_is_one_line(db: Database, command: list[str]) -> None:
    put(db, record(1, gpu="of-my-own"))
    failed = srelu24(*command, "--gpu", "foo", code=1)
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: there is no GPU 'foo'; known are a10")
    assert "of-my-own" in failed.stderr
    if command != ["show", "spgemm"]:
        srelu24(*command, "--gpu", "h100")  # known, and without a record


# --- stale ---


def test_stale_names_what_changed_and_whose_it_is(db: Database) -> None:
    toolchain = Toolchain.find()
    same, other = {"nvrtc": toolchain.nvrtc_version}, {"nvrtc": "12.9.1", "cutlass": toolchain.cutlass_version}
    put(db, record(1), record(2, digest="older", versions=same), record(3, digest="older", versions=other))
    ship(db, record(4), record(5, digest="older", gpu="h100"))
    found = printed("stale")
    assert [(f["source"], f["record"]["m"], f["reason"]) for f in found] == [
        ("yours", 2, "kernel sources changed"),
        ("yours", 3, f"nvrtc was 12.9.1, is {toolchain.nvrtc_version}"),
        ("shipped", 5, "kernel sources changed"),
    ]
    assert [f["record"]["m"] for f in printed("stale", "--gpu", "h100")] == [5]
    table = srelu24("stale").stdout
    assert all(f"{m}x4096x16384" in table for m in (2, 3, 5))
    assert " 1x4096" not in table
    match = Database.open().find(record(2).problem, H200)
    assert match
    assert match.how == "exact"  # still a hint


def test_configs_that_differ_in_runtime_fields_are_one_binary_asked_for_once() -> None:
    calls: list[KernelSpec] = []

    def keys(spec: KernelSpec) -> str:
        calls.append(spec)
        return key_of(spec)

    records = [record(config=dataclasses.replace(CONFIG, raster_group=group)) for group in (1, 8, 16)]
    assert health.stale(records, keys) == []
    assert calls == [KernelSpec(SPGEMM, CONFIG)]


def test_a_kernel_this_version_cannot_make_is_stale_with_the_reason() -> None:
    unknown = msgspec.structs.replace(record(), config={"tile_x": 1})
    elsewhere = record(arch="sm_120a")

    def keys(spec: KernelSpec) -> str:
        if spec.arch == "sm_120a":
            raise RenderError("there is no template for it")
        return key_of(spec)

    found = health.stale([unknown, elsewhere, record()], keys)
    assert [each.row for each in found] == [unknown, elsewhere]
    assert "tile_x" in found[0].reason
    assert found[1].reason == "there is no template for it"


def test_without_a_toolchain_nothing_is_called_stale() -> None:
    def no_keys(spec: KernelSpec) -> str:
        raise ToolchainError("NVRTC is missing")

    with pytest.raises(ToolchainError, match="missing"):
        health.stale([record()], no_keys)


@given(st.booleans(), st.booleans())
def test_a_pair_is_stale_where_either_kernel_is(first: bool, second: bool) -> None:
    keys = [key_of(KernelSpec(SPGEMM, config)) for config in (CONFIG, OTHER)]
    digest = "+".join(key if fresh else "older" for key, fresh in zip(keys, (first, second), strict=True))
    pair = trial(digest, stage="pair", then=ChainStep(SPGEMM, 8, 16384, 4096, OTHER.to_dict()))
    assert bool(health.stale([pair], key_of)) == (not (first and second))


# --- prune ---


@pytest.fixture
def mixed(db: Database) -> Database:
    """Fresh and stale records and trials; the stale record hides a shipped one."""
    ship(db, record(1, OTHER), record(9, digest="older"))
    put(db, record(1, digest="older"), record(2))
    fresh = key_of(KernelSpec(SPGEMM, CONFIG))
    db.add_trial(trial("older"), trial(fresh), trial("older"), trial("", outcome="failed", reason="does not compile"))
    return db


def test_prune_drops_what_is_stale_and_nothing_else(mixed: Database) -> None:
    fresh = [t for t in mixed.all_trials() if t.source_digest != "older"]
    assert len(fresh) == 2
    report = printed("prune", "--yes")
    assert [each["row"]["m"] for each in report["records"]] == [1]
    assert (len(report["trials"]), report["dropped"]) == (2, 3)
    after = Database.open()
    assert [r.m for r in after.user_records()] == [2]
    assert after.all_trials() == fresh
    assert {r.m: r.config for r in after.records()}[1] == OTHER.to_dict()  # the shipped one answers again
    assert [r.m for r in after.shipped_records()] == [1, 9]
    assert "nothing to drop" in srelu24("prune").stderr
    assert printed("prune") == {"records": [], "trials": [], "dropped": 0}


@pytest.mark.parametrize(
    ("arguments", "typed", "dropped"),
    [(["--dry-run"], None, False), (["--dry-run", "--yes"], None, False), ([], "n\n", False), ([], "y\n", True)],
)
def test_prune_says_what_before_it_asks(
    mixed: Database, arguments: list[str], typed: str | None, dropped: bool
) -> None:
    result = srelu24("prune", *arguments, typed=typed)
    assert "1x4096x16384" in result.stdout
    assert "stale records: 1, stale trials: 2" in result.stderr
    assert ("nothing was dropped" in result.stderr) != dropped
    assert [r.m for r in mixed.user_records()] == ([2] if dropped else [1, 2])
    assert len(mixed.all_trials()) == (2 if dropped else 4)


def test_prune_without_an_answer_drops_nothing(mixed: Database) -> None:
    srelu24("prune", code=1, typed="")
    assert len(mixed.user_records()) == 2


# --- verify ---


class FakeGpu:
    """An H200 on which the kernels of some M are wrong."""

    target = H200

    def __init__(self, wrong: dict[int, str]) -> None:
        self.wrong = wrong
        self.ran: list[tuple[int, KernelConfig]] = []
        self.closed = False

    def check(self, record: TuningRecord, config: KernelConfig) -> str:
        self.ran.append((record.m, config))
        return self.wrong.get(record.m, "")

    def close(self) -> None:
        self.closed = True


def test_verify_runs_the_winners_of_this_gpu_and_ends_with_1_when_one_is_wrong(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu({2: "wrong result: [0, 0]"})
    monkeypatch.setattr(recheck, "GpuRunner", lambda: gpu)
    ship(db, record(1, OTHER), record(2), record(3, gpu="h100"))
    put(db, record(1), record(4, dataclasses.replace(CONFIG, stages=40)))
    verdicts = printed("verify", code=1)
    assert [(v["record"]["m"], v["outcome"]) for v in verdicts] == [(1, "right"), (2, "failed"), (4, "unusable")]
    assert verdicts[1]["detail"] == "wrong result: [0, 0]"
    assert "shared memory" in verdicts[2]["detail"]
    assert gpu.ran == [(1, CONFIG), (2, CONFIG)]  # the user's record hides the shipped one of M = 1
    assert gpu.closed
    table = srelu24("verify", code=1)
    assert "wrong result: [0, 0]" in table.stdout
    assert "right: 1, failed: 1, not usable by this version: 1" in table.stderr
    gpu.wrong.clear()
    srelu24("verify")


def test_verify_with_nothing_to_verify_says_so(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recheck, "GpuRunner", lambda: FakeGpu({}))
    put(db, record(gpu="h100"))
    assert "no record for NVIDIA H200" in srelu24("verify").stderr


def test_verify_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = srelu24("verify", code=1)
    assert len(result.stderr.splitlines()) == 1
    assert "srelu24 doctor" in result.stderr


def test_verify_without_torch_is_one_line() -> None:
    code = "import sys; sys.modules['torch'] = None; from srelu24.cli.main import app; app(['db', 'verify'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "srelu24 doctor" in done.stderr


class FakeWorker:
    """The parent's end of a child process that notes its jobs."""

    jobs: list[worker.Job]

    def __init__(self, device: str, step_seconds: float) -> None:
        self.jobs = []

    def run(self, job: worker.Job) -> Iterator[worker.Outcome]:
        self.jobs.append(job)
        (candidate,) = job.candidates
        if candidate.steps[0].problem.m == 2:
            yield worker.Failed(candidate.name, "no answer within 120 s; the kernel hangs")
        else:
            yield worker.Timed(candidate.name, 1.0, [1.0])


def test_a_winner_runs_in_a_child_on_data_of_its_own_density(monkeypatch: pytest.MonkeyPatch) -> None:
    from srelu24.runtime import dispatch

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: H200 if device.index == 1 else None)
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    runner = recheck.GpuRunner()
    assert runner.target == H200
    assert runner.check(record(1, density=0.5), OTHER) == ""
    assert "hangs" in runner.check(record(2), CONFIG)
    job = runner._worker.jobs[0]
    assert job.density == 0.5
    assert job.candidates[0].steps == (worker.Step(record(1).problem, OTHER),)
