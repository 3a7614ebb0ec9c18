"""Sparse or dense: the decision, its reasons, and that the dense ways compute the dense FFN."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import srelu24
from interruption import at_every_line
from srelu24.db.choice import MARGIN, PREDICTED_MARGIN, SPARSE, FfnChoice
from srelu24.db.database import Database
from srelu24.db.records import DenseTime, Evidence, TuningRecord
from srelu24.numerics import reference
from srelu24.ops import explanation
from srelu24.runtime import dense, dispatch
from srelu24.runtime.dispatch import choose_ffn
from srelu24_gen import cost, paths, space
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Family, Op
from srelu24_gen.target import TARGETS

H200 = TARGETS["h200"]
D, F = 4096, 16384


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """An empty database where the dispatcher looks for one."""
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(paths, "shipped_records_dir", lambda: tmp_path / "shipped")
    dispatch.clear_cache()
    return Database.open()


def records(m: int, ways: dict[str, float], gpu: str = "h200", d: int = D, f: int = F) -> list[TuningRecord]:
    """The records of an FFN whose sparse pair is so many times faster than each dense way."""
    evidence = Evidence(
        ms=0.5,
        default_ms=0.6,
        pair_ms=1.0,
        dense={way: DenseTime(gain, gain, gain * 0.99) for way, gain in ways.items()},
        samples=20,
        source_digest="d",
        when="2026-01-01T00:00:00Z",
    )
    return [
        TuningRecord(
            family=p.family,
            m=p.m,
            n=p.n,
            k=p.k,
            arch="sm_90a",
            gpu=gpu,
            config=space.default(p, H200).to_dict(),
            density=0.1,
            evidence=evidence,
        )
        for p in Shape(m, d, f).gemms(DType.BF16)
    ]


def put(*found: list[TuningRecord]) -> None:
    for record in itertools.chain(*found):
        Database.open().put(record)
    dispatch.clear_cache()


def choice(m: int, d: int = D, f: int = F, b1: bool = False) -> FfnChoice:
    return choose_ffn(Shape(m, d, f), DType.BF16, b1, False, H200)


# --- the decision ---


def test_without_a_measurement_a_cautious_model_decides() -> None:
    few, many = choice(16), choice(16384)
    assert (few.way, few.source) == ("cublas", "model")
    assert (many.way, many.source) == (SPARSE, "model")
    assert "nothing measured" in few.why
    assert choice(512, 768, 3072).way == "cublas", "too little to be sure of"
    narrow = choice(16384, 64, 256)
    assert (narrow.way, narrow.gain) == ("cublas", 1.0), "a narrow layer gains nothing that anybody measured"


def test_a_call_while_choices_are_forgotten_keeps_no_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: H200)

    def way() -> str:
        return dispatch.ffn_way("auto", torch.bfloat16, False, False, 16384, D, F, torch.device("cuda:0"))

    for interrupted in at_every_line(dispatch.clear_cache):
        for record in records(16384, {"cublas": 1.3}):
            Database.open().put(record)
        dispatch.clear_cache()
        assert way() == SPARSE
        for record in records(16384, {"cublas": 0.8}):
            Database.open().put(record)
        interrupted(dispatch.clear_cache, way)
        assert way() == "cublas"


def test_the_portable_kernels_are_dense_until_they_are_measured() -> None:
    """The model is fitted to Hopper's kernels: elsewhere it decides nothing."""
    rtx4090 = TARGETS["rtx4090"]
    for m in (1, 16384):
        found = choose_ffn(Shape(m, D, F), DType.BF16, False, False, rtx4090)
        assert (found.way, found.dense_way, found.gain, found.source) == ("cublas", "cublas", 1.0, "unknown")
        assert f"default, untuned: no time of this D and F on this GPU; srelu24 tune --shape {m}x{D}x{F}" in found.why


@pytest.mark.parametrize(
    ("ways", "way", "dense_way"),
    [
        ({"cublas": 1.30, "mixed": 1.25, "gemm": 1.28}, SPARSE, "mixed"),
        ({"cublas": 1.30, "mixed": 1.01}, "mixed", "mixed"),
        ({"cublas": 0.90, "gemm": 0.95}, "cublas", "cublas"),
        ({"cublas": MARGIN, "gemm": 1.5}, SPARSE, "cublas"),
        ({"cublas": MARGIN - 0.001, "gemm": 1.5}, "cublas", "cublas"),
    ],
)
def test_at_a_measured_size_the_best_dense_time_decides(ways: dict[str, float], way: str, dense_way: str) -> None:
    put(records(512, ways))
    found = choice(512)
    assert (found.way, found.dense_way, found.gain, found.source) == (way, dense_way, min(ways.values()), "measured")
    assert "measured" in found.why
    assert dense_way in found.why
    assert choice(512, b1=True).source == "measured", "a bias changes next to nothing"
    assert choice(512, D, F // 2).source == "model"


def test_between_two_sizes_the_crossover_is_interpolated() -> None:
    put(records(128, {"cublas": 0.9}), records(2048, {"gemm": 1.2}))
    found = {m: choice(m) for m in (128, 129, 200, 512, 1000, 2047, 2048)}
    gains = [c.gain for c in found.values()]
    assert gains == sorted(gains)
    assert found[512].source == "between"
    assert found[512].gain == pytest.approx((0.9 * 1.2) ** 0.5, rel=1e-6)
    assert (found[200].way, found[2047].way) == ("cublas", SPARSE)
    assert (found[200].dense_way, found[2047].dense_way) == ("cublas", "gemm")


def test_below_the_smallest_size_the_gain_shrinks_and_above_the_largest_it_stays() -> None:
    put(records(2048, {"cublas": 1.2}), records(8192, {"cublas": 1.25}))
    assert choice(16).way == "cublas"
    assert choice(16).source == "scaled"
    assert choice(16).gain < choice(512).gain <= 1.2
    assert (choice(100_000).gain, choice(100_000).way) == (1.25, SPARSE)


@given(st.dictionaries(st.sampled_from([16, 64, 256, 1024, 8192]), st.floats(0.7, 1.4)), st.integers(1, 40000))
def test_the_gain_stays_between_its_neighbours(measured: dict[int, float], m: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        empty = Database.open(Path("/nonexistent"), Path("/nonexistent/tuning.sqlite"))
        empty._shipped = [r for size, gain in measured.items() for r in records(size, {"cublas": gain})]
        patch.setattr(dispatch, "_database", lambda: empty)
        choose_ffn.cache_clear()
        found = choice(m)
    choose_ffn.cache_clear()
    below = [gain for size, gain in measured.items() if size <= m]
    near = [
        measured[s]
        for s in (max((s for s in measured if s <= m), default=0), min((s for s in measured if s >= m), default=0))
        if s
    ]
    if not measured:
        assert found.source == "model"
    elif below:
        assert min(near) - 1e-9 <= found.gain <= max(near) + 1e-9
    else:
        assert found.gain <= max(near) + 1e-9, "fewer tokens than were measured never look better"
    assert (found.way == SPARSE) == (found.gain >= (MARGIN if measured else PREDICTED_MARGIN))


def test_another_gpu_decides_nothing_here() -> None:
    put(records(16, {"cublas": 2.0}, gpu="h100"))
    assert choice(16).source == "model"


def test_sizes_without_kernels_are_refused() -> None:
    with pytest.raises(Unsupported, match="multiple of 8"):
        choice(512, 12, 64)


def test_a_look_up_costs_less_than_5_us_once_the_shape_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    put(*(records(m, {"cublas": 1.2}) for m in (512, 2048, 8192)))
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: H200)
    monkeypatch.setattr(dispatch, "launcher_for", lambda spec, index: spec)
    device = torch.device("cuda", 0)

    def both() -> None:
        dispatch.ffn_way("auto", torch.bfloat16, False, False, 700, D, F, device)
        dispatch.launcher_of(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), 700, F, D, device)

    both()
    best = min(_seconds(both, 2000) for _ in range(5)) / 2000
    assert best < 2 * 5e-6


def _seconds(call: object, times: int) -> float:
    assert callable(call)
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


# --- the words ---


def test_explain_says_which_way_and_why() -> None:
    put(records(16, {"cublas": 0.9, "mixed": 0.95}), records(512, {"mixed": 1.01}), records(8192, {"cublas": 1.25}))

    def text(m: int, mode: str = "auto") -> tuple[str, str, list[str]]:
        found = explanation.explain_kernels(Shape(m, D, F), DType.BF16, False, False, H200, mode)
        return found.runs, str(found), [k.problem.family.op.value for k in found.kernels]

    runs, words, kernels = text(16)
    assert (runs, kernels) == ("dense", [])
    assert "measured: the sparse pair at 0.900x of dense cublas's speed" in words
    assert text(512)[::2] == ("dense", ["gemm"])
    assert text(8192)[::2] == ("kernels", ["gemm_relu2_24", "spgemm"])
    assert "1.250x" in text(8192)[1]
    assert text(16, "sparse")[::2] == ("kernels", ["gemm_relu2_24", "spgemm"])
    assert text(8192, "dense")[0] == "dense"
    assert "dense was asked for" in text(8192, "dense")[1]


# --- what runs ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cublas_way_is_the_dense_ffn_of_the_contract(dtype: torch.dtype, bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x, w1, w2, b1, b2 = (
        torch.randint(-3, 4, size, generator=random).to(dtype) for size in ((5, 16), (24, 16), (16, 24), (24,), (16,))
    )
    biases = (b1, b2) if bias else (None, None)
    h = reference.gemm(x, w1, biases[0], activation=Activation.RELU2)  # small integers: exact in any order
    expected = reference.gemm(h, w2, biases[1])
    assert torch.equal(dense.ffn("cublas", x, w1, w2, *biases), expected)
    assert torch.equal(srelu24.ffn(x, w1, w2, *biases, mode="dense"), expected)


def test_modes_on_a_cpu() -> None:
    x, w1, w2 = torch.ones(2, 8).half(), torch.ones(16, 8).half(), torch.ones(8, 16).half()
    pruned, whole = torch.full((2, 8), 8.0 * 64), torch.full((2, 8), 16.0 * 64)
    for mode, expected in (("auto", pruned), ("sparse", pruned), ("dense", whole)):
        assert torch.equal(srelu24.ffn(x, w1, w2, mode=mode).float(), expected)
    assert srelu24.explain(x, w1, w2, mode="dense").runs == "dense"
    for call in (srelu24.ffn, srelu24.explain):
        with pytest.raises(Unsupported, match="mode is 'fast'; it must be one of auto, sparse, dense"):
            call(x, w1, w2, mode="fast")


def test_zeros_are_kept_per_width_type_and_device() -> None:
    w = torch.ones(24, 8)
    assert dense._find_zeros(w) is dense._find_zeros(w + 1)
    assert dense._find_zeros(w) is not dense._find_zeros(w[:16])
    assert dense._find_zeros(w.half()).dtype == torch.float16


def test_the_model_is_cautious_for_every_named_width() -> None:
    for d, f in ((768, 3072), (2688, 1856), (4096, 16384), (8192, 32768)):
        assert cost.ffn_gain(Shape(16, d, f), DType.BF16, H200) < PREDICTED_MARGIN
