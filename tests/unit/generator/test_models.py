"""Named models: every entry can be used, their widths fit together, and an unknown name is told its neighbours."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srelu24_gen import space
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import MODELS, TOKENS, Model, Pass, Shape, model, shapes
from srelu24_gen.spec import Activation, DType, Family, Op, Problem
from srelu24_gen.target import target_by_key

ALL = pytest.mark.parametrize("entry", MODELS.values(), ids=str)


@given(st.tuples(*[st.integers(0, 10**7)] * 3))
def test_shape_text_round_trips(sizes: tuple[int, int, int]) -> None:
    assert Shape.parse("x".join(map(str, sizes))) == sizes
    assert Shape.parse(str(Shape(*sizes))) == sizes


@pytest.mark.parametrize("text", ["", "12x", "1x2", "1x2x3x4", "ax2x3", "-1x2x3", "1.5x2x3", "1 x 2 x 3", "1,2,3"])
def test_shape_that_is_not_mxdxf_is_refused(text: str) -> None:
    with pytest.raises(Unsupported, match="MxDxF"):
        Shape.parse(text)


@ALL
def test_every_entry_is_found_by_its_key(entry: Model) -> None:
    assert re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", entry.key), "typed on a command line without quotes"
    assert model(entry.key) is entry
    assert model(f" {entry.key.upper()} ") is entry


def test_no_two_entries_look_the_same_to_a_reader() -> None:
    assert len({(entry.name, entry.d_model, entry.d_ff) for entry in MODELS.values()}) == len(MODELS)


@ALL
def test_kernels_compute_every_entry_at_every_standard_token_count(entry: Model) -> None:
    assert entry.d_model % 8 == entry.d_ff % 8 == 0
    for m, d, f in shapes(entry):
        for problem in (
            Problem(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), m, f, d),
            Problem(Family(Op.SPGEMM, DType.BF16), m, d, f),
        ):
            verdict = space.supports_problem(problem, target_by_key("h200"))
            assert verdict.ok, verdict.reason


# D as attention heads of 128, and F as a multiple of D: how configurations are thought up, not how the table has them.
HEADS_AND_RATIO = {
    "paper-1b": (16, 4),
    "paper-7b": (32, 4),
    "paper-tp1": (64, 4),
    "paper-tp8": (64, 1 / 2),
    "persimmon-8b": (32, 4),
    "nemotron-3-8b": (32, 4),
    "minitron-4b": (24, 3),
    "nemotron-h-8b": (32, 5.25),
    "nemotron-4-15b": (48, 4),
    "nemotron-h-47b": (64, 3.75),
    "nemotron-h-56b": (64, 4),
    "nemotron-nano-v2-9b": (35, 3.5),
    "nemotron-nano-v2-12b": (40, 4),
    "nemotron-3-nano-30b-a3b-expert": (21, 29 / 42),
    "nemotron-3-nano-30b-a3b-shared": (21, 29 / 21),
    "nemotron-4-340b": (144, 4),
    "rwkv-7-1.5b": (16, 4),
    "nanochat": (6, 4),
    "torchao-bench": (64, 1),
}


def test_every_entry_has_the_widths_of_its_configuration() -> None:
    widths = {key: (128 * heads, round(128 * heads * ratio)) for key, (heads, ratio) in HEADS_AND_RATIO.items()}
    assert {key: (entry.d_model, entry.d_ff) for key, entry in MODELS.items()} == widths


def test_entries_of_one_model_fit_together() -> None:
    whole, part = model("paper-tp1"), model("paper-tp8")
    assert (part.d_model, part.d_ff) == (whole.d_model, whole.d_ff / 8), "F is split over 8 GPUs, D is not"
    expert, shared = (model(f"nemotron-3-nano-30b-a3b-{part}") for part in ("expert", "shared"))
    assert (expert.d_model, 2 * expert.d_ff) == (shared.d_model, shared.d_ff)
    assert expert.d_ff % 128, "the tail of a tile, as in nemotron-nano-v2-9b"
    assert model("nemotron-nano-v2-9b").d_ff % 128


def test_shapes_are_the_model_at_each_token_count() -> None:
    mini = model("minitron-4b")
    assert shapes(mini, [7, 1024]) == [Shape(7, 3072, 9216), Shape(1024, 3072, 9216)]
    assert [shape.m for shape in shapes(mini)] == list(TOKENS) == [512, 2048, 4096, 8192, 16384, 32768]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("nemotron-4-16b", "nemotron-4-15b"),
        ("nemotron-3-nano-30b-a3b", "nemotron-3-nano-30b-a3b-shared"),
        ("Nemotron-H", "nemotron-h-8b"),
        ("rwkv7-1.5b", "rwkv-7-1.5b"),
        ("nano-chat", "nanochat"),
    ],
)
def test_an_unknown_key_is_told_its_neighbours(key: str, nearest: str) -> None:
    with pytest.raises(Unsupported, match=rf"^there is no model '{key}'; the nearest are [^;]*{nearest}") as error:
        model(key)
    assert str(error.value).count(",") < 3, "a few, not all"


@pytest.mark.parametrize("key", ["", "qwertz"])
def test_a_key_without_neighbours_is_told_all(key: str) -> None:
    with pytest.raises(Unsupported) as error:
        model(key)
    assert all(known in str(error.value) for known in MODELS)


@pytest.mark.parametrize("which", Pass)
def test_every_gemm_of_a_pass_names_its_shape_and_is_of_a_family_of_its_own(which: Pass) -> None:
    shape = Shape(4096, 2048, 8192)
    gemms = shape.gemms_of(which, DType.BF16)
    assert [Shape.of(p) for p in gemms] == [shape] * len(gemms)
    assert [Shape.of(p) for p in shape.dense_gemms(DType.BF16)] == [shape] * 2
    assert len({p.family for p in gemms}) == len(gemms) == {Pass.FORWARD: 2, Pass.BACKWARD: 5}[which]
    for problem in gemms:
        assert problem.tokens == shape.m
        assert sorted(problem.widths) == [shape.d, shape.f]
        assert space.supports_problem(problem, target_by_key("h200")).ok
