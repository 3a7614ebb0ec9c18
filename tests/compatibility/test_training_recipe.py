"""Training by a recipe"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn.functional import relu
from torch.utils.checkpoint import checkpoint

import srelu24
from srelu24.nn.modules import SquaredReLUFFN
from srelu24.training.recipe import LayerState
from srelu24_gen.errors import Unsupported

EXACT = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def wide(net: nn.Module) -> nn.Module:
    """In float32, where the rounding of 16 bits does not hide anything."""
    return net.float().train()


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(4, 8, 32)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    (model(x).square().mean() * 100).backward()
    return [p.grad.clone() for p in model.parameters()]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, **EXACT) for a, b in zip(ours, theirs, strict=True))


def test_warm_up_and_sparse_steps(wide: nn.Module, batch: Tensor, masked: Callable[..., object]) -> None:
    """convert(model, recipe=...) trains: dense gradients in the warm-up, those of the masked model afterwards."""
    dense = gradients(wide, batch)
    with masked(*(mlp.c_proj for mlp in wide.mlps)):
        pruned = gradients(wide, batch)
    assert not close(pruned, dense)
    # With all features dense nothing is pruned along tokens, so autograd of the masked model is the whole truth.
    recipe = srelu24.Recipe(warmup_steps=1, dense_features=1.0)
    report = srelu24.convert(wide, recipe=recipe)
    assert [done.note for done in report.converted] == ["trains by the recipe"] * 2
    assert close(gradients(wide, batch), dense)
    assert recipe.step()
    assert close(gradients(wide, batch), pruned)


def test_pruned_along_tokens(wide: nn.Module, batch: Tensor) -> None:
    """Without dense features the weight gradients are pruned along tokens as well; the input's are not."""
    found = []
    for share in (0.0, 1.0):
        model = copy.deepcopy(wide)
        srelu24.convert(model, recipe=srelu24.Recipe(warmup_steps=0, dense_features=share))
        x = batch.clone().requires_grad_()
        gradients(model, x)
        found.append((x.grad, model.mlps[1].up.weight.grad))
    assert torch.allclose(found[0][0], found[1][0], **EXACT)
    assert not torch.allclose(found[0][1], found[1][1], rtol=0.01)


def test_training_learns(wide: nn.Module, batch: Tensor) -> None:
    """Twenty steps of AdamW through warm-up and sparse steps lower the loss; the recipe counts them."""
    recipe = srelu24.Recipe(warmup_steps=5, refresh=5)
    srelu24.convert(wide, recipe=recipe)
    optimizer = torch.optim.AdamW(wide.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = (wide(batch) - batch.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recipe.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert recipe.sparse
    assert recipe.steps == 20


def test_metrics_by_module_name(wide: nn.Module, batch: Tensor) -> None:
    """recipe.watch() measures density and dropped shares; recipe and metrics have each FFN by its qualified name."""
    seen: list[Tensor] = []
    hook = wide.mlps[1].c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    wide(batch)
    hook.remove()
    recipe = srelu24.Recipe(warmup_steps=9)
    srelu24.convert(wide, recipe=recipe)
    assert list(recipe.layers) == ["mlps.0", "mlps.1"]
    assert wide.mlps[1].recipe is recipe.layers["mlps.1"]
    assert "trained as layer mlps.1" in repr(wide.mlps[1])
    with recipe.watch() as metrics:
        wide(batch)
    layer = metrics["mlps.1"]
    groups = seen[0].view(-1, 4).sort(-1).values != 0
    assert layer.density == pytest.approx(float(groups.double().mean()))
    assert layer.dropped_features == pytest.approx(float(groups[:, :2].sum() / groups.sum()))
    assert layer.dense_features == 64  # 5 % in whole tiles
    assert [each.name for each in metrics.layers] == list(recipe.layers)
    with pytest.raises(Unsupported, match=r"no layer 'mlps\.2' was watched; those that ran are \['mlps\.0'"):
        metrics["mlps.2"]


def test_inference_follows_the_phase(wide: nn.Module, batch: Tensor, masked: Callable[..., object]) -> None:
    """Under no_grad the forward pass is that of the recipe's phase, and nothing is counted."""
    with torch.no_grad():
        dense = wide(batch)
        with masked(*(mlp.c_proj for mlp in wide.mlps)):
            pruned = wide(batch)
        recipe = srelu24.Recipe(warmup_steps=1)
        srelu24.convert(wide, recipe=recipe)
        assert torch.allclose(wide(batch), dense, **EXACT)
        recipe.step()
        assert torch.allclose(wide(batch), pruned, **EXACT)
        assert str(srelu24.warmup(wide, tokens=4)[0].explanation) == (
            "runs: reference (by a training recipe; the tensors are not on a GPU)"
        )
    assert recipe.layers["mlps.0"].rows == 0


def test_ffns_of_ours(batch: Tensor) -> None:
    """SquaredReLUFFN(recipe=...) makes a layer; convert gives the recipe to those that have none, by their names."""
    recipe = srelu24.Recipe()
    model = nn.Sequential(SquaredReLUFFN(32, 96, recipe=recipe), SquaredReLUFFN(32, 96, names=("c_fc", "c_proj")))
    assert list(recipe.layers) == ["0"]
    report = srelu24.convert(nn.ModuleDict({"blocks": model}), recipe=recipe)
    assert list(recipe.layers) == ["0", "blocks.1"]
    assert [left.why for left in report.left] == ["it has a recipe already"]
    model(batch).mean().backward()
    assert [int(state.rows) for state in recipe.layers.values()] == [32, 32]
    report.revert()
    assert list(recipe.layers) == ["0"]
    assert model[1].recipe is None


def test_revert_frees_the_names(wide: nn.Module) -> None:
    """Reverting takes the layers out of the recipe, so that the model can be converted by it again."""
    recipe = srelu24.Recipe()
    srelu24.convert(wide, recipe=recipe).revert()
    assert not recipe.layers
    assert len(srelu24.convert(wide, recipe=recipe).converted) == 2
    wide.mlps[0].set_recipe(None)
    assert list(recipe.layers) == ["mlps.1"]
    assert wide.mlps[0].recipe is None


class ChannelMix(nn.Module):
    """Does more than the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.value(relu(self.key(x)).square())


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 60), nn.Linear(60, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(relu(self.fc1(x)).square())


def test_what_a_recipe_cannot_run_is_left() -> None:
    """FFNs that are only a part of their module, widths that do not serve, adapters, a bare FFN: left and named."""
    model = nn.Sequential(ChannelMix(), Narrow(), SquaredReLUFFN(32, 96))
    model[2].up_proj = nn.Sequential(nn.Linear(32, 96))
    for recipe in (srelu24.Recipe(), "rowwise"):
        report = srelu24.convert(model, recipe=recipe)
        assert not report.converted
        why = {left.path: left.why for left in report.left}
        assert "a recipe runs whole FFNs; it does more than the FFN" in why["0"]
        assert ("multiple of 8" if isinstance(recipe, srelu24.Recipe) else "multiples of 16") in why["1"]
        assert "more than a plain nn.Linear" in why["2"]
    assert "cannot be replaced in place" in srelu24.convert(Narrow(), recipe="rowwise").left[0].why


def test_what_makes_no_sense_is_refused(wide: nn.Module) -> None:
    """Unknown recipes, a mode beside a recipe, a name that is taken, a layer's state for a whole model."""
    recipe = srelu24.Recipe()
    for wrong in ("columnwise", 8, recipe.layer("other", torch.empty(96, 32))):
        with pytest.raises(Unsupported, match=r"a srelu24\.Recipe or one of rowwise, predicted, static is needed"):
            srelu24.convert(wide, recipe=wrong)  # type: ignore[arg-type]
        with pytest.raises(Unsupported, match=r"a srelu24\.Recipe or one of"):
            SquaredReLUFFN(32, 96, recipe=wrong)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="mode is 'sparse' and there is a recipe"):
        srelu24.convert(wide, recipe=recipe, mode="sparse")
    with pytest.raises(Unsupported, match="mode is 'dense'; a recipe decides"):
        SquaredReLUFFN(32, 96, mode="dense", recipe=recipe)
    srelu24.convert(wide, recipe=recipe)
    with pytest.raises(Unsupported, match=r"layer 'mlps\.0' already"):
        wide.mlps[1].set_recipe(recipe, "mlps.0")
    assert wide.mlps[1].recipe is recipe.layers["mlps.1"]  # a refusal changes nothing
    wide.mlps[1].mode = "dense"
    with pytest.raises(Unsupported, match="leave mode"):
        wide(torch.randn(2, 32))


def test_state_goes_with_the_weights(wide: nn.Module, batch: Tensor) -> None:
    """model.to() takes the layers' state along; a model made on the meta device begins when it is there."""
    recipe = srelu24.Recipe(warmup_steps=0)
    with torch.device("meta"):
        empty = nn.Sequential(SquaredReLUFFN(32, 96))
    srelu24.convert(empty, recipe=recipe)
    state = recipe.layers["0"]
    assert state.counts.is_meta
    empty.to_empty(device="cpu")
    assert int(state.counts.sum()) == int(state.rows) == 0
    assert state.dense_features.tolist() == list(range(64))
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.normal_()
    empty(batch).mean().backward()
    assert int(state.rows) == 32
    before = state.counts.clone()
    empty.double().float()
    assert torch.equal(state.counts, before)
    state.accumulate_into(torch.zeros(96, 32), torch.zeros(32, 96))
    with pytest.raises(Unsupported, match="accumulates into buffers on cpu and its weights went to meta"):
        empty.to("meta")


def test_deepcopy_and_pickle(wide: nn.Module, batch: Tensor) -> None:
    """A copy, pickled or deep, has a recipe of its own in the same state."""
    recipe = srelu24.Recipe(warmup_steps=0, dense_features=0.0)
    srelu24.convert(wide, recipe=recipe)
    wide(batch).mean().backward()
    buffer = io.BytesIO()
    torch.save(wide, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(wide), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(wide))):
        state = twin.mlps[0].recipe
        assert isinstance(state, LayerState)
        assert state.recipe is not recipe
        assert state.recipe is twin.mlps[1].recipe.recipe
        assert torch.equal(state.counts, recipe.layers["mlps.0"].counts)
        assert close(gradients(twin, batch), gradients(copy.deepcopy(wide), batch))
    assert int(recipe.layers["mlps.0"].rows) == 32


def test_checkpoint_of_the_recipe(wide: nn.Module, batch: Tensor) -> None:
    """recipe.state_dict() through torch.save(weights_only) goes on where it was, in a model converted anew."""
    fresh = copy.deepcopy(wide)
    recipe, again = srelu24.Recipe(warmup_steps=1, refresh=1), srelu24.Recipe(warmup_steps=1, refresh=1)
    srelu24.convert(wide, recipe=recipe)
    srelu24.convert(fresh, recipe=again)
    gradients(wide, batch)
    recipe.step()
    buffer = io.BytesIO()
    torch.save(recipe.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.sparse
    assert close(gradients(fresh, batch), gradients(wide, batch))


def test_activation_checkpointing(wide: nn.Module, batch: Tensor) -> None:
    """torch.utils.checkpoint around a converted model gives the same gradients."""
    srelu24.convert(wide, recipe=srelu24.Recipe(warmup_steps=0))
    expected = gradients(wide, batch)
    wide.zero_grad()
    (checkpoint(wide, batch, use_reentrant=False).square().mean() * 100).backward()
    assert close([p.grad for p in wide.parameters()], expected)


def test_func(wide: nn.Module, batch: Tensor) -> None:
    """torch.func transforms and forward-mode derivatives are refused in one sentence; functional_call works."""
    srelu24.convert(wide, recipe=srelu24.Recipe(warmup_steps=0))
    parameters = {name: p.detach() for name, p in wide.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(wide, parameters, (x,)).square().mean()

    with torch.no_grad():
        assert torch.equal(loss(parameters, batch), wide(batch).square().mean())
    for transformed in (
        lambda: torch.func.grad(loss)(parameters, batch),
        lambda: torch.func.vjp(wide, batch),
        lambda: torch.func.jvp(wide, (batch,), (batch,)),
        lambda: torch.func.vmap(wide)(batch),
    ):
        with pytest.raises(Unsupported, match=r"a recipe does not run under torch\.func"):
            transformed()
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, forward_ad.dual_level(), pytest.raises(Unsupported, match="no forward-mode derivative"):
            wide(forward_ad.make_dual(batch, batch))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_compiled(wide: nn.Module, fresh_compiler: None) -> None:
    """torch.compile(fullgraph, dynamic): one graph for all token counts, through the end of the warm-up."""
    eager = copy.deepcopy(wide)
    recipes = srelu24.Recipe(warmup_steps=2, refresh=1), srelu24.Recipe(warmup_steps=2, refresh=1)
    for model, recipe in zip((wide, eager), recipes, strict=True):
        srelu24.convert(model, recipe=recipe)
    compiled = torch.compile(wide, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (7, 16, 3, 33, 64):
        x = torch.randn(2, m, 32)
        found = []
        for model, run in ((wide, compiled), (eager, eager)):
            model.zero_grad()
            (run(x).square().mean() * 100).backward()
            found.append([p.grad.clone() for p in model.parameters()])
        assert close(*found)
        assert recipes[0].step() == recipes[1].step()
    assert counters["stats"]["unique_graphs"] == 1
    for ours, theirs in zip(recipes[0].layers.values(), recipes[1].layers.values(), strict=True):
        assert torch.equal(ours.dense_features, theirs.dense_features)
