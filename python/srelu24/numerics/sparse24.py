"""Sparse24, a 2:4-pruned matrix in packed form, and the orders in which its metadata E is stored.

Which values are kept is decided in :mod:`srelu24.numerics.reference`; this module only knows where bits lie.
Layout: docs/architecture.md, "The packed operand". Source of the format: PTX ISA, "wgmma.mma_async.sp", sparse matrix
storage; ``cutlass/gemm/collective/builders/sm90_sparse_config.inl``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from srelu24.numerics.dtypes import FP8_DTYPES, STORAGE_DTYPES, FragmentOrder, row_of
from srelu24_gen.errors import Unsupported

ZERO_GROUP = 0x4
"""The nibble of a group of four zeros: positions 0 and 1."""

_PACKED_DTYPES = (*STORAGE_DTYPES, *FP8_DTYPES)


def row_stride(f: int, itemsize: int = 2) -> int:
    """Elements of ``itemsize`` bytes from one row of packed values to the next: F/2 rounded up to the 16 bytes that
    TMA needs."""
    step = 16 // itemsize
    return -(-f // (2 * step)) * step


def metadata_shape(m: int, f: int) -> tuple[int, int, int, int]:
    """Shape of E in fragment order, int32: ``[ceil(M/64), ceil(F/256), 128, 4]``."""
    return -(-m // 64), -(-f // 256), 128, 4


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24:
    """A 2:4-pruned matrix [M, F]: of every 4 neighbours in a row, two are kept. A pytree node of two tensors.

    Attributes:
        values: [M, F/2], bf16, fp16, e4m3 or e5m2, row-major: the kept values of each group in ascending column
            order. The row stride is F/2 elements rounded up to 16 bytes; what lies between F/2 and the stride is zero.
        metadata: E, int32 ``[ceil(M/64), ceil(F/256), 128, 4]``, contiguous, in fragment order. Rows beyond M and
            columns beyond F are zero groups (nibble 0x4).
        shape: (M, F) of the pruned matrix; M >= 0, F a positive multiple of 8, or of 16 in the 8-bit order.
        order: the fragment order of E. 8-bit values have the 8-bit one.

    Raises:
        Unsupported: a field does not have the shape, dtype, stride or device given here.
    """

    values: Tensor
    metadata: Tensor
    shape: tuple[int, int]
    order: FragmentOrder = FragmentOrder.BITS16

    def __post_init__(self) -> None:
        m, f = self.shape
        _check_shape(m, f, self.order)
        _check_dtype(self.values.dtype, self.order)
        if self.values.shape != (m, f // 2):
            raise Unsupported(f"Sparse24 values are {list(self.values.shape)}; {m}x{f} needs [{m}, {f // 2}]")
        # The row stride of fewer than two rows means nothing, and torch changes it freely.
        stride = row_stride(f, self.values.itemsize)
        if self.values.stride(1) != 1 or (m > 1 and self.values.stride(0) != stride):
            raise Unsupported(
                f"Sparse24 values have strides {list(self.values.stride())}; F = {f} needs [{stride}, 1]: "
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
        order = "" if self.order is FragmentOrder.of(self.dtype) else f", {self.order} metadata"
        return f"Sparse24({self.shape[0]}x{self.shape[1]}, {self.dtype}, {self.device}{order})"

    @classmethod
    def empty(
        cls, m: int, f: int, dtype: torch.dtype, device: torch.device | str, order: FragmentOrder | None = None
    ) -> Sparse24:
        """Room for an [M, F] matrix: values and metadata uninitialised, the row padding zero.

        Args:
            order: of E; None takes what ``dtype`` needs.

        Raises:
            Unsupported: M, F, dtype or order is outside what :class:`Sparse24` holds.
        """
        order = order or FragmentOrder.of(dtype)
        values = _empty_values(m, f, dtype, device, order)
        return _unchecked(values, torch.empty(*metadata_shape(m, f), dtype=torch.int32, device=device), (m, f), order)

    def with_room_for(self, dtype: torch.dtype) -> Sparse24:
        """Uninitialised values of another type at the same places; E is shared.

        Raises:
            Unsupported: values of ``dtype`` cannot have E in this order.
        """
        return _unchecked(
            _empty_values(*self.shape, dtype, self.device, self.order), self.metadata, self.shape, self.order
        )

    def to_dense(self) -> Tensor:
        """The pruned matrix [M, F] in the storage type: kept values bit for bit, +0 elsewhere."""
        nibbles = unpack_metadata(self.metadata, *self.shape, self.order)
        first, second = nibbles & 3, nibbles >> 2
        bits = self.values.view(row_of(self.dtype).bits)
        v0, v1 = bits[:, 0::2], bits[:, 1::2]
        zero = bits.new_zeros(())
        columns = [torch.where(first == p, v0, torch.where(second == p, v1, zero)) for p in range(4)]
        return torch.stack(columns, dim=-1).flatten(1).view(self.dtype)

    def to_cutlass(self, tile_k: int = 64) -> tuple[Tensor, Tensor]:
        """Values and E as CUTLASS's sm90 sparse GEMM takes a K-major A, K being F.

        Source: ``Sm90GemmSparseConfig`` in ``sm90_sparse_config.inl`` (``fill_layoutA``, ``fill_layoutE``).

        Args:
            tile_k: K of the consuming GEMM's CTA tile in uncompressed elements, a multiple of 32, or of 64 for 8-bit
                values.

        Returns:
            values, contiguous, F/2 zero-padded to 16 bytes; E, int32 [ceil(F/a), ceil(M/64), 2a], contiguous,
            padded with zero groups, where a = min(tile_k, 128). Values are not copied where there is no padding.

        Raises:
            Unsupported: tile_k is not such a multiple.
        """
        order = _cutlass_order(tile_k, FragmentOrder.of(self.dtype))
        m, f = self.shape
        pad = row_stride(f, self.values.itemsize) - f // 2
        values = self.values
        if pad:
            values = torch.nn.functional.pad(values.view(row_of(self.dtype).bits), (0, pad)).view(self.dtype)
        e = order.pack(unpack_metadata(self.metadata, m, f, self.order))
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
        order = _cutlass_order(tile_k, FragmentOrder.of(values.dtype))
        m, f = shape
        _check_shape(m, f, FragmentOrder.of(values.dtype))
        nbytes = order.nbytes(m, f)
        if e.dtype.is_floating_point or e.nbytes != nbytes or not e.is_contiguous():
            raise Unsupported(
                f"CUTLASS metadata is {_describe(e)}; {m}x{f} at tile_k = {tile_k} needs {nbytes} contiguous bytes"
            )
        if values.dim() != 2 or values.shape[0] != m or values.shape[1] < f // 2:
            raise Unsupported(f"CUTLASS values are {list(values.shape)}; {m}x{f} needs [{m}, {f // 2}] or wider")
        packed = cls.empty(m, f, values.dtype, values.device)
        packed.values.copy_(values[:, : f // 2])
        packed.metadata.copy_(pack_metadata(order.unpack(e, m, f), packed.order))
        return packed


def pack_metadata(nibbles: Tensor, order: FragmentOrder = FragmentOrder.BITS16) -> Tensor:
    """Nibbles in row-major order to E in fragment order.

    Args:
        nibbles: uint8 [M, F/4], each ``i0 | i1 << 2`` with i0 < i1 <= 3 (not checked).
        order: which fragment order.

    Returns:
        int32 ``[ceil(M/64), ceil(F/256), 128, 4]``; rows and columns beyond M and F hold zero groups.

    Raises:
        Unsupported: not a 2-D uint8 tensor, or F is not a positive multiple of what the order needs.
    """
    if nibbles.dim() != 2 or nibbles.dtype != torch.uint8:
        raise Unsupported(f"metadata nibbles are {_describe(nibbles)}; uint8 [M, F/4] is needed")
    m, f = nibbles.shape[0], 4 * nibbles.shape[1]
    _check_shape(m, f, order)
    return _FRAGMENTS[order].pack(nibbles).view(metadata_shape(m, f))


def unpack_metadata(e: Tensor, m: int, f: int, order: FragmentOrder = FragmentOrder.BITS16) -> Tensor:
    """Inverse of :func:`pack_metadata`: uint8 [M, F/4], without the padding.

    Raises:
        Unsupported: E is not contiguous int32 of the shape that M and F need.
    """
    _check_shape(m, f, order)
    _check_metadata(e, m, f)
    return _FRAGMENTS[order].unpack(e, m, f)


@dataclass(frozen=True)
class _Order:
    """How E orders its 16-bit halves, each the four nibbles of 16 columns, lowest columns in the lowest bits.

    A half has eight coordinates: row = 64 i + 16 w + 8 h + g, columns / 16 = ((N a + n) U + u) C + c. Two halves that
    are neighbours in the fastest coordinate make a little-endian 32-bit word.
    """

    n: int
    u: int
    c: int
    axes: str
    """The coordinates as they lie in memory, slowest first."""

    @property
    def columns(self) -> int:
        """Columns of one step of a."""
        return 16 * self.n * self.u * self.c

    def nbytes(self, m: int, f: int) -> int:
        """Size of E with its padding: half a byte per group of 4."""
        return -(-m // _BLOCK_ROWS) * _BLOCK_ROWS * -(-f // self.columns) * self.columns // 8

    def pack(self, nibbles: Tensor) -> Tensor:
        """uint8 [M, F/4] to flat int32, padded with zero groups to whole blocks."""
        m, groups = nibbles.shape
        pad = (0, -groups % (self.columns // 4), 0, -m % _BLOCK_ROWS)
        nibbles = torch.nn.functional.pad(nibbles, pad, value=ZERO_GROUP)
        halves = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int16)
        halves = halves.view(self._sizes(m, 4 * groups)).permute([_COORDINATES.index(axis) for axis in self.axes])
        return halves.contiguous().flatten().view(torch.int32)

    def unpack(self, e: Tensor, m: int, f: int) -> Tensor:
        """Inverse of :meth:`pack`, from contiguous E of any shape and integer dtype; drops the padding."""
        sizes = self._sizes(m, f)
        halves = e.flatten().view(torch.int16).view([sizes[_COORDINATES.index(axis)] for axis in self.axes])
        halves = halves.permute([self.axes.index(axis) for axis in _COORDINATES])
        pairs = halves.reshape(sizes[0] * _BLOCK_ROWS, sizes[4] * self.columns // 16).view(torch.uint8)
        return torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)[:m, : f // 4]

    def _sizes(self, m: int, f: int) -> tuple[int, ...]:
        return -(-m // _BLOCK_ROWS), 4, 2, 8, -(-f // self.columns), self.n, self.u, self.c


_BLOCK_ROWS = 64
_COORDINATES = "iwhganuc"
"""The coordinates of a half, in the order of a row-major matrix of halves."""

_FRAGMENTS = {
    # Block i, a; thread 32 w + 4 g + (2 u + c); word n; the halves are rows g and g + 8.
    FragmentOrder.BITS16: _Order(4, 2, 2, "iawgucnh"),
    # Block i, a; thread 32 w + 4 g + (2 u + h); word n; the halves are 16 columns each.
    FragmentOrder.BITS8: _Order(4, 2, 2, "iawguhnc"),
}
"""The orders in which wgmma.sp reads its registers."""


def _cutlass_order(tile_k: int, order: FragmentOrder) -> _Order:
    """CUTLASS's ``TensorEAtom_16bit`` or ``TensorEAtom_8bit``, stacked along M, then along K.

    Its builder makes the atom min(TileK, 128) wide (``sm90_sparse_gmma_builder.inl``).
    """
    block = 64 if order is FragmentOrder.BITS8 else 32
    if tile_k < block or tile_k % block:
        raise Unsupported(f"tile_k is {tile_k}; CUTLASS's {order} sparse GEMM needs a positive multiple of {block}")
    n = min(tile_k, 128) // block
    return _Order(n, 2, 2, "aiwhgnuc") if order is FragmentOrder.BITS8 else _Order(n, 2, 1, "aiwugcnh")


def _empty_values(m: int, f: int, dtype: torch.dtype, device: torch.device | str, order: FragmentOrder) -> Tensor:
    _check_shape(m, f, order)
    _check_dtype(dtype, order)
    values = torch.empty(m, row_stride(f, dtype.itemsize), dtype=dtype, device=device)
    if values.shape[1] == f // 2:
        return values
    values[:, f // 2 :].zero_()
    return values[:, : f // 2]


def _check_shape(m: int, f: int, order: FragmentOrder) -> None:
    step = order.granule
    if m < 0 or f < step or f % step:
        raise Unsupported(
            f"a 2:4 matrix of {m}x{f} was asked for; M >= 0 and F a positive multiple of {step} are needed"
        )


def _check_dtype(dtype: torch.dtype, order: FragmentOrder) -> None:
    if dtype not in _PACKED_DTYPES:
        raise Unsupported(f"packed values are {dtype}; one of {', '.join(map(str, _PACKED_DTYPES))} is needed")
    if dtype in FP8_DTYPES and order is not FragmentOrder.BITS8:
        raise Unsupported(f"packed values are {dtype} and their metadata is in the {order} order; 8-bit is needed")


def _check_metadata(e: Tensor, m: int, f: int) -> None:
    if e.dtype != torch.int32 or e.shape != metadata_shape(m, f) or not e.is_contiguous():
        raise Unsupported(
            f"2:4 metadata is {_describe(e)}; {m}x{f} needs contiguous torch.int32 {list(metadata_shape(m, f))}"
        )


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else "non-contiguous "
    return f"{layout}{tensor.dtype} {list(tensor.shape)}"


def _flatten(s: Sparse24) -> tuple[list[Any], tuple[tuple[int, int], FragmentOrder]]:
    return [s.values, s.metadata], (s.shape, s.order)


def _unflatten(leaves: Any, context: tuple[tuple[int, int], FragmentOrder]) -> Sparse24:
    # Leaves may be anything here (None, specs, fake tensors), so the checks of __post_init__ must not run.
    values, metadata = leaves
    shape, order = context
    return _unchecked(values, metadata, shape, order)


def _unchecked(values: Any, metadata: Any, shape: tuple[int, int], order: FragmentOrder) -> Sparse24:
    """A Sparse24 of parts that are known to fit. The checks are left out, since they cost more than a launch."""
    s = object.__new__(Sparse24)
    object.__setattr__(s, "values", values)
    object.__setattr__(s, "metadata", metadata)
    object.__setattr__(s, "shape", shape)
    object.__setattr__(s, "order", order)
    return s


pytree.register_pytree_node(Sparse24, _flatten, _unflatten, serialized_type_name="srelu24.Sparse24")
