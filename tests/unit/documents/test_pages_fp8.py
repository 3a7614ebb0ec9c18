"""The figure and the tables of the 8-bit FFN, from results that are made up here, and what has to be built for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from srelu24.bench.results import BenchFile, Candidate, Row
from srelu24.documents import plots, registry
from srelu24.shipping import catalogue
from srelu24_gen import space
from srelu24_gen.errors import RecordError
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, Op
from srelu24_gen.target import TARGETS

ENV = {"gpu": "NVIDIA H200", "date": "2026-01-01T00:00:00+00:00"}


def row(op: str, recipe: str | None, density: float = 0.1, **ms: float) -> Row:
    def candidate(time: float) -> Candidate:
        return Candidate(ms=time, tflops=None, joules=None, sm_mhz=None, watts=None, samples=9)

    speedup = {name: time / ms["srelu24"] for name, time in ms.items() if name != "srelu24"}
    candidates = {name: candidate(time) for name, time in ms.items()}
    return Row(
        op=op,
        dtype="fp8_e4m3",
        shape="2048x8192x32768",
        density=density,
        candidates=candidates,
        speedup=speedup,
        recipe=recipe,
    )


ROWS = [
    row("gemm_relu2_24", "rowwise", srelu24=2.1, cublas=2.0),
    row("gemm_relu2_24", "predicted", srelu24=1.9, cublas=2.0),
    row("spgemm", None, srelu24=1.0, cublas=1.8, cusparselt=1.1),
    row("ffn_forward", "rowwise", srelu24=3.5, torch_compile=4.2),
    row("ffn_forward", "static", srelu24=3.0, torch_compile=4.2),
]


def saved(folder: Path, *rows: Row) -> Path:
    BenchFile(env=ENV, rows=list(rows)).save(folder / "h200" / "fp8.json")
    return folder


def test_parts_are_the_gemms_and_what_is_left() -> None:
    parts = plots.parts_of(ROWS)[2048]
    assert parts["torch.compile"] == pytest.approx((2.0, 0.4, 1.8))
    assert parts["rowwise"] == pytest.approx((2.1, 0.4, 1.0))
    assert parts["static"] == pytest.approx((1.9, 0.1, 1.0))
    assert plots.parts_of(ROWS[1:])[2048].keys() == {"torch.compile", "static"}


def test_figure_beside_the_papers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "results", *ROWS, row("ffn_forward", "static", 0.5, srelu24=3.0, torch_compile=4.0))
    assert "results/fp8.svg" in registry.of_results(folder)["fp8_figure"]
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    plots.plot_recipes(folder, first)
    plots.plot_recipes(folder, second)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text(encoding="utf-8")
    for words in ("D = 8192, F = 32768, 10%", "paper 1.23x", "1.40x", "1.20x", "linear1"):
        assert words in text
    assert "50%" not in text
    none = saved(tmp_path / "none", row("spgemm", None, srelu24=1.0))
    assert not registry.of_results(none)["fp8_figure"]
    with pytest.raises(RecordError, match="bench fp8"):
        plots.plot_recipes(none, first)


def test_everything_the_recipes_launch_can_be_built_ahead() -> None:
    target, shape = TARGETS["h200"], Shape(4096, 8192, 8192)
    chosen = catalogue.specs_for([shape], DType.E4M3, target)
    assert [spec.family.op for spec in chosen] == [
        Op.GEMM_RELU2_24, Op.SPGEMM, Op.QUANTIZE_ROWS, Op.GEMM_RELU2_24, Op.SQUARE_ROWS
    ]  # fmt: skip
    every = catalogue.specs_for([shape], DType.E4M3, target, every_candidate=True)
    assert {spec.digest for spec in chosen} < {spec.digest for spec in every}
    assert all(space.supports_config(spec.family, spec.config, target).ok for spec in every)
