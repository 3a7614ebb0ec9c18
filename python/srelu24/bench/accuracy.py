"""How far the 8-bit recipes are from float64, on the CPU: the file and the tables of docs/fp8.md.

    srelu24 bench accuracy --json docs/measurements/fp8_accuracy.json --document docs/fp8.md

Data as in :func:`srelu24.measuring.workload.make_ffn`, with one row of X 1000 times larger and one 1e-6 of its size.
"aligned" data has eight features of W1 that point along rows of X, as features of a trained network may: the hardest
case for a bound on the hidden values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from msgspec import Struct
from torch import Tensor

from srelu24.bench.results import ResultFile
from srelu24.fp8 import reference as fp8
from srelu24.fp8.quantize import QuantizedWeight, inverse_scale, quantize_rows, quantize_weight, scale
from srelu24.fp8.recipes import Predicted, Rowwise, Static
from srelu24.measuring.workload import make_ffn
from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24
from srelu24_gen import __version__
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType

CASES = [
    (shape, density, aligned)
    for shape in (Shape(128, 2048, 8192), Shape(128, 4096, 16384))
    for density in (0.1, 0.5)
    for aligned in (False, True)
]
OUTLIER, TINY = 0, 1
"""The rows of X that are scaled."""
_SCALED = {OUTLIER: 1000.0, TINY: 1e-6}
_BOUNDS: dict[str, Callable[[Tensor, QuantizedWeight], Tensor]] = {
    "Cauchy-Schwarz": lambda x, w: fp8.predicted_amax(x, w.row_norm),
    "Cauchy-Schwarz / 4": lambda x, w: fp8.predicted_amax(x, w.row_norm) / 16,
    "6 sigma": lambda x, w: _sigmas(6, x, w),
    "12 sigma": lambda x, w: _sigmas(12, x, w),
    "centred Cauchy-Schwarz": lambda x, w: _centred(x, w),
}
"""Formulas that ``predicted`` could use, fp32 [M] bounds of S; the first is the one it has."""


class Error(Struct, kw_only=True):
    """One way to compute an FFN, against float64. Relative errors are of whole rows, in the Euclidean norm."""

    shape: str
    """MxDxF."""
    density: float
    aligned: bool
    candidate: str
    group: str
    """"ffn", or "bound" for a formula that ``predicted`` could use."""
    safe: bool
    """Whether the recipe is marked safe."""
    against_pruned: float | None
    """Against the FFN pruned to 2:4 in float64, over the rows of ordinary size: the median. None for dense ones."""
    against_dense: float
    """The same against the unpruned FFN."""
    worst_row: float
    """The largest of the rows of ordinary size, against what the candidate should compute: dense or pruned."""
    outlier_row: float
    tiny_row: float
    saturated: int
    """Values of S beyond their scale."""
    lost_rows: int
    """Rows that came out as zero."""
    nonfinite_rows: int


class AccuracyFile(ResultFile, kw_only=True):
    """The result file."""

    rows: list[Error]


@torch.no_grad()
def measure(progress: Callable[[str], None] = lambda _: None) -> AccuracyFile:
    """Every candidate on every case."""
    rows: list[Error] = []
    for shape, density, aligned in CASES:
        progress(f"{shape}, {density:.0%} non-zero{', aligned' * aligned}")
        rows += _Case(shape, density, aligned).rows()
    return AccuracyFile(env={"torch": str(torch.__version__), "srelu24": __version__, "device": "cpu"}, rows=rows)


class _Case:
    """One set of inputs, with its answers in float64."""

    def __init__(self, shape: Shape, density: float, aligned: bool) -> None:
        self.shape, self.density, self.aligned = str(shape), density, aligned
        data = make_ffn(shape.m, shape.d, shape.f, DType.BF16, density, "cpu")
        self.x, self.w1, self.w2 = data.x, data.w1, data.w2
        if aligned:
            for i in range(8):
                token, feature = self.x[8 + i].float(), self.w1[64 * i].float()
                self.w1[64 * i] = (token * (feature.norm() / token.norm())).bfloat16()
        ordinary = self.x[2:].clone()
        for row, factor in _SCALED.items():
            self.x[row] *= factor
        self.q1, self.q2 = quantize_weight(self.w1), quantize_weight(self.w2)
        self.r = fp8.gemm_relu2_24(quantize_rows(self.x), self.q1)
        h = (self.x.double() @ self.w1.double().T).clamp(min=0)
        groups = h.view(shape.m, -1, 4)
        kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1.0)
        w2 = self.w2.double().T
        self.dense, self.pruned = h.square() @ w2, (groups.square() * kept).view_as(h) @ w2
        # Calibrated on the rows of ordinary size, as from other batches.
        hidden = fp8.gemm_relu2_24(quantize_rows(ordinary), self.q1)
        self.calibrated = fp8.row_amax(hidden.values).amax()

    def rows(self) -> list[Error]:
        relu2 = torch.nn.functional.linear(self.x, self.w1).relu().square()
        found = [
            self._error("bf16, dense", torch.nn.functional.linear(relu2, self.w2), sparse=False),
            self._error("bf16, 2:4", reference.ffn(self.x, self.w1, self.w2)),
            self._error("e4m3 row-wise, dense", self._dense_fp8(), sparse=False),
            self._scaled(Rowwise.name, fp8.row_amax(self.r.values), safe=Rowwise.safe),
            self._scaled(Static.name, self.calibrated, safe=Static.safe),
            self._scaled(Predicted.name, fp8.predicted_amax(self.x, self.q1.row_norm), safe=Predicted.safe),
        ]
        return found + [self._scaled(name, of(self.x, self.q1), group="bound") for name, of in _BOUNDS.items()]

    def _dense_fp8(self) -> Tensor:
        """As ``torch._scaled_mm`` with row-wise scales twice, with what lies between fused: bf16 in memory."""

        def linear(a: Tensor, w: QuantizedWeight) -> Tensor:
            rows = quantize_rows(a)
            return (rows.values.float() @ w.values.float().T * w.scale * rows.scale[:, None]).bfloat16()

        return linear(linear(self.x, self.q1).relu().square(), self.q2)

    def _scaled(self, name: str, amax: Tensor, *, safe: bool = False, group: str = "ffn") -> Error:
        s, saturated = fp8.square_to_e4m3(self.r, inverse_scale(amax))
        y = fp8.spgemm(s, scale(amax), self.q2)
        return self._error(name, y, s=s, saturated=int(saturated), safe=safe, group=group)

    def _error(
        self, name: str, y: Tensor, *, sparse: bool = True, s: Sparse24 | None = None, saturated: int = 0,
        safe: bool = False, group: str = "ffn",
    ) -> Error:  # fmt: skip
        against_dense, against_pruned = (
            (y.double() - truth).norm(dim=1) / truth.norm(dim=1) for truth in (self.dense, self.pruned)
        )
        own = against_pruned if sparse else against_dense
        return Error(
            shape=self.shape,
            density=self.density,
            aligned=self.aligned,
            candidate=name,
            group=group,
            safe=safe,
            against_pruned=float(against_pruned[2:].median()) if sparse else None,
            against_dense=float(against_dense[2:].median()),
            worst_row=float(own[2:].max()),
            outlier_row=float(own[OUTLIER]),
            tiny_row=float(own[TINY]),
            saturated=saturated,
            lost_rows=int((y == 0).all(dim=1).sum()),
            nonfinite_rows=int((~y.isfinite()).any(dim=1).sum()),
        )


def _sigmas(count: float, x: Tensor, w: QuantizedWeight) -> Tensor:
    """As if hidden values were normal, with the variance that random directions give."""
    bound: Tensor = torch.linalg.vector_norm(x.float(), dim=1) * w.row_norm * (count / math.sqrt(x.shape[1]))
    return bound * bound


def _centred(x: Tensor, w: QuantizedWeight) -> Tensor:
    """Cauchy-Schwarz for x less its mean, and the mean times the largest sum of a row of W1: needs both sums."""
    mean = x.float().mean(dim=1)
    rest: Tensor = torch.linalg.vector_norm(x.float() - mean[:, None], dim=1) * w.row_norm
    largest = (mean[:, None] * w.dequantize().sum(dim=1)).amax(dim=1).clamp(min=0)
    bound = (rest + largest) * fp8.BOUND_MARGIN
    return bound * bound
