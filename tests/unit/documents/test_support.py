"""The support matrix, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

from srelu24.documents import pages, registry, support

PAGE = Path(__file__).parents[3] / "docs" / "support.md"


def test_every_gpu_has_an_answer_for_every_product() -> None:
    rows = support.matrix()
    answers = {(row["gpu"], row["dtype"], row["product"]): row["kernels"] for row in rows}
    assert len(answers) == len(rows)
    assert answers["h200", "bf16", "spgemm"] == answers["h100", "e4m3", "spgemm"] == "native"
    assert answers["a100", "bf16", "spgemm"] == answers["rtx5090", "fp16", "gemm_relu2_24"] == "portable"
    assert answers["a100", "e4m3", "spgemm"] == answers["a100", "bf16", "training step"] == "dense"


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    copy = tmp_path / "support.md"
    copy.write_text(PAGE.read_text())
    assert not pages.fill(copy, registry.of_gpus()), "run: srelu24 list --matrix --page docs/support.md"
