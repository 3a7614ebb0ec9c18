"""What srelu24 is measured against: each peer as a function that does the work, and the output it has to give.

What each peer is and why: docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from srelu24.db.choice import SPARSE
from srelu24.measuring.verify import exact_float32
from srelu24.measuring.workload import make_ffn, prune
from srelu24.numerics.activations import rule_of
from srelu24.numerics.dtypes import STORAGE_TYPES
from srelu24.numerics.sparse24 import Sparse24
from srelu24.ops import functions
from srelu24.runtime import dense, dispatch
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Family, Op, Problem, pruning_op

Output = Tensor | Sparse24
Run = Callable[[], Output]

TOLERANCE = {dtype: row.tolerance for dtype, row in STORAGE_TYPES.items() if row.tolerance}
"""Relative error (Frobenius norm) allowed against float32. Dropping what pruning drops costs more than this at 50 %
density."""

_CHUNK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Case:
    """One shape, type and density on a GPU: the inputs, every intermediate, the outputs to expect."""

    speed: ClassVar[int] = 1
    """Rate of the tensor cores on the type of the GEMMs' operands, over their rate on 16 bits."""

    shape: Shape
    dtype: DType
    density: float
    x: Tensor
    """[M, D]"""
    w1: Tensor
    """[F, D]"""
    w2: Tensor
    """[D, F]"""
    h: Tensor
    """X W1^T, [M, F], summed in float32 and rounded to the storage type."""
    y_dense: Tensor
    """The dense FFN, [M, D], float32 throughout."""
    activation: Activation = Activation.RELU2

    @classmethod
    def make(
        cls,
        shape: Shape,
        dtype: DType,
        density: float,
        device: torch.device | str,
        seed: int = 0,
        *,
        zeros: bool = False,
        activation: Activation = Activation.RELU2,
    ) -> Case:
        """Data as :func:`srelu24.measuring.workload.make_ffn` gives it, and references in float32 without TF32.

        Args:
            zeros: nothing but zeros instead, which cost the least energy: how fast kernels are when power is no limit.

        Raises:
            Unsupported: the density is not within 0..1, or D is too small for it.
        """
        data = make_ffn(*shape, dtype, density, device, seed)
        if zeros:
            for tensor in (data.x, data.w1, data.w2):
                tensor.zero_()
        h = torch.empty(shape.m, shape.f, dtype=data.x.dtype, device=device)
        y = torch.empty(shape.m, shape.d, device=device)
        with exact_float32():
            w1, w2 = data.w1.float(), data.w2.float()
            for start in range(0, shape.m, _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                exact = data.x[rows].float() @ w1.T
                h[rows] = exact
                y[rows] = rule_of(activation).plain(exact) @ w2.T
        return cls(shape, dtype, density, data.x, data.w1, data.w2, h, y, activation)

    @property
    def gemm_flops(self) -> int:
        """Floating-point operations of one dense GEMM of the two."""
        return 2 * self.shape.m * self.shape.d * self.shape.f

    @cached_property
    def measured_density(self) -> float:
        """Share of non-zero activations before pruning."""
        return int(torch.count_nonzero(self.h > 0)) / self.h.numel()

    @cached_property
    def act(self) -> Tensor:
        """act(h), [M, F]: the zero-rich activations of the dense FFN, not pruned."""
        return rule_of(self.activation).plain(self.h)

    @cached_property
    def s(self) -> Sparse24:
        """h activated and pruned by the reference."""
        return prune(self.h, self.activation)

    @cached_property
    def s_dense(self) -> Tensor:
        """S unpacked, [M, F]."""
        return self.s.to_dense()

    @cached_property
    def y_masked(self) -> Tensor:
        """S W2^T, [M, D], summed in float32: what the sparse FFNs have to give."""
        with exact_float32():
            w2 = self.w2.float()
            return torch.cat([rows.float() @ w2.T for rows in torch.split(self.s_dense, _CHUNK_ROWS)])

    @cached_property
    def cusparselt_gemm(self) -> Callable[[], Tensor]:
        """S W2^T by cuSPARSELt with the algorithm its search picks here, S compressed beforehand.

        Raises:
            Unsupported: this PyTorch has no cuSPARSELt.
            RuntimeError: cuSPARSELt refuses the shape.
        """
        if not torch.backends.cusparselt.is_available():
            raise Unsupported("this PyTorch build has no cuSPARSELt; install one from the official CUDA wheels")
        compressed = torch._cslt_compress(self.s_dense)
        w2t = self.w2.T
        # Ids mean nothing in another version of the library, so the search is made anew each time.
        algorithm = torch._cslt_sparse_mm_search(compressed, w2t)
        return lambda: torch._cslt_sparse_mm(compressed, w2t, alg_id=algorithm)


@dataclass(frozen=True, slots=True)
class Peer:
    """One candidate of a comparison."""

    name: str
    build: Callable[[Case], Run]
    """Prepares what is not timed; the result does the timed work on the current stream and returns its output."""
    expect: Callable[[Case], Tensor]
    """The right output; a packed one is compared after unpacking."""
    tolerance: float | None = None
    """Relative error allowed, where it is not that of the type."""


def relative_error(output: Output, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; NaN where the output has one.

    Raises:
        Unsupported: the shapes differ.
    """
    dense = output.to_dense() if isinstance(output, Sparse24) else output
    if dense.shape != expected.shape:
        raise Unsupported(f"output is {list(dense.shape)} and {list(expected.shape)} was expected")
    wrong = right = 0.0
    for got, want in zip(torch.split(dense, _CHUNK_ROWS), torch.split(expected, _CHUNK_ROWS), strict=True):
        wrong += float((got.float() - want.float()).square().sum(dtype=torch.float64))
        right += float(want.float().square().sum(dtype=torch.float64))
    return float((wrong / right) ** 0.5) if right else float(wrong**0.5)


def _require(case: Case, op: Op, n: int, k: int, activation: Activation = Activation.NONE) -> None:
    """Raises Unsupported where the public op would quietly run dense PyTorch instead of our kernel."""
    problem = Problem(Family(op, case.dtype, activation), case.shape.m, n, k)
    dispatch.choose(problem, dispatch.gpu_of(case.x.device))


def plain_ffn(x: Tensor, w1: Tensor, w2: Tensor, /, activation: str = Activation.RELU2) -> Tensor:
    """act(X W1^T) W2^T as one writes it in PyTorch."""
    return rule_of(activation).plain(x @ w1.T) @ w2.T


def _srelu24(case: Case) -> Run:
    """The two kernels through the public op."""
    _require(case, pruning_op(case.activation), case.shape.f, case.shape.d, case.activation)
    _require(case, Op.SPGEMM, case.shape.d, case.shape.f)
    return lambda: functions.ffn(case.x, case.w1, case.w2, mode="sparse", activation=case.activation)


def chosen_way(case: Case) -> str:
    """What ``ffn(mode="auto")`` runs: "sparse", or one of the dense ways."""
    return dispatch.choose_ffn(case.shape, case.dtype, False, False, dispatch.gpu_of(case.x.device)).way


def _auto(case: Case) -> Run:
    """What the dispatcher chooses."""
    chosen_way(case)  # raises where there are no kernels
    return lambda: functions.ffn(case.x, case.w1, case.w2, mode="auto")


def _dense_way(way: str) -> Peer:
    def build(case: Case) -> Run:
        if way != "cublas":
            _require(case, Op.GEMM, case.shape.f, case.shape.d, Activation.RELU2)
        if way == "gemm":
            _require(case, Op.GEMM, case.shape.d, case.shape.f)
        return lambda: dense.ffn(way, case.x, case.w1, case.w2, None, None)

    return Peer(way, build, lambda case: case.y_dense)


def _torch_compile(case: Case) -> Run:
    """The plain FFN through TorchInductor, which fuses the activation into one kernel between cuBLAS GEMMs."""
    # Dynamo gives up and runs eagerly after a few shapes of one function.
    torch.compiler.reset()
    compiled = torch.compile(plain_ffn, dynamic=False)
    return lambda: compiled(case.x, case.w1, case.w2, case.activation.value)


def _eager(case: Case) -> Run:
    """The plain FFN, four kernels."""
    return lambda: plain_ffn(case.x, case.w1, case.w2, case.activation)


def _dense_fused(case: Case) -> Run:
    """The best dense FFN of our own: the activation in the first GEMM's epilogue, then a dense GEMM."""
    _require(case, Op.GEMM, case.shape.f, case.shape.d, case.activation)
    _require(case, Op.GEMM, case.shape.d, case.shape.f)
    return lambda: functions.linear(functions.linear(case.x, case.w1, activation=case.activation), case.w2)


def _unfused(case: Case) -> Run:
    """Our kernels without the fusion: dense GEMM, activation and pruning over memory, sparse GEMM."""
    _require(case, Op.GEMM, case.shape.f, case.shape.d)
    _require(case, Op.SPARSIFY24, case.shape.f, 0, case.activation)
    _require(case, Op.SPGEMM, case.shape.d, case.shape.f)
    activation = case.activation
    return lambda: functions.matmul(functions.sparsify24(functions.linear(case.x, case.w1), activation), case.w2)


def _cusparselt(case: Case) -> Run:
    """The paper's way: cuBLAS, a kernel that activates and prunes (ours), cuSPARSELt on an S compressed beforehand."""
    _require(case, Op.SPARSIFY24, case.shape.f, 0, case.activation)
    gemm2 = case.cusparselt_gemm

    def run() -> Tensor:
        functions.sparsify24(case.x @ case.w1.T, case.activation)
        return gemm2()

    return run


def _gemm1_fused(case: Case) -> Run:
    _require(case, pruning_op(case.activation), case.shape.f, case.shape.d, case.activation)
    return lambda: functions.gemm_24(case.x, case.w1, activation=case.activation)


def _gemm1_dense(case: Case) -> Run:
    _require(case, Op.GEMM, case.shape.f, case.shape.d)
    return lambda: functions.linear(case.x, case.w1)


def _gemm2_dense(case: Case) -> Run:
    _require(case, Op.GEMM, case.shape.d, case.shape.f)
    return lambda: functions.linear(case.act, case.w2)


def _gemm2_sparse(case: Case) -> Run:
    _require(case, Op.SPGEMM, case.shape.d, case.shape.f)
    return lambda: functions.matmul(case.s, case.w2)


def _sparsify24(case: Case) -> Run:
    _require(case, Op.SPARSIFY24, case.shape.f, 0, case.activation)
    return lambda: functions.sparsify24(case.h, case.activation)


def _copy(case: Case) -> Run:
    copy = torch.empty_like(case.h)
    return lambda: copy.copy_(case.h)


FFN = (
    Peer("srelu24", _srelu24, lambda case: case.y_masked),
    Peer("torch_compile", _torch_compile, lambda case: case.y_dense),
    Peer("eager", _eager, lambda case: case.y_dense),
    Peer("dense_fused", _dense_fused, lambda case: case.y_dense),
    Peer("unfused", _unfused, lambda case: case.y_masked),
    Peer("cusparselt", _cusparselt, lambda case: case.y_masked),
)
"""Whole forward passes."""

GEMM = (
    Peer("gemm1_fused", _gemm1_fused, lambda case: case.s_dense),
    Peer("gemm1_dense", _gemm1_dense, lambda case: case.h),
    Peer("gemm1_cublas", lambda case: lambda: case.x @ case.w1.T, lambda case: case.h),
    Peer("gemm2_sparse", _gemm2_sparse, lambda case: case.y_masked),
    Peer("gemm2_dense", _gemm2_dense, lambda case: case.y_dense),
    Peer("gemm2_cublas", lambda case: lambda: case.act @ case.w2.T, lambda case: case.y_dense),
    Peer("gemm2_cusparselt", lambda case: case.cusparselt_gemm, lambda case: case.y_masked),
)
"""The two GEMMs alone; the dense ones run on the zero-rich activations that a dense FFN has."""

DENSE_GEMMS = frozenset({"gemm1_fused", "gemm1_dense", "gemm1_cublas", "gemm2_dense", "gemm2_cublas"})
SPARSE_GEMMS = frozenset({"gemm2_sparse", "gemm2_promoted", "gemm2_cusparselt"})
"""What the ceilings of the speed of light are taken from. All do 2 M D F dense-equivalent operations."""

SWEEP = (
    Peer("srelu24", _auto, lambda case: case.y_masked if chosen_way(case) == SPARSE else case.y_dense),
    Peer("sparse", _srelu24, lambda case: case.y_masked),
    *(_dense_way(way) for way in dense.WAYS),
    Peer("torch_compile", _torch_compile, lambda case: case.y_dense),
)
"""What the dispatcher chooses, and all it could choose from."""


def tensor_rate(case: Case, name: str) -> int:
    """Dense-equivalent operations a clock of the whole GPU's tensor cores, for one of :data:`GEMM`."""
    target = dispatch.gpu_of(case.x.device)
    return target.sm_count * target.dense_flops_per_clock * case.speed * (2 if name in SPARSE_GEMMS else 1)


MEMORY = (
    Peer("sparsify24", _sparsify24, lambda case: case.s_dense),
    Peer("copy", _copy, lambda case: case.h),
)
"""What only moves bytes."""
