"""Generated inputs have the density that was asked for, and operands what each kernel takes."""

from __future__ import annotations

import math

import pytest
import torch

from srelu24.measuring import workload
from srelu24.measuring.workload import make_ffn, make_preactivations, operands_for, poison, prune
from srelu24.numerics import reference
from srelu24.numerics.dtypes import TORCH_DTYPE
from srelu24.numerics.sparse24 import Sparse24
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, DType, Family, Op, Problem


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("d", [64, 768])
def test_density_is_met(d: int, density: float, dtype: DType) -> None:
    data = make_ffn(512, d, 2048, dtype, density, "cpu", seed=3)
    measured = float((data.x.double() @ data.w1.double().T > 0).double().mean())
    # 2048 features whose share varies from one to the next: about 0.01 of noise.
    assert measured == pytest.approx(density, abs=0.025)
    assert {t.dtype for t in (data.x, data.w1, data.w2)} == {TORCH_DTYPE[dtype]}
    assert (data.x.shape, data.w1.shape, data.w2.shape) == ((512, d), (2048, d), (d, 2048))


@pytest.mark.parametrize(("density", "positive"), [(0.0, False), (1.0, True)])
def test_densities_0_and_1_are_exact(density: float, positive: bool) -> None:
    data = make_ffn(64, 32, 128, DType.BF16, density, "cpu")
    assert bool(((data.x.double() @ data.w1.double().T > 0) == positive).all())
    h = make_preactivations(64, 128, DType.BF16, density, "cpu", seed=0)
    assert bool(((h > 0) == positive).all())


def test_some_features_are_far_denser_than_others() -> None:
    data = make_ffn(512, 256, 1024, DType.BF16, 0.1, "cpu")
    per_feature = (data.x.float() @ data.w1.float().T > 0).float().mean(dim=0)
    assert float(per_feature.quantile(0.95)) > 4 * float(per_feature.median())


def test_preactivations_are_distributed_like_the_gemm() -> None:
    data = make_ffn(1024, 1024, 1024, DType.FP16, 0.1, "cpu", seed=5)
    exact = data.x.double() @ data.w1.double().T
    drawn = make_preactivations(1024, 1024, DType.FP16, 0.1, "cpu", seed=6).double()
    assert float(drawn.mean()) == pytest.approx(float(exact.mean()), abs=0.15)
    assert float(drawn.std()) == pytest.approx(float(exact.std()), rel=0.05)
    # Half of the variance is the feature's own.
    assert float(drawn.mean(dim=0).std()) == pytest.approx(float(exact.mean(dim=0).std()), rel=0.1)


def test_data_is_reproducible_and_depends_on_the_seed() -> None:
    first, again, other = (make_ffn(8, 16, 32, DType.BF16, 0.1, "cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.w1, again.w1)
    assert not torch.equal(first.w1, other.w1)


def test_about_10_percent_is_a_shift_of_1_8() -> None:
    assert workload._shift(0.1) == pytest.approx(1.8, abs=0.02)
    assert workload._shift(0.5) == 0.0


@pytest.mark.parametrize("density", [-0.1, 1.5, math.nan])
def test_impossible_densities_are_refused(density: float) -> None:
    with pytest.raises(Unsupported, match="density"):
        make_ffn(8, 16, 32, DType.BF16, density, "cpu")


def test_a_density_too_small_for_d_is_refused() -> None:
    with pytest.raises(Unsupported, match="D = 8"):
        make_ffn(8, 8, 32, DType.BF16, 1e-4, "cpu")


def test_pruning_in_chunks_is_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "_CHUNK_ROWS", 64)
    h = make_preactivations(150, 264, DType.BF16, 0.5, "cpu", seed=0)
    whole, chunked = reference.sparsify24(h, Activation.RELU2), prune(h)
    assert torch.equal(whole.values, chunked.values)
    assert torch.equal(whole.metadata, chunked.metadata)


def _problem(op: Op, activation: Activation = Activation.NONE, **options: bool) -> Problem:
    return Problem(Family(op, DType.BF16, activation, **options), m=72, n=128, k=0 if op is Op.SPARSIFY24 else 256)


def test_operands_of_the_fused_gemm() -> None:
    operands = operands_for(_problem(Op.GEMM_RELU2_24, bias=True, count_nonzeros=True), 0.5, "cpu")
    assert isinstance(operands.out, Sparse24)
    assert operands.out.shape == (72, 128)
    assert bool(operands.out.values.isnan().all())
    assert bool((operands.out.metadata == -1).all())
    assert operands.counts is not None
    assert operands.counts.tolist() == [0] * 128
    assert operands.bias is not None
    assert operands.bias.shape == (128,)
    assert isinstance(operands.a, torch.Tensor)
    assert operands.b is not None
    share = (operands.a.double() @ operands.b.double().T > 0).double().mean()
    assert float(share) == pytest.approx(0.5, abs=0.1)


def test_operands_of_the_sparse_gemm() -> None:
    operands = operands_for(_problem(Op.SPGEMM, residual=True), 0.1, "cpu", seed=4)
    assert isinstance(operands.a, Sparse24)
    h = make_preactivations(72, 256, DType.BF16, 0.1, "cpu", seed=4)
    assert torch.equal(operands.a.to_dense(), reference.sparsify24(h, Activation.RELU2).to_dense())
    assert operands.b is not None
    assert operands.b.shape == (128, 256)
    assert operands.residual is not None
    assert operands.residual.shape == (72, 128)
    assert isinstance(operands.out, torch.Tensor)
    assert bool(operands.out.isnan().all())


def test_operands_of_the_dense_gemm_are_those_of_either_place_in_an_ffn() -> None:
    first = operands_for(_problem(Op.GEMM, Activation.RELU2), 0.1, "cpu")
    second = operands_for(_problem(Op.GEMM), 0.1, "cpu")
    assert isinstance(first.a, torch.Tensor)
    assert isinstance(second.a, torch.Tensor)
    assert float(first.a.float().mean()) == pytest.approx(1.0, abs=0.1)
    assert bool((second.a >= 0).all())
    assert float((second.a != 0).float().mean()) == pytest.approx(0.1, abs=0.05)


def test_operands_of_the_pruning_kernel_and_of_no_tokens() -> None:
    operands = operands_for(_problem(Op.SPARSIFY24, Activation.RELU2), 0.1, "cpu")
    assert isinstance(operands.a, torch.Tensor)
    assert operands.a.shape == (72, 128)
    assert operands.b is None
    empty = operands_for(Problem(Family(Op.SPGEMM, DType.FP16), 0, 128, 256), 0.1, "cpu")
    assert isinstance(empty.a, Sparse24)
    assert empty.a.shape == (0, 256)


def test_poison_is_illegal_everywhere_but_leaves_the_row_padding() -> None:
    s = Sparse24.empty(3, 24, torch.bfloat16, "cpu")  # rows of 12 values, padded to 16
    poison(s)
    padded = s.values.as_strided((3, 16), (16, 1))
    assert bool(padded[:, :12].isnan().all())
    assert bool((padded[:, 12:] == 0).all())
