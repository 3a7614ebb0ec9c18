"""Which configuration answers a problem, and that the answer says where it comes from."""

from __future__ import annotations

import dataclasses
import timeit
from pathlib import Path

import pytest
import torch

from srelu24.db.database import Database
from srelu24.db.records import Evidence, TuningRecord
from srelu24.runtime import dispatch
from srelu24.training import kernels
from srelu24_gen import cost, paths, space
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, Family, KernelConfig, Op, Problem, Producer
from srelu24_gen.target import TARGETS

H200, H100 = TARGETS["h200"], TARGETS["h100"]
PROBLEM = Problem(Family(Op.SPGEMM, DType.BF16), 4096, 4096, 16384)
TUNED = KernelConfig(tile_m=128, stages=3, raster_group=4)


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """An empty database where the dispatcher looks for one."""
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(paths, "shipped_records_dir", lambda: tmp_path / "shipped")
    dispatch.clear_cache()
    return Database.open()


@pytest.fixture(autouse=True, scope="module")
def _forget_these_records() -> object:
    yield
    dispatch.clear_cache()


def record(problem: Problem = PROBLEM, gpu: str = "h200", config: KernelConfig = TUNED) -> TuningRecord:
    evidence = Evidence(ms=1.0, default_ms=1.1, samples=20, source_digest="d", when="2026-01-01T00:00:00Z")
    return TuningRecord(
        family=problem.family,
        m=problem.m,
        n=problem.n,
        k=problem.k,
        arch="sm_90a",
        gpu=gpu,
        config=config.to_dict(),
        density=0.1,
        evidence=evidence,
    )


def test_without_records_it_is_the_default() -> None:
    choice = dispatch.choose(PROBLEM, H200)
    assert (choice.config, choice.source, choice.record) == (cost.best(PROBLEM, H200), "default", None)
    assert "untuned" in choice.why


def test_a_record_of_this_problem_on_this_gpu(database: Database) -> None:
    database.put(record())
    choice = dispatch.choose(PROBLEM, H200)
    assert (choice.config, choice.source, choice.record) == (TUNED, "exact", record())
    assert choice.why == "tuned for this very problem on this GPU"


@pytest.mark.parametrize(
    "tuned",
    [
        dataclasses.replace(TUNED, stream_k=True),
        KernelConfig(tile_m=192, stages=5, producer=Producer.THREAD, stream_k=True),
        KernelConfig(tile_m=64, tile_n=128, stages=6, cluster_m=1),
    ],
)
def test_a_batch_invariant_choice_is_the_record_without_what_depends_on_the_batch(
    tuned: KernelConfig, database: Database
) -> None:
    database.put(record(config=tuned))
    assert dispatch.choose(PROBLEM, H200).config == tuned
    choice = dispatch.choose(PROBLEM, H200, batch=True)
    assert choice.config.batch_invariant
    assert space.supports(PROBLEM, choice.config, H200).ok
    assert "made batch-invariant" in choice.why
    if tuned.tile_n == 256:
        assert choice.config == dataclasses.replace(tuned, stream_k=False)


def test_a_batch_invariant_record_is_taken_as_it_is(database: Database) -> None:
    database.put(record())
    assert dispatch.choose(PROBLEM, H200, batch=True) == dispatch.choose(PROBLEM, H200)


def test_a_record_of_another_size_is_named(database: Database) -> None:
    database.put(record())
    choice = dispatch.choose(dataclasses.replace(PROBLEM, m=5000), H200)
    assert (choice.config, choice.source) == (TUNED, "nearest")
    assert str(PROBLEM) in choice.why


def test_a_record_that_does_not_fit_these_rows_is_set_aside(database: Database) -> None:
    tuned = Shape(512, 6144, 24576).gemms(DType.BF16)[0]
    two = KernelConfig(tile_m=128, cluster_m=2, stages=4)
    database.put(record(tuned, config=two))
    assert dispatch.choose(tuned, H200).source == "exact"
    assert dispatch.choose(dataclasses.replace(tuned, m=512 - 63), H200).source == "nearest", "still four tiles"
    odd = dataclasses.replace(tuned, m=384)  # three tiles: a quarter of what clusters of 256 rows multiply is padding
    choice = dispatch.choose(odd, H200)
    assert (choice.config, choice.source, choice.record) == (cost.best(odd, H200), "default", None)
    assert "x of what is tuned for gemm_relu2_24_bf16 512x24576x6144" in choice.why


def test_a_record_is_not_set_aside_for_what_the_model_has_wrong_where_it_was_measured(database: Database) -> None:
    unloved = KernelConfig(tile_m=64, tile_n=128, cluster_m=1, stages=2)
    expected = [cost.cost(PROBLEM, c, H200).us for c in (unloved, cost.best(PROBLEM, H200))]
    assert expected[0] > 1.1 * expected[1]
    database.put(record(config=unloved))
    biased = dataclasses.replace(PROBLEM, family=dataclasses.replace(PROBLEM.family, bias=True))
    for problem in (biased, dataclasses.replace(PROBLEM, m=PROBLEM.m - 8)):
        assert dispatch.choose(problem, H200).config == unloved


def test_records_count_where_the_model_says_nothing(database: Database) -> None:
    tokens = Problem(Family(Op.SPGEMM_TOKENS, DType.BF16), 16384, 4096, 16384)
    short = KernelConfig(tile_m=128, stages=2)
    database.put(record(tokens, config=short))
    choice = dispatch.choose(dataclasses.replace(tokens, k=8192), H200)
    assert (choice.config, choice.source) == (short, "nearest")


def test_a_record_of_another_gpu_is_named(database: Database) -> None:
    database.put(record(gpu="h100"))
    choice = dispatch.choose(PROBLEM, H200)
    assert (choice.config, choice.source) == (TUNED, "other_gpu")
    assert "another GPU" in choice.why
    assert dispatch.choose(PROBLEM, H100).source == "exact"


def test_a_record_that_does_not_fit_the_problem_is_no_help(database: Database) -> None:
    thread = KernelConfig(tile_m=192, producer=Producer.THREAD)
    assert space.supports(PROBLEM, thread, H200).ok
    database.put(record(config=thread))
    ragged = dataclasses.replace(PROBLEM, n=4104)
    assert not space.supports(ragged, thread, H200).ok
    assert dispatch.choose(ragged, H200).source == "default"


def test_choices_are_remembered_until_the_cache_is_cleared(database: Database) -> None:
    before = dispatch.choose(PROBLEM, H200)
    database.put(record())
    assert dispatch.choose(PROBLEM, H200) is before
    dispatch.clear_cache()
    assert dispatch.choose(PROBLEM, H200).source == "exact"


def test_a_choice_costs_less_than_5_us_after_the_first() -> None:
    for problem in (PROBLEM, DW2):
        once = min(timeit.repeat(lambda problem=problem: dispatch.choose(problem, H200), number=1000, repeat=20)) / 1000  # type: ignore[misc]
        assert once < 5e-6
    sizes = (DW2.m, DW2.n, DW2.k)
    assert min(timeit.repeat(lambda: kernels.spec_for(DW2.family, sizes, H200), number=1000, repeat=20)) < 5e-3


def test_what_no_kernel_computes_is_refused_with_the_problem_named() -> None:
    with pytest.raises(Unsupported, match=r"spgemm_bf16 4096x4100x16384: N = 4100 is not a multiple of 8"):
        dispatch.choose(dataclasses.replace(PROBLEM, n=4100), H200)


def test_a_cpu_has_no_kernels() -> None:
    with pytest.raises(Unsupported, match="cpu has no kernels"):
        dispatch.gpu_of(torch.device("cpu"))


# --- the kernels of a training step ---

STEP = Shape(4096, 2048, 8192)
HIDDEN, PRODUCT, GRADIENT, DW1, DW2 = STEP.step_gemms(DType.BF16)


def in_training(problem: Problem) -> KernelConfig:
    """What the training kernels launch."""
    return kernels.spec_for(problem.family, (problem.m, problem.n, problem.k), H200).config


@pytest.mark.parametrize("problem", [HIDDEN, PRODUCT, GRADIENT, DW1, DW2], ids=str)
def test_training_runs_what_was_tuned_for_it(problem: Problem, database: Database) -> None:
    assert in_training(problem) == cost.best(problem, H200)
    dispatch.clear_cache()
    database.put(record(problem))
    assert in_training(problem) == TUNED
    assert dispatch.choose(problem, H200).source == "exact"


@pytest.mark.parametrize(
    ("plain", "options"),
    [
        (DW1, {"accumulate": True}),
        (DW1, {"accumulate": True, "out": DType.FP32}),
        (DW1, {"dtype": DType.FP16}),
        (DW2, {"accumulate": True, "out": DType.FP32}),
        (HIDDEN, {"bias": True}),
        (PRODUCT, {"bias": True}),
        (GRADIENT, {"dtype": DType.FP16}),
    ],
)
def test_variants_share_the_record_of_their_kernel(
    plain: Problem, options: dict[str, object], database: Database
) -> None:
    variant = dataclasses.replace(plain, family=dataclasses.replace(plain.family, **options))  # type: ignore[arg-type]
    database.put(record(plain))
    choice = dispatch.choose(variant, H200)
    assert (choice.config, choice.source, choice.record) == (TUNED, "nearest", record(plain))
    assert in_training(variant) == TUNED


def test_the_nearest_number_of_tokens_answers_where_tokens_are_summed_over(database: Database) -> None:
    for tokens, config in ((1024, TUNED), (16384, KernelConfig(stages=2))):
        database.put(record(STEP._replace(m=tokens).step_gemms(DType.BF16)[3], config=config))
    # Another layer of the same sizes but for which of them counts tokens: K of the sum, not M or N.
    database.put(record(dataclasses.replace(DW1, n=4096), config=KernelConfig(stages=3, raster_group=1)))
    choices = {m: in_training(STEP._replace(m=m).step_gemms(DType.BF16)[3]) for m in (512, 2048, 8192, 32768)}
    assert choices == {512: TUNED, 2048: TUNED, 8192: KernelConfig(stages=2), 32768: KernelConfig(stages=2)}
    near = database.of_widths(DW1, H200)
    assert [r.k for r in near] == [1024, 16384], "the same widths, sorted by tokens"


def test_gradients_of_the_two_weights_are_tuned_apart(database: Database) -> None:
    other = KernelConfig(stages=2)
    database.put(record(DW1))
    database.put(record(DW2, config=other))
    assert (in_training(DW1), in_training(DW2)) == (TUNED, other)


def test_inference_and_training_prefer_their_own_records(database: Database) -> None:
    other = KernelConfig(stages=2)
    inference = STEP.gemms(DType.BF16)
    database.put(record(HIDDEN, config=other))
    assert dispatch.choose(inference[0], H200).config == other, "better than none"
    dispatch.clear_cache()
    near = dataclasses.replace(inference[0], m=2048)
    database.put(record(near))
    assert dispatch.choose(inference[0], H200).record == record(near)
    assert dispatch.choose(HIDDEN, H200).config == other
