"""The command line: what it accepts, what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from command_line import SMALL, srelu24
from srelu24.bench import results
from srelu24.cli import doctor, main
from srelu24.cli import run as main_job
from srelu24.db import database
from srelu24.db.records import Evidence, TuningRecord
from srelu24.shipping import catalogue
from srelu24_gen import compile as compiler
from srelu24_gen import render, space
from srelu24_gen.errors import CompileError, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import WIDE_TYPES, Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem, config_text
from srelu24_gen.target import target_by_key

H200 = target_by_key("h200")


@pytest.fixture(autouse=True)
def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRELU24_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))


STATIC_SMEM = 64


def built_kernel(spec: KernelSpec) -> compiler.BuiltKernel:
    meta: dict[str, Any] = dict.fromkeys(compiler.KernelMeta.__struct_fields__, "")
    meta |= {"registers": 168, "stack_bytes": 0, "spill_bytes": 0, "static_smem": STATIC_SMEM, "warnings": []}
    meta |= {"compile_seconds": 1.25, "abi": 1, "cubin_bytes": 0, "family": {}, "config": {}, "name": spec.name}
    return compiler.BuiltKernel(spec, b"", compiler.KernelMeta(**meta), None, from_cache=False)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """Stands in for NVRTC; answers the list of what was asked of it."""
    calls: list[KernelSpec] = []

    def build_many(specs: list[KernelSpec], *, on_done: Callable[..., None], **_: Any) -> list[compiler.BuiltKernel]:
        calls.extend(specs)
        outcomes = [built_kernel(spec) for spec in specs]
        for spec, outcome in zip(specs, outcomes, strict=True):
            on_done(spec, outcome)
        return outcomes

    monkeypatch.setattr(compiler, "build_many", build_many)
    return calls


def put_record(config: KernelConfig, problem: Problem | None = None, gpu: str = "h200") -> TuningRecord:
    problem = problem or SMALL.gemms(DType.BF16)[0]
    record = TuningRecord(
        family=problem.family,
        m=problem.m,
        n=problem.n,
        k=problem.k,
        arch="sm_90a",
        gpu=gpu,
        config=config.to_dict(),
        density=0.1,
        evidence=Evidence(ms=2.0, default_ms=2.5, samples=10, source_digest="0" * 16, when="2026-01-01T00:00:00Z"),
    )
    database.Database.open().put(record)
    return record


# --- shapes and problems -------------------------------------------------------------------------------------


def test_list_matrix_says_which_gpu_has_what() -> None:
    rows = json.loads(srelu24("list", "--matrix", "--json").stdout)
    assert {"native", "portable", "dense"} == {row["kernels"] for row in rows}
    lines = srelu24("list", "--matrix").stdout.splitlines()
    place = next(place for place, line in enumerate(lines) if line.split() == ["l40s", "NVIDIA", "L40S", "sm_89"])
    assert lines[place + 1].startswith("    portable: gemm (bf16, fp16)")


def test_problems_of_an_ffn_have_the_sizes_of_its_two_gemms() -> None:
    first, second = Shape(2, 24, 56).gemms(DType.FP16)
    # X [M, D] times W1 [F, D], then S [M, F] times W2 [D, F].
    assert (first.m, first.n, first.k) == (2, 56, 24)
    assert (second.m, second.n, second.k) == (2, 24, 56)
    assert first.flops == second.flops == 2 * 2 * 24 * 56
    assert all(space.supports_problem(problem, H200).ok for problem in (first, second))


# --- commands that need no GPU --------------------------------------------------------------------------------------


def test_render_prints_the_source_of_the_default_kernel() -> None:
    problem = Problem(Family(Op.SPGEMM, DType.FP16, bias=True), SMALL.m, SMALL.d, SMALL.f)
    spec = KernelSpec(problem.family, space.default(problem, H200))
    out = srelu24("render", "spgemm", "--dtype", "fp16", "--bias", "--shape", str(SMALL), "--gpu", "h200").stdout
    assert out == render.render(spec).source


def test_render_takes_fields_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "kernel.cu"
    fields = "tile_m=128, producer=warpgroup,stages=3"
    out = srelu24("render", "gemm_relu2_24", "--gpu", "h200", "--config", fields, "-o", str(file)).stdout
    assert out == ""
    source = file.read_text()
    assert "gemm_relu2_24_bf16_sm_90a_128x256x64_c2_s3_wg" in source


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--config", "tile_m=100"], "a tile of 100x256 is not one of 64x128"),
        (["--config", "tile=1"], "unknown field"),
        (["--config", "stages=many"], "stages"),
        (["--count"], "non-zeros"),
        (["--shape", "16x20x64"], "multiple of 8"),
        (["--gpu", "b200"], "b200"),
        (["-o", "/proc/no/such/folder/kernel.cu"], "cannot be written"),
    ],
)
def test_render_says_in_one_line_what_is_wrong(arguments: list[str], reason: str) -> None:
    result = srelu24("render", "gemm", *arguments, code=1)
    assert result.stdout == ""
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--shape", "12x"], ["--config", "tile_m"], ["--dtype", "fp64"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert arguments[0] in srelu24("render", "gemm", *arguments, code=2).stderr or arguments[0] == "--config"


def test_debug_lets_the_error_through() -> None:
    result = CliRunner().invoke(main.app, ["--debug", "render", "gemm", "--gpu", "b200"])
    assert isinstance(result.exception, Unsupported)


def test_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "kernels", interrupted)
    assert len(srelu24("list", code=130).stderr.splitlines()) == 1


def test_version_is_the_package_version() -> None:
    assert srelu24("--version").stdout.split() == ["srelu24", main.__version__]


def test_list_marks_chosen_built_and_recorded() -> None:
    problem = SMALL.gemms(DType.BF16)[0]
    recorded = space.candidates(problem, H200)[-1]
    put_record(recorded)
    put_record(space.candidates(problem, H200)[1], gpu="h100")

    rows = json.loads(srelu24("list", "--gpu", "h200", "--shape", str(SMALL), "--json").stdout)

    families = {row["family"] for row in rows}
    unfused = {"sparsify24_bf16_relu2", "sparsify24_bf16"}
    assert families == {"gemm_relu2_24_bf16", "spgemm_bf16", "gemm_bf16_relu2", "gemm_bf16"} | unfused
    for family in families:
        assert sum(row["chosen"] for row in rows if row["family"] == family) == 1
    assert [row["config"] for row in rows if row["recorded"]] == [recorded.to_dict()]
    chosen = next(row for row in rows if row["chosen"] and row["family"] == problem.family.name)
    assert chosen["config"] == recorded.to_dict()
    assert chosen["source"] == "exact"
    assert not any(row["built"] for row in rows)


def test_list_names_every_candidate_in_the_table() -> None:
    out = srelu24("list", "--gpu", "h200", "--shape", str(SMALL)).stdout
    of_first = out.split(SMALL.gemms(DType.BF16)[0].family.name)[1].split(SMALL.gemms(DType.BF16)[1].family.name)[0]
    candidates = space.candidates(SMALL.gemms(DType.BF16)[0], H200)
    shown = [line for line in of_first.splitlines() if "cluster" in line]
    assert len(shown) == len(candidates)
    assert all(any(config_text(Op.GEMM_RELU2_24, config) in line for line in shown) for config in candidates)


def test_build_reports_each_binary_once(no_compiler: list[KernelSpec]) -> None:
    other = Shape(SMALL.m * 64, SMALL.d, SMALL.f)
    arguments = ["--gpu", "h200", "--shape", str(SMALL), "--shape", str(other), "--all", "--json"]
    rows = json.loads(srelu24("build", *arguments).stdout)

    assert [row["name"] for row in rows] == [spec.name for spec in no_compiler]
    assert len({spec.digest for spec in no_compiler}) == len(no_compiler)
    wanted = {
        KernelSpec(problem.family, config).digest
        for shape in (SMALL, other)
        for problem in shape.gemms(DType.BF16)
        for config in space.candidates(problem, H200)
    }
    assert wanted <= {spec.digest for spec in no_compiler}
    assert all(row["registers"] == 168 and row["seconds"] == 1.25 for row in rows)


INFERENCE = Counter({Op.GEMM_RELU2_24: 1, Op.SPGEMM: 1})
STEP = Counter(
    {
        **dict.fromkeys((Op.GEMM_RELU2_24, Op.SPGEMM, Op.GEMM_DRELU2_24, Op.TRANSPOSE, Op.DENSE_COLUMNS), 1),
        Op.SPGEMM_TOKENS: 6,  # of both weights: new, added to fp32, added to their own type
        Op.GEMM: 1,  # of the dense warm-up
    }
)


@pytest.mark.parametrize(
    ("arguments", "ops"),
    [
        ([], INFERENCE),
        (["--pass", "backward"], STEP),
        (["--pass", "all"], INFERENCE + STEP),
        (["--bias"], INFERENCE + INFERENCE),
        (["--pass", "backward", "--bias"], STEP + Counter({Op.GEMM_RELU2_24: 1, Op.SPGEMM: 1, Op.GEMM: 1})),
    ],
)
def test_build_makes_the_kernels_of_a_pass(
    arguments: list[str], ops: dict[Op, int], no_compiler: list[KernelSpec]
) -> None:
    srelu24("build", "--gpu", "h200", "--shape", "2048x1024x4096", *arguments)
    assert Counter(spec.family.op for spec in no_compiler) == ops
    one_each = len(no_compiler)
    no_compiler.clear()
    srelu24("build", "--gpu", "h200", "--shape", "2048x1024x4096", "--all", *arguments)
    assert len({spec.digest for spec in no_compiler}) == len(no_compiler) > 5 * one_each


def test_build_counts_static_and_dynamic_shared_memory(no_compiler: list[KernelSpec]) -> None:
    config = KernelConfig(tile_m=128, tile_n=256, tile_k=64, stages=4)
    (row,) = catalogue.build_kernels([KernelSpec(Family(Op.GEMM, DType.BF16), config)])
    operands = 4 * 2 * (128 * 64 + 256 * 64)  # stages, bytes per element, A and B tiles
    assert STATIC_SMEM + operands <= row["smem_bytes"] <= STATIC_SMEM + operands + 2048  # barriers and alignment


def test_build_ends_with_1_and_the_reason_when_a_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_many(specs: list[KernelSpec], **_: Any) -> list[Any]:
        return [CompileError("NVRTC rejected it: [sic]"), *map(built_kernel, specs[1:])]

    monkeypatch.setattr(compiler, "build_many", build_many)
    out = srelu24("build", "--gpu", "h200", code=1).stdout
    assert "NVRTC rejected it: [sic]" in out


def test_db_shows_the_record_with_its_evidence() -> None:
    record = put_record(KernelConfig(tile_m=192))
    shown = json.loads(srelu24("db", "show", "gemm_relu2_24", "--gpu", "h200").stdout)
    sizes = (record.m, record.n, record.k)
    assert [item["evidence"]["ms"] for item in shown if (item["m"], item["n"], item["k"]) == sizes] == [2.0]
    table = srelu24("db", "list", "--gpu", "h200").stdout
    assert f"{record.m}x{record.n}x{record.k}" in table
    assert "1.250x" in table
    assert json.loads(srelu24("db", "list", "--gpu", "gh200", "--json").stdout) == []
    assert "no record" in srelu24("db", "show", "conv", code=1).stderr


def test_db_export_and_import_carry_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = put_record(KernelConfig(tile_m=192))
    file = tmp_path / "records.json"
    srelu24("db", "export", str(file))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "other"))
    assert database.Database.open().user_records() == []
    srelu24("db", "import", str(file))
    assert database.Database.open().user_records() == [record]


@pytest.mark.parametrize(
    "command",
    [["render", "gemm"], ["list"], ["list", "--models"], ["list", "--matrix"], ["db", "list"], ["--help"], ["doctor"]],
)
def test_works_without_torch(command: list[str]) -> None:
    """A machine that only generates kernels needs no torch; doctor says that it is missing, and ends with 1."""
    code = f"import sys; sys.modules['torch'] = None; from srelu24.cli.main import app; app({command!r})"
    paths = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True)
    assert done.returncode == (1 if command == ["doctor"] else 0), done.stderr
    assert "Traceback" not in done.stderr


# --- the main job ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, no_compiler: list[KernelSpec]) -> list[KernelSpec]:
    monkeypatch.setattr(doctor, "probe_driver", lambda: doctor.Driver(present=False, problem="none in this test"))
    return no_compiler


def test_run_without_a_gpu_builds_for_the_h200_and_checks_the_reference(no_gpu: list[KernelSpec]) -> None:
    result = srelu24("run", "--shape", str(SMALL))
    assert {spec.family for spec in no_gpu} == {p.family for p in SMALL.gemms(DType.BF16)}
    assert {spec.arch for spec in no_gpu} == {H200.arch}
    assert "Done: kernels built for NVIDIA H200" in result.stderr
    assert "Not done, for want of a GPU" in result.stderr
    assert "FAIL" not in result.stderr


@pytest.mark.parametrize("dtype", WIDE_TYPES)
def test_check_accepts_the_reference(dtype: DType) -> None:
    findings = main_job.check_ffn(main_job.CHECK_SHAPE, dtype, "cpu")
    assert [finding for finding in findings if not finding.ok] == []


def test_check_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    import srelu24 as package
    from srelu24.numerics import reference

    def failed() -> list[str]:
        return [f.statement for f in main_job.check_ffn(SMALL, DType.BF16, "cpu") if not f.ok]

    with monkeypatch.context() as patch:
        patch.setattr(package, "ffn", lambda x, w1, w2, mode: reference.ffn(x, w1, w2) * 1.02, raising=False)
        assert failed() == ["ffn(x, w1, w2) is S w2^T"]
    with monkeypatch.context() as patch:  # the first two of every 4 instead of the largest two

        def first_two(x: Any, w1: Any) -> Any:
            h = reference.gemm(x, w1, activation=Activation.RELU2)
            h.unflatten(-1, (-1, 4))[..., 2:] = 0
            return SimpleNamespace(to_dense=lambda: h)

        patch.setattr(package, "gemm_relu2_24", first_two, raising=False)
        assert "S keeps the 2 largest of every 4, squared" in failed()
    with monkeypatch.context() as patch:
        patch.setattr(
            package,
            "gemm_relu2_24",
            lambda x, w1: SimpleNamespace(to_dense=lambda: reference.gemm(x, w1, activation=Activation.RELU2)),
            raising=False,
        )
        assert "S has at most 2 non-zeros in every 4 neighbours" in failed()


def test_run_stops_where_the_doctor_finds_a_failure(
    no_gpu: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert "Mend what failed" in srelu24("run", code=1).stderr
    assert no_gpu == []


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, no_compiler: list[KernelSpec]) -> list[tuple[Any, ...]]:
    """A machine with an H200 on which tuning, checking and timing only note what they were asked for."""
    from srelu24.bench import forward
    from srelu24.tuning import tuner

    calls: list[tuple[Any, ...]] = []

    def tune_ffn(m: int, d: int, f: int, dtype: DType, **options: Any) -> dict[str, Any]:
        calls.append(
            ("tune", Shape(m, d, f), dtype, options["density"], options["budget_s"], options.get("resume", True))
        )
        return {"records": []}

    def check_ffn(shape: Shape, dtype: DType, device: str) -> list[main_job.Finding]:
        calls.append(("check", device))
        return [main_job.Finding("it holds", True, "made up")]

    def bench_ffn(shapes: list[Shape], dtype: DType, densities: list[float], **_: Any) -> results.BenchFile:
        calls.append(("bench", shapes, densities))
        return results.BenchFile(env={}, rows=[])

    gpus = (doctor.Gpu(0, H200.name, (9, 0), H200.sm_count),)
    monkeypatch.setattr(doctor, "probe_driver", lambda: doctor.Driver(True, 13000, gpus))
    monkeypatch.setattr(doctor, "diagnose", lambda: [doctor.Check("Python", doctor.Status.OK, "fine")])
    monkeypatch.setattr(tuner, "tune_ffn", tune_ffn)
    monkeypatch.setattr(forward, "bench_ffn", bench_ffn)
    monkeypatch.setattr(main_job, "check_ffn", check_ffn)
    return calls


def test_run_on_a_gpu_tunes_what_has_no_record_then_checks_and_times(fake_gpu: list[tuple[Any, ...]]) -> None:
    tuned, untuned = SMALL, Shape(512, 1024, 4096)
    for problem in tuned.gemms(DType.BF16):
        put_record(space.default(problem, H200), problem)
    result = srelu24("run", "--shape", str(tuned), "--shape", str(untuned), "--budget", "7")
    assert fake_gpu == [
        ("tune", untuned, DType.BF16, 0.1, 7.0, True),
        ("check", "cuda"),
        ("bench", [tuned, untuned], [0.1]),
    ]
    assert f"the FFN ran on {H200.name}" in result.stderr
    assert "Not done" not in result.stderr


def test_run_says_that_the_benchmark_was_left_out(fake_gpu: list[tuple[Any, ...]]) -> None:
    result = srelu24("run", "--budget", "0", "--no-bench")
    assert [what for what, *_ in fake_gpu] == ["check"]
    assert "Not done: the benchmark" in result.stderr
