"""Row-wise scaled 8-bit floats: how a scale follows from a row's largest magnitude, and what is rounded to what.

``docs/fp8.md``, "Scales". A row of x is stored as ``round(x * (LARGEST / amax))`` and stands for that times
``amax / LARGEST``. Rounding is to nearest even, and saturates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srelu24.numerics.dtypes import FP8_DTYPES, STORAGE_DTYPES, STORAGE_TYPES, TORCH_DTYPE, WIDE_NAMES
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import DType

E4M3, E5M2 = TORCH_DTYPE[DType.E4M3], TORCH_DTYPE[DType.E5M2]
LARGEST = {row.torch_dtype: row.largest for row in STORAGE_TYPES.values() if row.largest is not None}
"""Largest finite value of a type."""
SMALLEST_AMAX = 2.0**-96
"""A row whose largest magnitude is less is scaled as if it were this: its scale and the inverse stay normal numbers,
and a row of zeros needs no exception."""
_UNREACHABLE = 464.0
"""Half way from e4m3's largest value to the next there would be: more than this saturates."""


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedRows:
    """A matrix [M, K] in 8-bit floats with one scale a row: ``values[m, k] * scale[m]``.

    Attributes:
        values: [M, K], e4m3 or e5m2.
        scale: [M], fp32.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[M, K]: the products with the scales in float32, rounded to ``dtype``."""
        return (self.values.float() * self.scale[:, None]).to(dtype)


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class QuantizedWeight(QuantizedRows):
    """A Linear weight in 8-bit floats, prepared once by :func:`quantize_weight`.

    Attributes:
        values: [N, K], e4m3 or e5m2, row-major and contiguous.
        scale: [N], fp32: one scale for each output channel. Weight n, k is ``values[n, k] * scale[n]``.
        row_norm: [], fp32: the largest Euclidean norm of a row of the quantised weight, which bounds what a GEMM can
            give (the ``predicted`` recipe).

    Raises:
        Unsupported: a tensor does not have the shape, type or device given here.
    """

    row_norm: Tensor

    def __post_init__(self) -> None:
        v = self.values
        if v.dim() != 2 or v.dtype not in FP8_DTYPES or not v.is_contiguous():
            raise Unsupported(
                f"quantised weight values are {v.dtype} {list(v.shape)}; contiguous [N, K] in "
                f"{' or '.join(map(str, FP8_DTYPES))} is needed: use srelu24.quantize_weight"
            )
        for name, tensor, shape in (("scale", self.scale, v.shape[:1]), ("row_norm", self.row_norm, ())):
            fits = tensor.shape == shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not fits or tensor.device != v.device:
                raise Unsupported(
                    f"quantised weight {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                    f"torch.float32 {list(shape)} on {v.device} is needed"
                )

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """e4m3 or e5m2."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.values.device

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.shape[0]}x{self.shape[1]}, {self.dtype}, {self.device})"

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """This weight on another device."""
        return QuantizedWeight(self.values.to(device), self.scale.to(device), self.row_norm.to(device))


@torch.no_grad()
def quantize_weight(w: Tensor, dtype: torch.dtype = E4M3) -> QuantizedWeight:
    """A Linear weight [N, K] (bf16, fp16 or fp32) in 8-bit floats with a scale for each output channel.

    Args:
        dtype: ``torch.float8_e4m3fn``, or ``torch.float8_e5m2`` for more range and one bit less precision.

    Raises:
        Unsupported: not a floating-point matrix, another ``dtype``, or a weight that is not finite.
    """
    if not isinstance(w, Tensor):
        raise Unsupported(f"the weight is a {type(w).__name__}; a torch.Tensor [N, K] is needed")
    if w.dim() != 2 or w.dtype not in (*STORAGE_DTYPES, torch.float32):
        wanted = f"{WIDE_NAMES.replace(' and ', ', ')} or float32"
        raise Unsupported(f"the weight is {w.dtype} {list(w.shape)}; [N, K] in {wanted} is needed")
    if dtype not in LARGEST:
        raise Unsupported(f"the weight was to become {dtype}; it can be {' or '.join(map(str, LARGEST))}")
    if not bool(w.isfinite().all()):
        raise Unsupported("the weight holds NaN or Inf, which no scale can hold; repair it before quantising")
    rows = quantize_rows(w.detach(), dtype)
    norms = torch.linalg.vector_norm(rows.values.float(), dim=1) * rows.scale
    return QuantizedWeight(rows.values.contiguous(), rows.scale, norms.amax() if len(norms) else norms.new_zeros(()))


def quantize_rows(x: Tensor, dtype: torch.dtype = E4M3) -> QuantizedRows:
    """[M, K] in 8-bit floats, each row scaled so that its largest magnitude becomes the type's largest value.

    A NaN or Inf makes its own row NaN and no other.
    """
    largest = x.float().abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float32)
    return QuantizedRows(saturate(x.float() * inverse_scale(largest, dtype)[:, None], dtype), scale(largest, dtype))


def scale(amax: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """What a stored value stands for, given the largest magnitude it has to hold; fp32, any shape."""
    amax = _raise_to_floor(amax)
    return amax / torch.full_like(amax, LARGEST[dtype])  # by a number torch multiplies with its rounded inverse


def inverse_scale(amax: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """What a value is multiplied by before it is stored. Rounded by itself: not exactly ``1 / scale``."""
    amax = _raise_to_floor(amax)
    return torch.full_like(amax, LARGEST[dtype]) / amax  # of a number torch multiplies with the rounded inverse


def saturate(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """fp32 to the nearest 8-bit value, ties to even; beyond the largest it is the largest, NaN stays NaN.

    PTX ``cvt.rn.satfinite``. Plain ``Tensor.to`` gives NaN or Inf beyond the largest.
    """
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def count_saturated(x: Tensor) -> Tensor:
    """int64 []: how many values of x rounding would take beyond e4m3's largest. A NaN is none of them."""
    return (x.abs() > _UNREACHABLE).sum()


def _raise_to_floor(amax: Tensor) -> Tensor:
    return amax.clamp(min=SMALLEST_AMAX)  # NaN passes
