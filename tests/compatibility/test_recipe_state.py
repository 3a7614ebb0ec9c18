"""The state of a training recipe in state dicts and copies"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import srelu24
from srelu24.nn.modules import SquaredReLUFFN

NAMES = ["recipe_steps", "recipe_counts", "recipe_rows", "recipe_dense_features"]


@pytest.fixture
def dense(net: nn.Module) -> nn.Module:
    """In float32, as it is before the recipe."""
    return net.float().train()


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(4, 8, 32)


def trained(dense: nn.Module, batch: Tensor, steps: int, **how: object) -> tuple[nn.Module, srelu24.Recipe]:
    """A copy, converted by a recipe that was stepped so often."""
    recipe = srelu24.Recipe(**({"warmup_steps": 2, "refresh": 2} | how))  # type: ignore[arg-type]
    model = copy.deepcopy(dense)
    srelu24.convert(model, recipe=recipe)
    for _ in range(steps):
        model(batch).square().mean().backward()
        recipe.step()
    return model, recipe


def recipe_of(model: nn.Module) -> srelu24.Recipe:
    (recipe,) = {module.recipe.recipe for module in model.modules() if isinstance(module, SquaredReLUFFN)}
    return recipe


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_state_dict(dense: nn.Module, batch: Tensor) -> None:
    """The model's state dict has the recipe's step, counts and rankings; a model converted anew goes on from it."""
    keys = set(dense.state_dict())
    model, recipe = trained(dense, batch, 3)
    added = set(model.state_dict()) - keys
    assert added == {f"mlps.{n}.{name}" for n in range(2) for name in NAMES}
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh, again = trained(dense, batch, 0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.steps == 3
    assert torch.equal(output(fresh, batch), output(model, batch))
    assert (again.steps, again.sparse) == (recipe.steps, recipe.sparse) == (3, True)
    for a, b in zip(again.layers.values(), recipe.layers.values(), strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(a.tensors, b.tensors, strict=True))
    assert int(again.layers["mlps.0"].rows) == 32
    again.step()
    assert fresh.state_dict()["mlps.1.recipe_steps"] == 4


@pytest.mark.parametrize("assign", [False, True])
def test_old_checkpoints(assign: bool, dense: nn.Module, batch: Tensor) -> None:
    """Checkpoints without the recipe's state load strictly and leave it as it is; missing weights are named."""
    model, recipe = trained(dense, batch, 3)
    model.load_state_dict(dense.state_dict(), assign=assign)
    assert recipe.steps == 3
    output(model, batch)
    assert recipe.sparse
    broken = dense.state_dict()
    del broken["mlps.0.c_fc.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"mlps\.0\.c_fc\.weight\"\. $"):
        model.load_state_dict(broken)


def test_checkpoints_of_a_recipe_in_other_ffns(dense: nn.Module, batch: Tensor) -> None:
    """FFNs without a recipe, or with one of 8 bits, load a checkpoint that has the state of one, and leave it out."""
    state = trained(dense, batch, 3)[0].state_dict()
    for recipe in (None, "rowwise"):
        model = copy.deepcopy(dense)
        srelu24.convert(model, recipe=recipe)
        model.load_state_dict(state)
        assert not any("recipe" in name for name in model.state_dict())


@pytest.mark.parametrize("recipe_saved", [True, False])
def test_assigned_from_meta(recipe_saved: bool, dense: nn.Module, batch: Tensor) -> None:
    """A model made and converted on the meta device, filled by load_state_dict(assign=True): state and all."""
    model, recipe = trained(dense, batch, 3)
    source = model if recipe_saved else dense
    with torch.device("meta"):
        empty = copy.deepcopy(dense).to("meta")
    again = srelu24.Recipe(warmup_steps=2, refresh=2)
    srelu24.convert(empty, recipe=again)
    empty.load_state_dict({name: value.clone() for name, value in source.state_dict().items()}, assign=True)
    if recipe_saved:
        assert torch.equal(output(empty, batch), output(model, batch))
        assert again.steps == 3
    else:
        assert torch.allclose(output(empty, batch), output(dense, batch), atol=1e-6)
    empty(batch).square().mean().backward()
    assert not any(t.is_meta for t in empty.state_dict().values())
    assert int(again.layers["mlps.0"].rows) >= 32
    assert again.layers["mlps.0"].dense_features.tolist() == recipe.layers["mlps.0"].dense_features.tolist() or not (
        recipe_saved
    )


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model)


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


@pytest.mark.parametrize("average", [averaged, ema])
def test_averaged_models(average: Callable[[nn.Module], AveragedModel], dense: nn.Module, batch: Tensor) -> None:
    """SWA and EMA copies (AveragedModel) follow the model out of the warm-up: they prune as it does, alone."""
    model, recipe = trained(dense, batch, 0)
    copied = average(model)
    assert recipe_of(copied) is not recipe
    for step in range(3):
        model(batch).square().mean().backward()
        recipe.step()
        copied.update_parameters(model)
        assert torch.allclose(output(copied, batch), output(model, batch), atol=1e-5)
        assert recipe_of(copied).steps == step + 1
        assert recipe_of(copied).sparse == recipe.sparse
    assert not torch.allclose(output(copied, batch), output(dense, batch), atol=1e-3)


def test_copies_over_state_dicts(dense: nn.Module, batch: Tensor) -> None:
    """An average kept by hand, value by value of state_dict(), follows as well."""
    model, recipe = trained(dense, batch, 0)
    copied = copy.deepcopy(model)
    for _ in range(3):
        recipe.step()
    with torch.no_grad():
        for mine, theirs in zip(copied.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(output(copied, batch), output(model, batch))
    assert recipe_of(copied).sparse


def test_copies_count_their_own_steps(dense: nn.Module, batch: Tensor) -> None:
    """A deep copy has its own recipe: stepping one leaves the other as it was, in either direction."""
    model, recipe = trained(dense, batch, 1)
    copied = copy.deepcopy(model)
    assert recipe.step()
    assert (recipe_of(copied).steps, recipe_of(copied).sparse) == (1, False)
    assert torch.allclose(output(copied, batch), output(dense, batch), atol=1e-6)
    assert int(copied.mlps[0].recipe_steps) == 1
    for _ in range(4):
        recipe_of(copied).step()
    assert (recipe.steps, int(model.mlps[0].recipe_steps)) == (2, 2)
    assert (recipe_of(copied).steps, int(copied.mlps[1].recipe_steps)) == (5, 5)


def test_spawned_processes(dense: nn.Module, batch: Tensor) -> None:
    """What a spawned process is sent shares the weights' memory and not the recipe's: each side counts for itself."""
    model, recipe = trained(dense, batch, 1)
    sent = pickle.loads(ForkingPickler.dumps(model))
    assert sent.mlps[0].c_fc.weight.data_ptr() == model.mlps[0].c_fc.weight.data_ptr()
    assert recipe.step()
    theirs = recipe_of(sent)
    assert (theirs.steps, theirs.sparse, bool(theirs.sparse_flag)) == (1, False, False)
    assert int(sent.mlps[0].recipe_steps) == 1
    assert torch.allclose(output(sent, batch), output(dense, batch), atol=1e-6)
    assert theirs.step()
    assert bool(theirs.sparse_flag)


def test_moving(dense: nn.Module, batch: Tensor) -> None:
    """to(), double(), share_memory() and to_empty() move the buffers, and the recipe goes on with them."""
    model, recipe = trained(dense, batch, 1)
    for move in (lambda m: m.double().float(), lambda m: m.share_memory(), lambda m: m.to("cpu")):
        move(model)
        for name, state in recipe.layers.items():
            buffers = [model.get_buffer(f"{name}.{each}") for each in NAMES]
            assert all(a is b for a, b in zip(buffers, (state.steps, *state.tensors), strict=True))
            assert buffers[1].dtype == torch.int64
    assert recipe.step()
    assert int(model.mlps[0].recipe_steps) == 2
    model.to("meta").to_empty(device="cpu")
    assert [int(model.get_buffer(f"mlps.0.{name}").sum()) for name in NAMES[:3]] == [2, 0, 0]


def test_set_recipe_and_revert(dense: nn.Module) -> None:
    """The buffers come with the recipe and go with it, and DDP is told to leave them to each rank."""
    recipe = srelu24.Recipe()
    report = srelu24.convert(dense, recipe=recipe)
    assert set(dense._ddp_params_and_buffers_to_ignore) == {f"mlps.{n}.{name}" for n in range(2) for name in NAMES}
    assert set(dense._ddp_params_and_buffers_to_ignore) <= set(dict(dense.named_buffers()))
    dense.mlps[0].set_recipe(None)
    assert not list(dense.mlps[0].buffers())
    dense.mlps[0].set_recipe(recipe, "again")
    report.revert()
    assert not list(dense.buffers())
    assert not hasattr(dense, "_ddp_params_and_buffers_to_ignore")
