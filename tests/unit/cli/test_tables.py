"""Every table that the commands print: at most eight columns, and no word broken, at 80 columns and more."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.text import Text

from rows import CONFIG, record
from srelu24.bench.results import Candidate, Row
from srelu24.cli import record_views, views
from srelu24.cli.doctor import Check, Status
from srelu24.cli.table import Table
from srelu24.db.fit import Quality
from srelu24.db.health import Difference, Stale
from srelu24.db.records import DenseTime, TuningRecord
from srelu24.db.rekey import Rekeyed
from srelu24.documents import support
from srelu24.tuning.recheck import Verdict
from srelu24_gen import cost, models
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelConfig, KernelSpec, Producer, config_text
from srelu24_gen.target import TARGETS

H200 = TARGETS["h200"]
SHAPE = Shape(16384, 24576, 6144)
HIDDEN = SHAPE.step_gemms(DType.BF16, b1=True)[0]
LONGEST = KernelConfig(128, 256, 64, cluster_m=2, stages=4, producer=Producer.WARPGROUP, stream_k=True, raster_group=16)
CONFIG_TEXT = config_text(HIDDEN.family.op, LONGEST)
REASON = (
    "nvrtc was 12.9.1, is 13.0.88; the kernel of /u/.cache/srelu24/sm_90a/gemm_relu2_24_bf16_count_tokens_permuted "
    "no longer compiles: CUDA_ERROR_MISALIGNED_ADDRESS in srelu24::sm90::consume<MainloopStreamK, EpilogueRelu2>"
)
PATH = "/opt/environments/production/lib/python3.11/site-packages/nvidia/cuda_runtime/include"
KERNEL = KernelSpec(HIDDEN.family, LONGEST).name


def longest_record(config: dict[str, object] = LONGEST.to_dict()) -> TuningRecord:  # noqa: B008
    made = record(HIDDEN.m, HIDDEN.n, HIDDEN.k, family=HIDDEN.family, gpu="rtx-pro-6000", config=config)
    made.evidence.dense["cublas"] = DenseTime(12345.678, 1.2345, 1.2)
    return made


def kernels() -> tuple[Table, list[str]]:
    row = {
        "family": HIDDEN.family.name,
        "op": HIDDEN.family.op.value,
        "config": LONGEST.to_dict(),
        "chosen": True,
        "source": "interpolated",
        "built": True,
        "recorded": True,
        "predicted_us": 123456.7,
        "bound": "tensor cores",
    }
    title = f"{SHAPE} bf16 on NVIDIA RTX PRO 6000 Blackwell Server Edition, times as predicted"
    texts = [HIDDEN.family.name, CONFIG_TEXT, "interpolated", "recorded", "123457", "tensor cores", title]
    return views.kernels_table([row, {**row, "chosen": False, "source": None}], title), texts


def built() -> tuple[Table, list[str]]:
    numbers = {"registers": 168, "spill_bytes": 12345, "smem_bytes": 233472, "seconds": 123.456, "from_cache": True}
    rows = [{"name": KERNEL, "error": "", **numbers}, {"name": KERNEL, "error": REASON}]
    return views.built_table(rows), [KERNEL, REASON, "168", "12345", "233472", "123.46", "from the cache"]


def bench() -> tuple[Table, list[str]]:
    peers = ("srelu24", "torch_compile", "dense_fused", "unfused", "cusparselt", "eager", "cublas", "promoted")
    numbers = {"ms": 12345.678, "tflops": 1234.5, "joules": 1234.56, "sm_mhz": 1500.0, "watts": 700.0, "samples": 9}
    candidates = {name: Candidate(**numbers) for name in peers}
    candidates["copy"] = Candidate(**{**numbers, "tflops": None}, gbps=4567.8)
    candidates["broken"] = Candidate(**dict.fromkeys(numbers, None) | {"samples": 0}, error=REASON, note="direct calls")
    row = Row(
        op="config_hidden_gradient",
        dtype="fp8_e4m3",
        shape=str(SHAPE),
        density=0.1,
        recipe="predicted",
        candidates=candidates,
        speedup=dict.fromkeys(peers[1:], 1.2345),
        speed_of_light=0.957,
    )
    return views.bench_table([row, row]), [*candidates, row.op, str(SHAPE), "12345.678", "1.234x", "96%", REASON]


def doctor() -> tuple[Table, list[str]]:
    checks = [
        Check("CUTLASS headers", Status.OK, f"4.2.0, {PATH}"),
        Check("tuning database", Status.WARN, f"383 records; yours are kept in {PATH}; {REASON}", f"remove {PATH}"),
        Check("a check", Status.FAIL, "found [this]", "do [that]"),
    ]
    return views.doctor_table(checks), [text for c in checks for text in (c.name, c.status.value, c.found, c.mend)]


def known_models() -> tuple[Table, list[str]]:
    known = models.MODELS.values()
    return views.models_table(known), [text for m in known for text in (m.key, m.name, str(m.d_model), m.note)]


def supported() -> tuple[Table, list[str]]:
    rows = support.matrix()
    names = [text for row in rows for text in (row["gpu"], row["name"], row["arch"], row["product"], row["kernels"])]
    return views.support_table(rows), names


def records() -> tuple[Table, list[str]]:
    made = longest_record()
    sizes = f"{HIDDEN.m}x{HIDDEN.n}x{HIDDEN.k}"
    texts = [made.gpu, HIDDEN.family.name, sizes, CONFIG_TEXT, "10%", "1.100x", "1.234x", made.evidence.when]
    return record_views.records_table([made, made]), texts


def differences() -> tuple[Table, list[str]]:
    made, other = longest_record(), longest_record(CONFIG.to_dict())
    table = record_views.differences_table(
        [Difference("config", made, other, 1.5), Difference("new", made, None), Difference("missing", None, other)]
    )
    return table, [made.gpu, str(HIDDEN), CONFIG_TEXT, config_text(HIDDEN.family.op, CONFIG), "config", "1.500x"]


def stale() -> tuple[Table, list[str]]:
    made = longest_record()
    table = record_views.stale_table([("shipped", Stale(made, REASON))])
    return table, [made.gpu, str(HIDDEN), "shipped", CONFIG_TEXT, made.evidence.when, REASON]


def rekeyed() -> tuple[Table, list[str]]:
    made = longest_record()
    return record_views.rekeyed_table([Rekeyed(made, "failed", REASON)]), [made.gpu, str(HIDDEN), CONFIG_TEXT, REASON]


def verdicts() -> tuple[Table, list[str]]:
    made, newer = longest_record(), longest_record({"tile_m": 128, "of_a_later_version": True})
    table = record_views.verdicts_table([Verdict(made, "failed", REASON), Verdict(newer, "unusable", REASON)])
    return table, [made.gpu, str(HIDDEN), CONFIG_TEXT, "unusable", "of_a_later_version", REASON]


def fitted() -> tuple[Table, list[str]]:
    quality, constants = Quality(123, 0.0456, -0.0123, 0.0045, 0.0987), cost.CONSTANTS["h200"]
    table = record_views.fit_table(TARGETS["rtx5090"], quality, quality, constants, constants)
    return table, [f.name for f in dataclasses.fields(constants)] + ["4.56%", "times off, root mean square"]


TABLES = [
    kernels, built, bench, doctor, known_models, supported, records, differences, stale, rekeyed, verdicts, fitted
]  # fmt: skip


def printed(table: Table, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table, crop=False)
    return stream.getvalue()


def words(text: str) -> set[str]:
    """What stands between blanks and the lines of a table, without the punctuation around it."""
    return {word.strip("(),:;") for word in text.replace("│", " ").replace("┃", " ").split()}


@pytest.mark.parametrize("width", [80, 100, 150])
@pytest.mark.parametrize("make", TABLES)
def test_no_word_of_a_table_is_broken(make: Callable[[], tuple[Table, list[str]]], width: int) -> None:
    table, texts = make()
    assert len(table.columns) <= 8
    shown = printed(table, width)
    whole = words(shown)
    for text in texts:
        broken = words(text) - whole
        assert not broken, f"{broken} in\n{shown}"
    for line in shown.splitlines():
        assert len(line) <= width or len(line.split()) == 1, f"wider than {width}: {line}"


def test_output_that_goes_elsewhere_is_80_columns_wide(capsys: pytest.CaptureFixture[str]) -> None:
    table, _ = kernels()
    views.show(table)
    assert capsys.readouterr().out == printed(table, 80)


def test_rows_stand_under_their_heading_and_numbers_to_the_right() -> None:
    table = Table("title", ("name", "count of things"), right=(1,))
    table.add_heading("first")
    table.add_row("one", "1", details=("a long detail of this row", ""))
    table.add_heading("first")
    table.add_row(Text("two", "green"), "12")
    assert [line.plain for line in table.lines(20)] == [
        "title",
        "  name      count of",
        "              things",
        "  ──────────────────",
        "first",
        "  one              1",
        "      a long detail",
        "      of this row",
        "  two             12",
    ]
    assert table.rows == [("one", "1"), ("two", "12")]
    with pytest.raises(ValueError, match="2 columns"):
        table.add_row("three")
