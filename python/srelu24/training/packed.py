"""TokenSparse24: a matrix pruned to 2:4 along tokens, packed as the weight-gradient kernel takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24, metadata_shape
from srelu24.training.order import padded
from srelu24_gen.errors import Unsupported


def columns(s: Sparse24, features: Tensor) -> Tensor:
    """Some columns of a packed matrix: S [M, F], features int64 [n] -> [M, n]. Only what they need is unpacked."""
    m, (blocks, vectors) = s.shape[0], s.metadata.shape[:2]
    first_of_pair = features // 4 * 2
    kept0, kept1 = s.values[:, first_of_pair], s.values[:, first_of_pair + 1]
    # E in fragment order: row 64 i + 16 w + 8 h + g, column 256 j + 64 q + 16 t + 4 nibble + position.
    halves = s.metadata.view(torch.int16).view(blocks, vectors, 4, 8, 4, 4, 2).permute(0, 2, 6, 3, 1, 4, 5)
    vector, word, thread = features // 256, features % 256 // 64, features % 64 // 16
    nibbles = (
        halves[:, :, :, :, vector, thread, word].reshape(blocks * 64, len(features))[:m].int() >> features % 16 // 4 * 4
    )
    place = features % 4
    zero = kept0.new_zeros(())
    return torch.where((nibbles & 3) == place, kept0, torch.where((nibbles >> 2 & 3) == place, kept1, zero))


@dataclass(frozen=True, eq=False, slots=True)
class TokenSparse24:
    """A matrix [M, F] of which every group of four tokens keeps two values per feature.

    It is the packed form of its transpose [F, P], with P = padded(M) positions in the order of the groups
    (:mod:`srelu24.training.order`) and the values transposed once more, so that features lie side by side.

    Attributes:
        values: [P / 2, F], bf16 or fp16, contiguous: the two kept values of each group, in the order of positions.
        metadata: E of the transpose in fragment order, int32 ``[ceil(F / 64), ceil(P / 256), 128, 4]``. Words of blocks
            of 64 positions beyond the last are not written and not read.
        shape: (M, F), F a multiple of 64.
    """

    values: Tensor
    metadata: Tensor
    shape: tuple[int, int]

    @classmethod
    def empty(cls, m: int, f: int, dtype: torch.dtype, device: torch.device | str) -> TokenSparse24:
        """Room for an [M, F] matrix, uninitialised.

        Raises:
            Unsupported: F is not a positive multiple of 64.
        """
        if f < 64 or f % 64:
            raise Unsupported(f"F = {f} is packed along tokens; a positive multiple of 64 is needed")
        positions = padded(m)
        return cls(
            torch.empty(positions // 2, f, dtype=dtype, device=device),
            torch.empty(metadata_shape(f, positions), dtype=torch.int32, device=device),
            (m, f),
        )

    @classmethod
    def of_transposed(cls, s: Sparse24, m: int) -> TokenSparse24:
        """The matrix [M, F] whose transpose [F, padded(M)] is packed in ``s``. Its values are copied."""
        return cls(s.values.T.contiguous(), s.metadata, (m, s.shape[0]))

    def transposed(self) -> Sparse24:
        """The packed form of the transpose, [F, padded(M)]: a copy."""
        m, f = self.shape
        s = Sparse24.empty(f, padded(m), self.values.dtype, self.values.device)
        s.values.copy_(self.values.T)
        s.metadata.copy_(self.metadata)
        return s

    def to_dense(self) -> Tensor:
        """The pruned matrix by position, [padded(M), F]: +0 where nothing was kept."""
        return self.transposed().to_dense().T
