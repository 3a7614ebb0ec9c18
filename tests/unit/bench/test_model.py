"""The prefill benchmark on a tiny stack: what is timed is right, at the density asked for, and compiled once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from srelu24.bench import model as bench_model
from srelu24.bench.results import BenchFile
from srelu24.documents import registry
from srelu24.nn.profiling import profile
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import DType

TOKENS = (16, 24, 40, 64, 48)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled by Dynamo and AOTAutograd, which decide how many graphs there are; Inductor would only take time."""
    path = tmp_path_factory.mktemp("results") / "cpu" / "model.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        bench_model.bench_model(bench_model.TINY, TOKENS, seconds=0.05, json_path=path, device="cpu")
    return path


def test_a_row_for_every_mode_and_token_count(path: Path) -> None:
    rows = BenchFile.load(path).rows
    assert [(row.op, int(row.shape.split("x")[0])) for row in rows] == [
        (f"prefill_{mode}", m) for m in TOKENS for mode in bench_model.MODES
    ]
    for row in rows:
        dense, ours = row.candidates["dense"], row.candidates["srelu24"]
        assert ours.tokens_per_s == pytest.approx(int(row.shape.split("x")[0]) / ours.ms * 1000)
        assert row.speedup["dense"] > 0
        assert dense.samples == ours.samples >= 5


def test_nothing_is_recompiled_for_five_token_counts(path: Path) -> None:
    rows = [row for row in BenchFile.load(path).rows if row.op == "prefill_compiled"]
    assert {c.graphs for row in rows for c in row.candidates.values()} == {1}


def test_the_report_has_the_table(path: Path) -> None:
    table = registry.of_results(path.parent)["model"]
    assert len([line for line in table.splitlines() if line.startswith("| tiny, 2 layers")]) == 2 * len(TOKENS)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_stack_has_the_density_asked_for(density: float) -> None:
    wide = bench_model.Architecture("wide", 256, 1024, layers=2, heads=4, kv_heads=2)
    stack = bench_model.make_stack(wide, DType.BF16, density, "cpu")
    with torch.no_grad():
        layers = profile(stack, torch.randn(1, 64, 256).bfloat16()).layers
    assert [layer.density for layer in layers] == pytest.approx([density] * 2, abs=0.03)


def test_wrong_outputs_and_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="at least one, of 2 or more"):
        bench_model.bench_model(bench_model.TINY, [], device="cpu")
    # A stack that was not pruned is not what the reference says.
    monkeypatch.setattr(bench_model, "convert", lambda model: None)
    with pytest.raises(Unsupported, match="converted stack is wrong"):
        bench_model.bench_model(bench_model.TINY, [16], density=0.5, device="cpu")
