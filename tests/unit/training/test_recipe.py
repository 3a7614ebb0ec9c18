"""The recipe: when it switches, what it ranks, what it saves, what it refuses, what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import srelu24
from srelu24.training.metrics import Metrics
from srelu24_gen.errors import Unsupported

F, D = 256, 8


def layer_of(recipe: srelu24.Recipe, name: str = "a", f: int = F) -> Any:
    return recipe.layer(name, torch.empty(f, D))


def test_warm_up_ends_with_the_step_that_completes_it() -> None:
    recipe = srelu24.Recipe(warmup_steps=3)
    seen = []
    for _ in range(5):
        sparse = recipe.sparse
        assert sparse == bool(recipe.sparse_flag)
        seen.append((sparse, recipe.step()))
    assert seen == [(False, False), (False, False), (False, True), (True, False), (True, False)]
    assert srelu24.Recipe(warmup_steps=0).sparse


def test_ranking_takes_the_densest_features_when_it_is_time() -> None:
    recipe = srelu24.Recipe(warmup_steps=5, refresh=2, dense_features=0.25)
    layer = layer_of(recipe)
    storage = layer.dense_features.data_ptr()
    assert layer.dense_features.tolist() == list(range(64))
    counts = torch.zeros(F, dtype=torch.int32)
    counts[100:164] = 7
    layer.count(counts, 10)
    recipe.step()
    assert layer.dense_features.tolist() == list(range(64))
    recipe.step()
    assert layer.dense_features.tolist() == list(range(100, 164))
    assert layer.counts.sum() == 0
    assert layer.rows == 0
    layer.count(counts.flip(0), 10)
    recipe.step()
    recipe.step()
    assert layer.dense_features.tolist() == list(range(92, 156))
    layer.count(counts, 10)
    assert recipe.step()  # the end of the warm-up ranks too
    assert layer.dense_features.tolist() == list(range(100, 164))
    assert layer.dense_features.data_ptr() == storage


@pytest.mark.parametrize(
    ("share", "f", "expected"), [(0.0, 256, 0), (0.05, 16384, 832), (0.05, 256, 64), (1.0, 200, 200), (0.05, 72, 64)]
)
def test_dense_features_come_in_whole_tiles(share: float, f: int, expected: int) -> None:
    recipe = srelu24.Recipe(dense_features=share)
    assert len(layer_of(recipe, f=f).dense_features) == expected


def test_a_checkpoint_brings_back_step_phase_and_rankings() -> None:
    first = srelu24.Recipe(warmup_steps=1)
    layer = layer_of(first)
    layer.count(torch.arange(F, dtype=torch.int32), 3)
    first.step()
    layer.count(torch.ones(F, dtype=torch.int32), 3)
    second = srelu24.Recipe(warmup_steps=1)
    other = layer_of(second)
    pointer = other.dense_features.data_ptr()
    second.load_state_dict(first.state_dict())
    assert second.steps == 1
    assert second.sparse
    assert bool(second.sparse_flag)
    assert all(torch.equal(a, b) for a, b in zip(layer.tensors, other.tensors, strict=True))
    assert other.dense_features.data_ptr() == pointer


def test_a_checkpoint_of_another_model_changes_nothing() -> None:
    saved = srelu24.Recipe()
    layer_of(saved, "a").count(torch.ones(F, dtype=torch.int32), 1)
    named, narrow = srelu24.Recipe(), srelu24.Recipe()
    layer_of(named, "b")
    layer_of(narrow, "a", f=128)
    with pytest.raises(Unsupported, match=r"layers \['a'\] and this one \['b'\]"):
        named.load_state_dict(saved.state_dict())
    with pytest.raises(Unsupported, match=r"saved a.counts has shape \[256\] and this recipe's \[128\]"):
        narrow.load_state_dict(saved.state_dict())
    assert narrow.layers["a"].rows == 0


@pytest.mark.parametrize(
    "change", [{"steps": "x"}, {"steps": -1}, {"layers": 3}, {"layers": {"a": {}}}, {"layers": {"a": None}}]
)
def test_what_is_no_checkpoint_changes_nothing(change: dict[str, Any]) -> None:
    recipe = srelu24.Recipe()
    layer_of(recipe).count(torch.ones(F, dtype=torch.int32), 1)
    damaged = recipe.state_dict() | change
    for saved in (damaged, {}, None, {"layers": {"a": dict.fromkeys(("counts", "rows", "dense_features"), 1)}}):
        with pytest.raises(Unsupported, match="not the state of a recipe"):
            recipe.load_state_dict(saved)  # type: ignore[arg-type]
    assert (recipe.steps, int(recipe.layers["a"].rows)) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5"),
        ({"refresh": 0}, "refresh is 0"),
        ({"dense_features": 1.5}, "dense_features is 1.5"),
        ({"dense_features": float("nan")}, "dense_features is nan"),
        ({"dense_features": "0.1"}, "dense_features is '0.1'"),
        ({"token_stride": -2}, "token_stride is -2"),
        ({"kernels": "no"}, "kernels is 'no'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        srelu24.Recipe(**arguments)


def test_layers_are_checked() -> None:
    recipe = srelu24.Recipe()
    layer_of(recipe)
    with pytest.raises(Unsupported, match="layer 'a' already"):
        layer_of(recipe)
    for shape in ((12, 8), (0, 8), (8,)):
        with pytest.raises(Unsupported, match="multiple of 8"):
            recipe.layer("b", torch.empty(shape))
    with pytest.raises(Unsupported, match="w1 is a int"):
        recipe.layer("b", 3)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="name of a layer is 3"):
        layer_of(recipe, 3)  # type: ignore[arg-type]


def test_buffers_are_checked() -> None:
    layer = layer_of(srelu24.Recipe())
    w1_grad, w2_grad = torch.zeros(F, D), torch.zeros(D, F)
    with pytest.raises(Unsupported, match="one gradient buffer"):
        layer.accumulate_into(w1_grad, None)
    with pytest.raises(Unsupported, match="F = 256 are needed"):
        layer.accumulate_into(w2_grad, w1_grad)
    with pytest.raises(Unsupported, match="w2_grad is a int"):
        layer.accumulate_into(w1_grad, 3)
    with pytest.raises(Unsupported, match="requires a gradient"):
        layer.accumulate_into(w1_grad.requires_grad_(), w2_grad)
    assert layer.w1_grad is None


def test_metrics_are_the_counted_shares(tmp_path: Path) -> None:
    w1 = torch.zeros(F, D)
    w1[:, 0] = 1.0
    recipe = srelu24.Recipe(warmup_steps=0, dense_features=0.25, token_stride=0)
    layer = recipe.layer("blocks.0", w1)
    weights = [w1.requires_grad_(), torch.ones(D, F)]
    with recipe.watch() as metrics:
        x = torch.zeros(16, D)
        x[::4, 0] = 1.0
        srelu24.ffn(x, *weights, recipe=layer)
    (found,) = metrics.layers
    # Every fourth token has all features at 1: pruning keeps two of four, and along tokens loses nothing.
    assert found.name == "blocks.0"
    assert found.density == 0.25
    assert found.dropped_features == 0.5
    assert found.dropped_tokens == 0.0
    assert (found.dense_features, found.dense_density) == (64, 0.25)
    with recipe.watch() as metrics:
        srelu24.ffn(torch.ones(16, D), *weights, recipe=layer)
    (found,) = metrics.layers
    # All tokens alike: of the half that is kept, dense features keep all (64 of 256), the others a half of that.
    assert found.density == 1.0
    assert found.dropped_features == 0.5
    assert found.dropped_tokens == pytest.approx(0.5 * 192 / 256)
    assert "blocks.0" in [str(cell) for cell in metrics.table().columns[0].cells]
    pytest.importorskip("matplotlib")
    metrics.plot(tmp_path / "metrics.svg")
    assert (tmp_path / "metrics.svg").read_text().startswith("<?xml")
    with pytest.raises(Unsupported, match="no forward pass was watched"):
        Metrics().plot(tmp_path / "none.svg")


def test_nobody_watches_by_default() -> None:
    recipe = srelu24.Recipe()
    with recipe.watch() as outer:
        with recipe.watch() as inner:
            assert recipe.metrics is inner
        assert recipe.metrics is outer
    assert recipe.metrics is None
