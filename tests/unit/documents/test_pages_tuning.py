"""Tables and plot about tuning, from results that are made up here, and the page that the shipped ones fill."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from srelu24.bench.results import BenchFile, Candidate, Row
from srelu24.db.database import Database
from srelu24.db.records import DenseTime, Evidence, TuningRecord
from srelu24.documents import pages, plots, registry
from srelu24_gen import paths, space
from srelu24_gen.errors import RecordError
from srelu24_gen.models import MODELS, Pass, Shape
from srelu24_gen.spec import DType
from srelu24_gen.target import TARGETS

ROOT = Path(__file__).parents[3]
ENV = {"gpu": "NVIDIA H200", "date": "2026-01-01T00:00:00+00:00"}


def row(op: str, shape: str, ms: dict[str, float], note: str = "") -> Row:
    def candidate(time: float) -> Candidate:
        return Candidate(ms=time, tflops=None, joules=None, sm_mhz=None, watts=None, samples=9)

    found = Row(
        op=op,
        dtype="bf16",
        shape=shape,
        density=0.1,
        candidates={name: candidate(time) for name, time in ms.items()},
        speedup={name: time / ms["srelu24"] for name, time in ms.items() if name != "srelu24"},
    )
    if note:
        found.candidates["srelu24"].note = note
    return found


def saved(folder: Path, *rows: Row) -> Path:
    BenchFile(env=ENV, rows=list(rows)).save(folder / "h200" / "some.json")
    return folder


def test_tuning_and_fallback_tables_name_mean_and_worst(tmp_path: Path) -> None:
    tables = registry.of_results(
        saved(
            tmp_path,
            row("tuning", "512x64x256", {"srelu24": 1.0, "default": 1.21}),
            row("tuning", "8192x64x256", {"srelu24": 2.0, "default": 2.0}),
            row("fallback", "1024x64x256", {"srelu24": 1.0, "tuned": 0.98}),
        )
    )
    assert "NVIDIA H200, 2 shapes: geometric mean 1.100x, worst 1.000x (8192x64x256)." in tables["tuning"]
    assert "| bf16 | 512x64x256 | 10% | 1.000 | 1.210 | 1.210x |" in tables["tuning"]
    assert "1 shapes: geometric mean 0.980x, worst 0.980x (1024x64x256)." in tables["fallback"]
    assert tables["sweep"] == tables["ffn"] == ""


def test_search_table_has_times_in_seconds(tmp_path: Path) -> None:
    def search(op: str, shape: str, cold: float, warm: float) -> Row:
        found = row(op, shape, {"srelu24": 1.0, "from_nothing": 1000 * cold, "warm": 1000 * warm})
        del found.candidates["srelu24"]
        found.speedup = {"from_nothing": 1.05, "warm": 1.04}
        return found

    shape = "512x64x256"
    table = registry.of_results(
        saved(tmp_path, search("search", shape, 64.2, 24.4), search("search_step", shape, 80, 30))
    )
    assert "| FFN | bf16 | 512x64x256 | 64 s | 9 | 1.050x | 24 s | 9 | 1.040x |" in table["search"]
    assert "| training step | bf16 | 512x64x256 | 80 s | 9 | 1.050x | 30 s | 9 | 1.040x |" in table["search"]


def sweep(m: int, sparse: float, chosen: str) -> Row:
    ms = {"sparse": sparse, "cublas": 2.0, "mixed": 1.9, "gemm": 2.2, "torch_compile": 2.1}
    return row("sweep", f"{m}x64x256", {"srelu24": ms[chosen], **ms}, note=chosen)


def test_sweep_table_and_plot(tmp_path: Path) -> None:
    folder = saved(tmp_path, sweep(16, 2.4, "mixed"), sweep(4096, 1.5, "sparse"))
    table = registry.of_results(folder)["sweep"]
    assert "| bf16 | 16x64x256 | 10% | 1.900 | 0.88x | 1.11x | 1.11x | mixed |" in table
    assert "| bf16 | 4096x64x256 | 10% | 1.500 | 1.40x | 1.11x | 1.40x | sparse |" in table
    assert "(results/sweep.svg)" in table, "bench report draws it there"
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    plots.plot_sweep(folder, first)
    plots.plot_sweep(folder, second)
    assert first.read_bytes() == second.read_bytes()
    for words in ("D = 64, F = 256 on NVIDIA H200", "chosen", "tokens"):
        assert words in first.read_text()
    with pytest.raises(RecordError, match="bench sweep"):
        plots.plot_sweep(saved(tmp_path / "none", row("tuning", "1x8x8", {"srelu24": 1.0})), first)


def records(shape: Shape, dense: dict[str, DenseTime], which: Pass = Pass.FORWARD) -> list[TuningRecord]:
    evidence = Evidence(
        ms=1.0,
        default_ms=1.1,
        pair_ms=2.0,
        pair_default_ms=2.2,
        dense=dense,
        samples=20,
        sm_mhz=1500.0,
        source_digest="0123456789",
        when="2026-01-01T00:00:00Z",
    )
    return [
        TuningRecord(
            family=p.family,
            m=p.m,
            n=p.n,
            k=p.k,
            arch="sm_90a",
            gpu="h200",
            config=space.default(p, TARGETS["h200"]).to_dict(),
            density=0.1,
            evidence=evidence,
        )
        for p in shape.gemms_of(which, DType.BF16)
    ]


def test_coverage_names_every_model_and_the_evidence_every_pair() -> None:
    full = records(Shape(2048, 4096, 16384), {"cublas": DenseTime(2.6, 1.3, 1.29), "gemm": DenseTime(2.5, 1.25, 1.24)})
    bare = records(Shape(512, 768, 3072), {})
    half = records(Shape(8192, 768, 3072), {})[:1]
    tables = registry.of_records([*full, *bare, *half])
    lines = {
        line.split(" | ")[0].strip("| "): line for line in tables["coverage"].splitlines() if line.startswith("| ")
    }
    assert set(lines) == {"model", "---", *(key for key, m in MODELS.items() if m.d_ff <= 32768)}
    assert lines["paper-7b"] == "| paper-7b | 4096x16384 | - | 1.25x | - | - |"
    assert lines["nemotron-3-8b"].endswith("| - | 1.25x | - | - |"), "models of one width share records"
    assert lines["nanochat"] == "| nanochat | 768x3072 | yes | - | - | - |"
    assert "h200, bf16: 4 of 72." in tables["coverage"]
    assert len([line for line in tables["evidence"].splitlines() if "x" in line and line.startswith("| ")]) == 3
    assert "| 2.000 | 1.100x | 2.500 (gemm) | 1.240 | 20 | 1500 | 01234567 | 2026-01-01 |" in tables["evidence"]
    assert set(tables) == {"coverage", "evidence", "step_coverage", "step_evidence"}
    assert not tables["step_coverage"]
    assert not any(registry.of_records([]).values())


def test_training_steps_are_tables_of_their_own() -> None:
    full = records(Shape(2048, 4096, 16384), {}, Pass.BACKWARD)
    half = records(Shape(8192, 768, 3072), {}, Pass.BACKWARD)[:4]
    tables = registry.of_records([*full, *half])
    assert not tables["coverage"] + tables["evidence"]
    lines = tables["step_coverage"].splitlines()
    assert "| paper-7b | 4096x16384 | - | 1.100x | - | - |" in lines
    assert "| nanochat | 768x3072 | - | - | - | - |" in lines, "four of five GEMMs are no step"
    head, _, only = (line.split(" | ") for line in tables["step_evidence"].splitlines() if line.startswith("| "))
    assert len(head) == len(only)
    assert head[1:6] == ["hidden", "product", "hidden gradient", "dW1", "dW2"]
    assert only[0] == "| 2048x4096x16384"
    assert only[-6:] == ["2.000", "1.100x", "20", "1500", "01234567", "2026-01-01 |"]


def test_the_page_about_tuning_is_what_records_and_results_give(tmp_path: Path) -> None:
    """After `srelu24 tune --ship tuning_db` or `bench tuning` run `srelu24 db coverage`."""
    page = ROOT / "docs" / "tuning.md"
    copy = tmp_path / "tuning.md"
    copy.write_text(page.read_text())
    shipped = Database.open(paths.shipped_records_dir(), tmp_path / "none.sqlite").shipped_records()
    tables = registry.of_records(shipped) | registry.of_results(ROOT / "docs" / "results")
    assert not pages.fill(copy, tables)
    assert "<!-- results:coverage -->" in page.read_text()


def test_the_held_out_models_have_the_ratios_that_were_measured() -> None:
    text = (ROOT / "docs" / "performance-log.md").read_text()
    listed = re.findall(r"^\| `(held_out_\w+\.json)` \| [^|]* \| ([^|]*) \|", text, re.MULTILINE)
    folder = ROOT / "docs" / "measurements"
    assert {name for name, _ in listed} == {path.name for path in folder.glob("held_out_*.json")}
    for name, ratios in listed:
        rows = BenchFile.load(folder / name).rows
        assert [row.shape.split("x")[0] for row in rows] == ["192", "384", "768", "1536"]
        assert ratios.replace("*", "").split() == [f"{row.speedup['tuned']:.3f}" for row in rows]
