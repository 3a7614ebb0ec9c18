"""Tables and plots say what the result files say, and the README says what they say."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from srelu24.bench.results import BenchFile, Candidate, Row, load_results
from srelu24.documents import pages, plots, registry
from srelu24_gen.errors import RecordError

ROOT = Path(__file__).resolve().parents[3]


def candidate(ms: float | None, **fields: Any) -> Candidate:
    values = {"tflops": None, "joules": None, "sm_mhz": None, "watts": None, "samples": 9, **fields}
    return Candidate(ms=ms, **values)


def ffn_row(shape: str, density: float = 0.1, ms: float = 5.2034, **speedup: float) -> Row:
    ours = candidate(ms, tflops=845.4, joules=3.456)
    others = {peer: candidate(ms * ratio) for peer, ratio in speedup.items()}
    return Row(
        op="ffn_forward",
        dtype="bf16",
        shape=shape,
        density=density,
        candidates={"srelu24": ours, **others},
        speedup=speedup,
        speed_of_light=0.957,
    )


def write(folder: Path, name: str, rows: list[Row], date: str = "2026-01-02T03:04:05+00:00", **env: Any) -> None:
    known = {"gpu": "NVIDIA H200", "date": date, "torch": "2.11.0", "commit": "0123456789abcdef", **env}
    BenchFile(env=known, rows=rows, python_overhead_us={"srelu24": 41.7, "eager": 30.2}).save(folder / name)


def cells(table: str) -> list[list[str]]:
    """Body cells of the first markdown table in a text."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_ffn_table(tmp_path: Path) -> None:
    rows = [ffn_row("16384x4096x16384", torch_compile=1.2543, eager=1.3), ffn_row("4096x8192x8192", torch_compile=1.1)]
    write(tmp_path, "h200/ffn.json", rows, power_limit_watts=700.0)
    text = registry.of_results(tmp_path)["ffn"]
    head, first, second = cells(text)
    assert dict(zip(head, first, strict=True))["MxDxF"] == "4096x8192x8192"  # fewest tokens first
    assert dict(zip(head, first, strict=True))["over eager"] == "-"
    assert dict(zip(head, second, strict=True)) == {
        "dtype": "bf16",
        "MxDxF": "16384x4096x16384",
        "density": "10%",
        "ms": "5.203",
        "TFLOP/s": "845",
        "J": "3.46",
        "over torch.compile": "1.25x",
        "over eager": "1.30x",
        "of light": "96%",
    }
    assert text.splitlines()[0] == "NVIDIA H200, 700 W, PyTorch 2.11.0, commit 0123456789, 2026-01-02:"


def test_the_newest_row_of_a_case_wins_whatever_its_file_is_called(tmp_path: Path) -> None:
    write(tmp_path, "b.json", [ffn_row("8x8x8", ms=1.0)], date="2026-01-01T00:00:00+00:00")
    write(tmp_path, "a.json", [ffn_row("8x8x8", ms=2.0)], date="2026-01-03T00:00:00+00:00")
    (result,) = load_results(tmp_path)
    assert result.row.candidates["srelu24"].ms == 2.0


def test_two_gpus_get_a_table_each(tmp_path: Path) -> None:
    write(tmp_path, "h100/ffn.json", [ffn_row("8x8x8")], gpu="NVIDIA H100")
    write(tmp_path, "h200/ffn.json", [ffn_row("8x8x8")])
    text = registry.of_results(tmp_path)["ffn"]
    assert text.index("NVIDIA H100,") < text.index("NVIDIA H200,")
    assert text.count("| dtype |") == 2


def test_a_candidate_without_a_time_says_why(tmp_path: Path) -> None:
    row = ffn_row("8x8x8", eager=1.5)
    row.candidates["cusparselt"] = candidate(None, error="no cuSPARSELt here")
    write(tmp_path, "ffn.json", [row])
    assert "10%: cusparselt has no time: no cuSPARSELt here" in registry.of_results(tmp_path)["ffn"]


def test_gemm_memory_and_overhead_tables(tmp_path: Path) -> None:
    gemm = Row(
        op="spgemm",
        dtype="bf16",
        shape="8x16x32",
        density=0.5,
        candidates={"srelu24": candidate(1.0, tflops=1100.0, joules=0.7, sm_mhz=1500.0, utilisation=0.68)},
        speedup={"cublas": 1.6, "cusparselt": 1.05},
    )
    memory = Row(
        op="sparsify24",
        dtype="bf16",
        shape="8x16x32",
        density=0.5,
        candidates={"srelu24": candidate(0.25, gbps=3600.0), "copy": candidate(0.3, gbps=4000.0)},
        speedup={},
    )
    write(tmp_path, "gemm.json", [gemm, memory])
    tables = registry.of_results(tmp_path)
    assert cells(tables["gemm"])[1] == [
        "GEMM2, sparse",
        "bf16",
        "8x16x32",
        "50%",
        "1.000",
        "1100",
        "0.70",
        "1500",
        "68%",
        "-",
        "1.600x",
        "1.050x",
    ]
    assert cells(tables["memory"])[1] == ["sparsify24", "bf16", "8x16x32", "50%", "0.250", "3600", "90%"]
    assert cells(tables["overhead"])[1] == ["42", "30"]
    assert tables["ffn"] == ""


def test_cutlass_table(tmp_path: Path) -> None:
    timed = {"srelu24": candidate(3.68, tflops=597.4), "cutlass": candidate(3.643)}
    case = {"dtype": "bf16", "shape": "16384x4096x16384", "density": 0.1}
    row = Row(op="spgemm_sm80_128x256_s5", candidates=timed, speedup={"cutlass": 0.9879}, **case)
    write(tmp_path, "h200/cutlass_sm80.json", [row, ffn_row("4096x8192x8192", eager=1.3)])
    head, *body = cells(registry.of_results(tmp_path)["cutlass"])
    assert body == [["128x256_s5", "bf16", "16384x4096x16384", "10%", "3.680", "597", "0.988x"]]
    assert head[-1] == "over CUTLASS"


def test_no_results_give_empty_tables(tmp_path: Path) -> None:
    assert set(registry.of_results(tmp_path).values()) == {""}
    assert set(registry.of_results(tmp_path / "nowhere").values()) == {""}


def test_fill_replaces_the_marked_sections_and_nothing_else(tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    write(results, "ffn.json", [ffn_row("8x8x8", eager=1.5)])
    readme.write_text(
        "before\n<!-- results:ffn -->\nold\n<!-- /results -->\nafter\n<!-- results:gemm -->\n<!-- /results -->\n"
    )
    assert pages.fill(readme, registry.of_results(results))
    text = readme.read_text()
    assert text.startswith("before\n<!-- results:ffn -->\nNVIDIA H200")
    assert text.endswith("<!-- /results -->\nafter\n<!-- results:gemm -->\nNot measured yet.\n<!-- /results -->\n")
    assert "old" not in text
    assert "| 1.50x |" in text
    assert not pages.fill(readme, registry.of_results(results))  # nothing left to change


def test_an_unknown_marker_is_refused_and_the_file_kept(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:ffm -->\n<!-- /results -->\n")
    with pytest.raises(RecordError, match=r"README\.md asks for results:ffm"):
        pages.fill(readme, registry.of_results(tmp_path))
    assert readme.read_text() == "<!-- results:ffm -->\n<!-- /results -->\n"


def test_a_damaged_result_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecordError, match=r"broken\.json"):
        registry.of_results(tmp_path)


def test_plot_shows_every_ratio_and_is_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [ffn_row("8x8x8", torch_compile=1.25, eager=1.31), ffn_row("8x8x8", 0.5, torch_compile=1.47)]
    write(tmp_path, "ffn.json", rows)
    first, second = tmp_path / "a" / "first.svg", tmp_path / "second.svg"
    plots.plot_ffn(tmp_path, first)
    plots.plot_ffn(tmp_path, second)
    assert first.read_bytes() == second.read_bytes()
    root = ElementTree.parse(first).getroot()
    assert root.tag.endswith("svg")
    # Text is drawn as paths; matplotlib leaves what they say in comments.
    svg = first.read_text()
    assert all(f"<!-- {label} -->" in svg for label in ("1.25", "1.31", "1.47", "over torch.compile", "8x8x8"))


def test_plot_without_results_says_what_to_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RecordError, match="srelu24 bench ffn"):
        plots.plot_ffn(tmp_path, tmp_path / "x.svg")


@pytest.mark.parametrize(("page", "table"), [("README.md", "ffn"), ("docs/benchmarks.md", "gemm")])
def test_the_pages_are_what_the_result_files_give(tmp_path: Path, page: str, table: str) -> None:
    """Stale tables: run `srelu24 bench report --results docs/results`."""
    copy = Path(shutil.copy(ROOT / page, tmp_path))
    assert f"<!-- results:{table} -->" in copy.read_text(encoding="utf-8")
    assert not pages.fill(copy, registry.of_results(ROOT / "docs" / "results"))


def test_every_name_is_of_one_table_and_every_marker_of_the_documents_has_one() -> None:
    sources = (registry.RESULTS, registry.RECORDS, registry.ACCURACY, registry.ABLATION, registry.SUPPORT)
    known = [name for makers in sources for name in makers]
    assert len(known) == len(set(known))
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert set(re.findall(r"<!-- results:([\w-]+) -->", page.read_text(encoding="utf-8"))) <= set(known), page
