"""The step on the kernels, with the kernels played by the numerics reference: splits, orders, buffers, what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import srelu24
from srelu24.numerics import reference as numerics
from srelu24.training import step
from srelu24.training.packed import columns
from srelu24.training.recipe import LayerState
from srelu24_gen.spec import Activation

M, D, F = 64, 64, 256


class Layer:
    """A bf16 layer in the sparse phase, whose dense features are spread out."""

    def __init__(self, stride: int | None, warmup_steps: int = 0) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).mul(shape[-1] ** -0.5).bfloat16()

        self.leaves = [t.requires_grad_() for t in (normal(M, D), normal(F, D), normal(D, F), normal(F), normal(D))]
        self.g = normal(M, D)
        self.recipe = srelu24.Recipe(warmup_steps, token_stride=stride, dense_features=0.25)
        self.state: LayerState = self.recipe.layer("ffn", self.leaves[1])
        self.state.dense_features.copy_(torch.arange(64) * 3 + 5)

    def run(self) -> list[Tensor]:
        y = srelu24.ffn(*self.leaves, recipe=self.state)
        return [y, *torch.autograd.grad(y, self.leaves, self.g)]


def close(ours: Tensor, wanted: Tensor) -> None:
    assert ours.shape == wanted.shape
    assert (ours.float() - wanted.float()).norm() < 4e-3 * wanted.float().norm()


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("warmup_steps", [0, 9], ids=["sparse", "dense"])
def test_the_step_is_the_reference_step(stride: int | None, warmup_steps: int, request: pytest.FixtureRequest) -> None:
    expected = Layer(stride, warmup_steps).run()
    request.getfixturevalue("played")
    layer = Layer(stride, warmup_steps)
    for ours, wanted in zip(layer.run(), expected, strict=True):
        close(ours, wanted)
    assert layer.state.rows == M


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_buffers_are_added_to(dtype: torch.dtype, contiguous: bool, request: pytest.FixtureRequest) -> None:
    expected = Layer(None).run()
    request.getfixturevalue("played")
    layer = Layer(None)
    w1_grad, w2_grad = torch.ones(F, D, dtype=dtype), torch.ones(D, F, dtype=dtype)
    if not contiguous:
        w1_grad, w2_grad = w1_grad.T.contiguous().T, w2_grad.T.contiguous().T
    layer.state.accumulate_into(w1_grad, w2_grad)
    srelu24.ffn(*layer.leaves, recipe=layer.state).backward(layer.g)
    close(w1_grad, 1 + expected[2].float())
    close(w2_grad, 1 + expected[3].float())
    assert layer.leaves[1].grad is None


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("warmup_steps", [0, 9], ids=["sparse", "dense"])
def test_metrics_are_those_of_the_reference(
    stride: int | None, warmup_steps: int, request: pytest.FixtureRequest
) -> None:
    found = []
    for play in (False, True):
        if play:
            request.getfixturevalue("played")
        layer = Layer(stride, warmup_steps)
        with layer.recipe.watch() as metrics:
            layer.run()
        found.append(metrics.layers)
    assert found[0] == found[1]


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("warmup_steps", [0, 9], ids=["sparse", "dense"])
def test_compilers_are_told_the_right_shapes(warmup_steps: int) -> None:
    o = Layer(None, warmup_steps)
    flag, features = o.recipe.sparse_flag, o.state.dense_features
    ops, checks = torch.ops.srelu24, ("test_schema", "test_faketensor")
    x, w1, w2, b1, b2 = (t.detach() for t in o.leaves)
    arguments = (x, w1, w2, b1, b2, flag, features, None, True, None, None)
    torch.library.opcheck(ops.ffn_train.default, arguments, test_utils=checks)
    _, hidden, _ = ops.ffn_train(*arguments)
    saved = (o.g, x, w1, w2, hidden, flag, features, None, [True] * 5)
    torch.library.opcheck(ops.ffn_train_backward.default, saved, test_utils=checks)
    buffers = torch.zeros(F, D), torch.zeros(D, F)
    torch.library.opcheck(ops.ffn_train_into.default, (*saved, *buffers), test_utils=checks)
    torch.library.opcheck(ops.hidden_kept.default, (hidden, x, F, flag, features, None), test_utils=checks)


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("warmup_steps", [0, 9], ids=["sparse", "dense"])
def test_without_gradients_the_same_kernels_run(warmup_steps: int) -> None:
    layer = Layer(None, warmup_steps)
    y, *_ = layer.run()
    with torch.no_grad():
        assert torch.equal(srelu24.ffn(*layer.leaves, recipe=layer.state), y)


def test_no_tokens_need_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "reason_against", lambda *_: None)
    layer = Layer(None)
    layer.leaves[0] = torch.empty(0, D, dtype=torch.bfloat16, requires_grad=True)
    layer.g = torch.empty(0, D, dtype=torch.bfloat16)
    y, dx, *rest = layer.run()
    assert y.shape == dx.shape == (0, D)
    assert not any(gradient.any() for gradient in rest)


@pytest.mark.parametrize("features", [[0], [255, 3, 17], list(range(256)), []])
def test_columns_are_those_of_the_dense_matrix(features: list[int]) -> None:
    x = torch.randn(100, F, generator=torch.Generator().manual_seed(0)).bfloat16()
    s = numerics.sparsify24(x, Activation.NONE)
    chosen = torch.tensor(features, dtype=torch.int64)
    assert torch.equal(columns(s, chosen), s.to_dense()[:, chosen])


def test_what_the_kernels_do_not_take_has_a_reason() -> None:
    assert step.reason_against(torch.empty(16, 64), 64, None, True) == "the tensors are not on a GPU"


def test_saved_memory_is_little_more_than_a_half_of_the_dense_step() -> None:
    m, f = 16384, 16384
    dense = 2 * m * f  # Y1 and relu2(Y1), 16 bits each
    assert step.hidden_size(m, f) / dense == 0.5625
