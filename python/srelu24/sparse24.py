"""Sparse24, a 2:4-pruned matrix in packed form, and the two orders in which its metadata E is stored.

What the kept values are is decided in :mod:`srelu24.reference`; this module only knows where bits lie.
Layout: docs/architecture.md, "The packed operand". Source of the format: PTX ISA, "wgmma.mma_async.sp", sparse matrix
storage; ``cutlass/gemm/collective/builders/sm90_sparse_config.inl``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from srelu24_gen.errors import Unsupported

ZERO_GROUP = 0x4
"""The nibble of a group of four zeros: positions 0 and 1."""

STORAGE_DTYPES = (torch.bfloat16, torch.float16)
"""What packed values can be stored as."""


def row_stride(f: int) -> int:
    """Elements from one row of packed values to the next: F/2 rounded up to the 16 bytes that TMA needs."""
    return -(-f // 16) * 8


def metadata_shape(m: int, f: int) -> tuple[int, int, int, int]:
    """Shape of E in fragment order, int32: ``[ceil(M/64), ceil(F/256), 128, 4]``."""
    return -(-m // 64), -(-f // 256), 128, 4


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24:
    """A 2:4-pruned matrix [M, F]: of every 4 neighbours in a row, two are kept. A pytree node of two tensors.

    Attributes:
        values: [M, F/2], bf16 or fp16, row-major: the kept values of each group in ascending column order. The row
            stride is ``roundup(F/2, 8)`` elements; what lies between F/2 and the stride is zero.
        metadata: E, int32 ``[ceil(M/64), ceil(F/256), 128, 4]``, contiguous, in fragment order. Rows beyond M and
            columns beyond F are zero groups (nibble 0x4).
        shape: (M, F) of the pruned matrix; M >= 0, F a positive multiple of 8.

    Raises:
        Unsupported: a field does not have the shape, dtype, stride or device given here.
    """

    values: Tensor
    metadata: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        m, f = self.shape
        _check_shape(m, f)
        _check_dtype(self.values.dtype)
        if self.values.shape != (m, f // 2):
            raise Unsupported(f"Sparse24 values are {list(self.values.shape)}; {m}x{f} needs [{m}, {f // 2}]")
        # The row stride of fewer than two rows means nothing, and torch changes it freely.
        if self.values.stride(1) != 1 or (m > 1 and self.values.stride(0) != row_stride(f)):
            raise Unsupported(
                f"Sparse24 values have strides {list(self.values.stride())}; F = {f} needs [{row_stride(f)}, 1]: "
                "allocate them with Sparse24.empty"
            )
        _check_metadata(self.metadata, m, f)
        if self.metadata.device != self.values.device:
            raise Unsupported(
                f"Sparse24 values are on {self.values.device} and metadata on {self.metadata.device}; "
                "move both to one device"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where values and metadata are."""
        return self.values.device

    def __repr__(self) -> str:
        return f"Sparse24({self.shape[0]}x{self.shape[1]}, {self.dtype}, {self.device})"

    @classmethod
    def empty(cls, m: int, f: int, dtype: torch.dtype, device: torch.device | str) -> Sparse24:
        """Room for an [M, F] matrix: values and metadata uninitialised, the row padding zero.

        Raises:
            Unsupported: M, F or dtype is outside what :class:`Sparse24` holds.
        """
        _check_shape(m, f)
        _check_dtype(dtype)
        values = torch.empty(m, row_stride(f), dtype=dtype, device=device)
        if values.shape[1] > f // 2:
            values[:, f // 2 :].zero_()
            values = values[:, : f // 2]
        return _unchecked(values, torch.empty(metadata_shape(m, f), dtype=torch.int32, device=device), (m, f))

    def to_dense(self) -> Tensor:
        """The pruned matrix [M, F] in the storage type: kept values bit for bit, +0 elsewhere."""
        nibbles = unpack_metadata(self.metadata, *self.shape)
        first, second = nibbles & 3, nibbles >> 2
        v0, v1 = self.values[:, 0::2], self.values[:, 1::2]
        zero = self.values.new_zeros(())
        columns = [torch.where(first == p, v0, torch.where(second == p, v1, zero)) for p in range(4)]
        return torch.stack(columns, dim=-1).flatten(1)

    def to_cutlass(self, tile_k: int = 64) -> tuple[Tensor, Tensor]:
        """Values and E as CUTLASS's sm90 sparse GEMM takes a K-major A, K being F.

        Source: ``Sm90GemmSparseConfig`` in ``sm90_sparse_config.inl`` (``fill_layoutA``, ``fill_layoutE``).

        Args:
            tile_k: K of the consuming GEMM's CTA tile in uncompressed elements, a multiple of 32.

        Returns:
            values [M, roundup(F/2, 8)], contiguous, zero-padded; E, int32 [ceil(F/a), ceil(M/64), 2a], contiguous,
            padded with zero groups, where a = min(tile_k, 128). Values are not copied where there is no padding.

        Raises:
            Unsupported: tile_k is not a positive multiple of 32.
        """
        order = _cutlass_order(tile_k)
        m, f = self.shape
        pad = row_stride(f) - f // 2
        values = torch.nn.functional.pad(self.values, (0, pad)) if pad else self.values
        e = order.pack(unpack_metadata(self.metadata, m, f))
        return values, e.view(-(-f // order.columns), -(-m // 64), 2 * order.columns)

    @classmethod
    def from_cutlass(cls, values: Tensor, e: Tensor, shape: tuple[int, int], tile_k: int = 64) -> Sparse24:
        """Inverse of :meth:`to_cutlass`. Copies; what lies in CUTLASS's padding does not matter.

        Args:
            values: [M, F/2] or wider, any strides, on E's device.
            e: CUTLASS's E for these M, F and tile_k: contiguous, any shape, any integer dtype.
            shape: (M, F).
            tile_k: K of the CTA tile that E was made for.

        Raises:
            Unsupported: values or E do not have the size that shape and tile_k need.
        """
        order = _cutlass_order(tile_k)
        m, f = shape
        _check_shape(m, f)
        nbytes = order.nbytes(m, f)
        if e.dtype.is_floating_point or e.nbytes != nbytes or not e.is_contiguous():
            raise Unsupported(
                f"CUTLASS metadata is {_describe(e)}; {m}x{f} at tile_k = {tile_k} needs {nbytes} contiguous bytes"
            )
        if values.dim() != 2 or values.shape[0] != m or values.shape[1] < f // 2:
            raise Unsupported(f"CUTLASS values are {list(values.shape)}; {m}x{f} needs [{m}, {f // 2}] or wider")
        packed = cls.empty(m, f, values.dtype, values.device)
        packed.values.copy_(values[:, : f // 2])
        packed.metadata.copy_(pack_metadata(order.unpack(e, m, f)))
        return packed


def pack_metadata(nibbles: Tensor) -> Tensor:
    """Nibbles in row-major order to E in fragment order.

    Args:
        nibbles: uint8 [M, F/4], each ``i0 | i1 << 2`` with i0 < i1 <= 3 (not checked); F a multiple of 8.

    Returns:
        int32 ``[ceil(M/64), ceil(F/256), 128, 4]``; rows and columns beyond M and F hold zero groups.

    Raises:
        Unsupported: not a 2-D uint8 tensor, or F is not a positive multiple of 8.
    """
    if nibbles.dim() != 2 or nibbles.dtype != torch.uint8:
        raise Unsupported(f"metadata nibbles are {_describe(nibbles)}; uint8 [M, F/4] is needed")
    m, f = nibbles.shape[0], 4 * nibbles.shape[1]
    _check_shape(m, f)
    return _FRAGMENT_ORDER.pack(nibbles).view(metadata_shape(m, f))


def unpack_metadata(e: Tensor, m: int, f: int) -> Tensor:
    """Inverse of :func:`pack_metadata`: uint8 [M, F/4], without the padding.

    Raises:
        Unsupported: E is not contiguous int32 of the shape that M and F need.
    """
    _check_shape(m, f)
    _check_metadata(e, m, f)
    return _FRAGMENT_ORDER.unpack(e, m, f)


@dataclass(frozen=True)
class _Order:
    """How E orders its 16-bit halves, each the four nibbles of 16 columns, lowest columns in the lowest bits.

    A half has seven coordinates: row = 64 i + 16 w + 8 h + g, columns / 16 = (N B) a + B n + b. Little-endian 32-bit
    words pair the halves h = 0 and h = 1, so h is always the fastest.
    """

    n: int
    b: int
    axes: tuple[int, ...]
    """Where i, w, h, g, a, n, b (0..6) lie in memory, slowest first."""

    BLOCK_ROWS: ClassVar[int] = 64

    @property
    def columns(self) -> int:
        """Columns of one step of a."""
        return 16 * self.n * self.b

    def nbytes(self, m: int, f: int) -> int:
        """Size of E with its padding: half a byte per group of 4."""
        return -(-m // self.BLOCK_ROWS) * self.BLOCK_ROWS * -(-f // self.columns) * self.columns // 8

    def pack(self, nibbles: Tensor) -> Tensor:
        """uint8 [M, F/4] to flat int32, padded with zero groups to whole blocks."""
        m, groups = nibbles.shape
        pad = (0, -groups % (self.columns // 4), 0, -m % self.BLOCK_ROWS)
        nibbles = torch.nn.functional.pad(nibbles, pad, value=ZERO_GROUP)
        halves = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int16)
        i, a = halves.shape[0] // self.BLOCK_ROWS, halves.shape[1] // (self.n * self.b)
        halves = halves.view(i, 4, 2, 8, a, self.n, self.b).permute(self.axes)
        return halves.contiguous().flatten().view(torch.int32)

    def unpack(self, e: Tensor, m: int, f: int) -> Tensor:
        """Inverse of :meth:`pack`, from contiguous E of any shape and integer dtype; drops the padding."""
        i, a = -(-m // self.BLOCK_ROWS), -(-f // self.columns)
        sizes = (i, 4, 2, 8, a, self.n, self.b)
        halves = e.flatten().view(torch.int16).view([sizes[axis] for axis in self.axes])
        halves = halves.permute([self.axes.index(axis) for axis in range(7)])
        pairs = halves.reshape(i * self.BLOCK_ROWS, a * self.n * self.b).view(torch.uint8)
        return torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)[:m, : f // 4]


_FRAGMENT_ORDER = _Order(4, 4, axes=(0, 4, 1, 3, 6, 5, 2))
"""The registers of wgmma.sp: block i, a; thread 32 w + 4 g + b; word n."""


def _cutlass_order(tile_k: int) -> _Order:
    """CUTLASS's ``TensorEAtom_16bit``, stacked along M, then along K.

    Its builder makes the atom min(TileK, 128) wide (``sm90_sparse_gmma_builder.inl``).
    """
    if tile_k < 32 or tile_k % 32:
        raise Unsupported(f"tile_k is {tile_k}; CUTLASS's 16-bit sparse GEMM needs a positive multiple of 32")
    return _Order(min(tile_k, 128) // 32, 2, axes=(4, 0, 1, 6, 3, 5, 2))


def _check_shape(m: int, f: int) -> None:
    if m < 0 or f < 8 or f % 8:
        raise Unsupported(f"a 2:4 matrix of {m}x{f} was asked for; M >= 0 and F a positive multiple of 8 are needed")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in STORAGE_DTYPES:
        raise Unsupported(f"packed values are {dtype}; torch.bfloat16 or torch.float16 is needed")


def _check_metadata(e: Tensor, m: int, f: int) -> None:
    if e.dtype != torch.int32 or e.shape != metadata_shape(m, f) or not e.is_contiguous():
        raise Unsupported(
            f"2:4 metadata is {_describe(e)}; {m}x{f} needs contiguous torch.int32 {list(metadata_shape(m, f))}"
        )


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else "non-contiguous "
    return f"{layout}{tensor.dtype} {list(tensor.shape)}"


def _flatten(s: Sparse24) -> tuple[list[Any], tuple[int, int]]:
    return [s.values, s.metadata], s.shape


def _unflatten(leaves: Any, shape: tuple[int, int]) -> Sparse24:
    # Leaves may be anything here (None, specs, fake tensors), so __post_init__ must not judge them.
    values, metadata = leaves
    return _unchecked(values, metadata, shape)


def _unchecked(values: Any, metadata: Any, shape: tuple[int, int]) -> Sparse24:
    """A Sparse24 of parts known to fit, without the checks: they cost more than a kernel launch."""
    s = object.__new__(Sparse24)
    object.__setattr__(s, "values", values)
    object.__setattr__(s, "metadata", metadata)
    object.__setattr__(s, "shape", shape)
    return s


pytree.register_pytree_node(Sparse24, _flatten, _unflatten, serialized_type_name="srelu24.Sparse24")
