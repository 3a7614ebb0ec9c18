"""The benchmark's bookkeeping on a CPU: checks before and after timing, failures with their reasons, files, Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from msgspec import UNSET
from torch import Tensor

from srelu24.bench import forward, peers
from srelu24.bench.forward import BenchEvent, bench_ffn, bench_gemm
from srelu24.bench.peers import Case, Peer, relative_error
from srelu24.bench.results import BenchFile
from srelu24.bench.rows import ENERGY_SECONDS, PEERS, utilisation
from srelu24.db.choice import SPARSE
from srelu24.measuring import timing
from srelu24.measuring.nvml import Power
from srelu24.measuring.timing import Interrupted, Timing
from srelu24.numerics import reference
from srelu24_gen.errors import RecordError, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Problem
from srelu24_gen.target import TARGETS

REAL_INTERLEAVE = timing.interleave
SHAPE = Shape(64, 64, 128)
MS = {"srelu24": 2.0, "eager": 3.0, "dense_fused": 2.5, "unfused": 2.2}
MS |= {"gemm1_fused": 1.0, "gemm1_dense": 0.9, "gemm1_cublas": 1.1, "gemm2_sparse": 0.6, "gemm2_dense": 0.8}
MS |= {"sparse": 2.0, "cublas": 2.6, "mixed": 2.55, "gemm": 2.5}
MS |= {"gemm2_cublas": 0.7, "sparsify24": 0.2, "copy": 0.15}


def interleave(
    candidates: dict[str, Callable[[], None]], *, on_progress: Callable[[timing.Progress], None], **_: object
) -> dict[str, Timing]:
    """Times of the table above, twice as long in the second of three rounds."""
    on_progress(timing.Progress(3, 1.0))
    return {name: Timing.of([MS[name], 2 * MS[name], MS[name]]) for name in candidates}


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return reference.gemm(reference.gemm(x, w1, activation=Activation.RELU2), w2)


def ffn(x: Tensor, w1: Tensor, w2: Tensor, mode: str, activation: str = Activation.RELU2) -> Tensor:
    if mode == "dense":
        return dense_ffn(x, w1, w2)
    return reference.ffn(x, w1, w2, activation=activation)


def choose_ffn(shape: Shape, *_: object) -> SimpleNamespace:
    return SimpleNamespace(way=SPARSE if shape.m >= 64 else "gemm")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our ops are the reference, any device will do, and nobody waits for TorchInductor."""
    ops = SimpleNamespace(
        ffn=ffn,
        gemm_24=reference.gemm_24,
        matmul=reference.spgemm,
        sparsify24=lambda h, activation: reference.sparsify24(h, Activation(activation)),
        linear=lambda x, w, activation="none": reference.gemm(x, w, activation=Activation(activation)),
    )
    monkeypatch.setattr(peers, "functions", ops)
    monkeypatch.setattr(forward, "functions", ops)
    dispatch = SimpleNamespace(
        choose=lambda problem, gpu: None, gpu_of=lambda device: TARGETS["h200"], choose_ffn=choose_ffn
    )
    monkeypatch.setattr(peers, "dispatch", dispatch)
    monkeypatch.setattr(forward, "require_gpu", lambda device: None)
    monkeypatch.setattr(forward.timing, "host_us", lambda call, device: 12.5)
    monkeypatch.setattr(forward.timing, "interleave", interleave)
    for part in ("ffn", "sweep"):
        monkeypatch.setitem(PEERS, part, tuple(p for p in PEERS[part] if p.name != "torch_compile"))
    monkeypatch.setattr(peers.dense, "ffn", lambda way, x, w1, w2, b1, b2: dense_ffn(x, w1, w2))


def test_every_peer_computes_what_it_is_checked_against() -> None:
    file = bench_ffn([SHAPE], DType.BF16, (0.5,), device="cpu")
    failed = {
        (row.op, name): candidate.error
        for row in file.rows
        for name, candidate in row.candidates.items()
        if candidate.ms is None
    }
    assert set(failed) == {("ffn_forward", "cusparselt"), ("spgemm", "cusparselt")}
    assert all("cuSPARSELt" in str(reason) for reason in failed.values())


def test_a_sweep_shows_every_way_and_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def chooses(x: Tensor, w1: Tensor, w2: Tensor, mode: str, activation: str = "relu2") -> Tensor:
        sparse = mode == "sparse" or (mode == "auto" and x.shape[0] >= 64)
        return reference.ffn(x, w1, w2) if sparse else dense_ffn(x, w1, w2)

    monkeypatch.setattr(peers.functions, "ffn", chooses)
    file = forward.bench_sweep([Shape(16, 64, 128), SHAPE], DType.BF16, (0.5,), device="cpu")
    assert [(row.op, row.shape) for row in file.rows] == [("sweep", "16x64x128"), ("sweep", "64x64x128")]
    for row, way in zip(file.rows, ("gemm", SPARSE), strict=True):
        assert set(row.candidates) == {"srelu24", "sparse", "cublas", "mixed", "gemm"}
        assert {name: c.ms for name, c in row.candidates.items()} == {name: MS[name] for name in row.candidates}
        assert row.candidates["srelu24"].note == way
        assert row.speedup["gemm"] == pytest.approx(2.5 / 2.0)


def test_rows_and_arithmetic() -> None:
    file = bench_ffn([SHAPE], DType.FP16, (0.1,), device="cpu")
    rows = {row.op: row for row in file.rows}
    assert set(rows) == {"ffn_forward", "gemm_relu2_24", "spgemm", "gemm", "sparsify24"}
    ffn = rows["ffn_forward"]
    assert (ffn.dtype, ffn.shape, ffn.density, ffn.recipe) == ("fp16", "64x64x128", 0.1, None)
    assert ffn.candidates["srelu24"].ms == 2.0
    assert ffn.candidates["srelu24"].samples == 3
    assert ffn.candidates["srelu24"].tflops == pytest.approx(4 * 64 * 64 * 128 / 2.0e-3 / 1e12)
    assert ffn.speedup == pytest.approx({"eager": 1.5, "dense_fused": 1.25, "unfused": 1.1})
    assert ffn.speed_of_light == pytest.approx((0.7 + 0.6) / 2.0)  # best dense and best sparse GEMM
    assert ffn.measured_density == pytest.approx(0.1, abs=0.06)
    assert rows["gemm_relu2_24"].speedup == pytest.approx({"gemm": 0.9, "cublas": 1.1})
    assert rows["spgemm"].candidates["srelu24"].tflops == pytest.approx(2 * 64 * 64 * 128 / 0.6e-3 / 1e12)
    # 64 x 128 fp16 read, half of it and 64 x 256 / 8 bytes of metadata (padded to 256 columns) written.
    assert rows["sparsify24"].candidates["srelu24"].gbps == pytest.approx((16384 + 8192 + 2048) / 0.2e-3 / 1e9)
    assert rows["sparsify24"].candidates["copy"].gbps == pytest.approx(2 * 16384 / 0.15e-3 / 1e9)
    assert file.python_overhead_us == {"srelu24": 12.5, "eager": 12.5}


def test_bench_gemm_leaves_the_whole_ffn_out() -> None:
    file = bench_gemm([SHAPE], DType.BF16, (0.1,), device="cpu")
    assert [row.op for row in file.rows] == ["gemm_relu2_24", "spgemm", "gemm", "sparsify24"]


def test_zeros_are_a_case_of_their_own_for_the_gemms() -> None:
    file = bench_gemm([SHAPE], DType.BF16, (0.1,), zeros=True, device="cpu")
    zero = [row for row in file.rows if row.zeros is True]
    assert [row.op for row in zero] == ["gemm_relu2_24", "spgemm", "gemm"]
    assert all(row.measured_density == 0 and row.density == 0 for row in zero)
    assert all(isinstance(c.ms, float) for row in zero for name, c in row.candidates.items() if name != "cusparselt")


def test_utilisation_is_the_rate_at_the_measured_clock_over_the_tensor_cores() -> None:
    timing = Timing.of([2.0], Power(sm_mhz=1000.0))
    flops = 132 * 4096 * 1_000_000  # what an H200 does in 1 ms at 1000 MHz
    assert utilisation(timing, flops, 132 * 4096) == pytest.approx(0.5)
    assert utilisation(timing, flops, 132 * 4096 * 2) == pytest.approx(0.25)
    assert utilisation(Timing.of([2.0]), flops, 132 * 4096) is UNSET


def _replace_peer(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[Case], peers.Run]) -> None:
    changed = tuple(Peer(p.name, build, p.expect) if p.name == name else p for p in PEERS["ffn"])
    monkeypatch.setitem(PEERS, "ffn", changed)


@pytest.mark.parametrize("spoil", [float("nan"), 0.05])
def test_a_wrong_candidate_gets_no_time(monkeypatch: pytest.MonkeyPatch, spoil: float) -> None:
    def build(case: Case) -> peers.Run:
        def run() -> torch.Tensor:
            y = reference.ffn(case.x, case.w1, case.w2)
            y[-1] *= 1 + spoil * 64**0.5  # one row of 64
            return y

        return run

    _replace_peer(monkeypatch, "unfused", build)
    row = bench_ffn([SHAPE], DType.BF16, (0.5,), device="cpu").rows[-1]
    assert "wrong result" in str(row.candidates["unfused"].error)
    assert "unfused" not in row.speedup
    assert row.candidates["eager"].ms == 3.0


def test_a_dense_fallback_does_not_pass_for_the_sparse_ffn(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_peer(monkeypatch, "srelu24", lambda case: lambda: peers.plain_ffn(case.x, case.w1, case.w2))
    row = bench_ffn([SHAPE], DType.BF16, (0.5,), device="cpu").rows[-1]
    assert "wrong result" in str(row.candidates["srelu24"].error)
    assert row.speedup == {}
    assert row.speed_of_light is None


def test_a_result_that_goes_wrong_under_load_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def build(case: Case) -> peers.Run:
        def run() -> torch.Tensor:
            nonlocal calls
            calls += 1
            return reference.ffn(case.x, case.w1, case.w2) * (1.0 if calls <= 2 else 2.0)

        return run

    _replace_peer(monkeypatch, "unfused", build)
    row = bench_ffn([SHAPE], DType.BF16, (0.1,), device="cpu").rows[-1]
    assert "wrong result" in str(row.candidates["unfused"].error)


def test_an_unsupported_problem_says_why_and_the_peers_are_still_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(problem: Problem, gpu: object) -> None:
        raise Unsupported(f"{problem} is not for us")

    monkeypatch.setattr(peers.dispatch, "choose", choose)
    events: list[BenchEvent] = []
    row = bench_ffn([SHAPE], DType.BF16, (0.1,), device="cpu", on_event=events.append).rows[-1]
    assert row.candidates["srelu24"].error == "gemm_relu2_24_bf16 64x128x64 is not for us"
    assert row.candidates["eager"].ms == 3.0
    assert any(event.kind == "failed" and "srelu24: gemm_relu2_24" in event.text for event in events)


def test_the_file_grows_with_every_group_and_ctrl_c_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "h200" / "ffn.json"
    groups = 0

    def interrupted(candidates: dict[str, Callable[[], None]], **options: object) -> dict[str, Timing]:
        nonlocal groups
        groups += 1
        if groups == 3:  # the FFNs of the first case
            assert len(BenchFile.load(path).rows) == 4
            raise Interrupted({"srelu24": Timing.of([2.0]), "eager": Timing.of([3.0])})
        return interleave(candidates, **options)

    monkeypatch.setattr(forward.timing, "interleave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_ffn([SHAPE], DType.BF16, (0.1, 0.5), device="cpu", json_path=path)
    ffn = BenchFile.load(path).rows[-1]
    assert (ffn.op, ffn.speedup, ffn.candidates["srelu24"].samples) == ("ffn_forward", {"eager": 1.5}, 1)
    assert "interrupted" in str(ffn.candidates["unfused"].error)


def test_events_advance_to_the_end() -> None:
    events: list[BenchEvent] = []
    file = bench_ffn([SHAPE, Shape(32, 64, 128)], DType.BF16, (0.1,), device="cpu", on_event=events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert [event.row for event in events if event.kind == "row"] == file.rows


def test_real_timing_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam between benchmark and measurement: the host's clock, two peers."""
    monkeypatch.setattr(forward.timing, "interleave", REAL_INTERLEAVE)
    monkeypatch.setitem(ENERGY_SECONDS, "ffn", 0.0)
    monkeypatch.setitem(PEERS, "ffn", tuple(p for p in peers.FFN if p.name in ("srelu24", "eager")))
    monkeypatch.setitem(PEERS, "gemm", ())
    row = bench_ffn([SHAPE], DType.BF16, (0.1,), device="cpu", seconds_per_shape=0.1).rows[-1]
    eager = row.candidates["eager"]
    assert eager.samples >= 5
    assert eager.ms is not None
    assert 0 < eager.ms < 1000
    assert row.speedup["eager"] > 0


def test_result_files_have_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "ffn.json"
    file = bench_ffn([SHAPE], DType.BF16, (0.1,), device="cpu", json_path=path)
    assert BenchFile.load(path) == file
    raw = msgspec.json.decode(path.read_bytes())
    assert raw["schema"] == 1
    row = raw["rows"][-1]
    documented = {"op", "dtype", "shape", "density", "recipe", "candidates", "speedup", "speed_of_light"}
    assert documented <= set(row)
    assert set(row["candidates"]["eager"]) - {"note"} == {"ms", "tflops", "joules", "sm_mhz", "watts", "samples"}
    assert "error" in row["candidates"]["cusparselt"]
    assert list(tmp_path.iterdir()) == [path]  # no temporary file left


@pytest.mark.parametrize(
    "content", ["", "{}", '{"schema": 2, "env": {}, "rows": []}', '{"schema": 1, "env": {}, "rows": [{}]}']
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=r"x\.json"):
        BenchFile.load(path)


@pytest.mark.parametrize(
    ("shapes", "densities", "seconds"),
    [
        ([], (0.1,), 1.0),
        ([Shape(0, 64, 128)], (0.1,), 1.0),
        ([SHAPE], (1.1,), 1.0),
        ([SHAPE], (), 1.0),
        ([SHAPE], (0.1,), 0.0),
    ],
)
def test_senseless_arguments_are_refused(shapes: list[Shape], densities: tuple[float, ...], seconds: float) -> None:
    with pytest.raises(Unsupported):
        bench_ffn(shapes, DType.BF16, densities, seconds_per_shape=seconds, device="cpu")


def test_no_gpu_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Unsupported, match="NVIDIA GPU"):
        bench_ffn([SHAPE], DType.BF16)


def test_relative_error() -> None:
    expected = torch.tensor([[3.0, 4.0]])
    assert relative_error(torch.tensor([[3.0, 4.5]]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([[3.0, float("nan")]]), expected) != relative_error(expected, expected)
    assert relative_error(torch.ones(1, 1), torch.zeros(1, 1)) == 1.0
    with pytest.raises(Unsupported, match="expected"):
        relative_error(torch.ones(2, 2), expected)


def test_the_masked_reference_drops_what_pruning_drops() -> None:
    case = Case.make(Shape(16, 64, 64), DType.BF16, 0.9, "cpu")
    groups = case.s_dense.view(16, 16, 4)
    assert int((groups != 0).sum(-1).max()) == 2
    assert relative_error(case.y_masked, case.y_dense) > 0.05
    exact = case.s_dense.double() @ case.w2.double().T
    assert float((case.y_masked.double() - exact).norm() / exact.norm()) < 1e-6
