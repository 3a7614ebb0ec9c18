"""TokenSparse24: a matrix pruned to 2:4 along tokens, packed as the weight-gradient kernel takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srelu24.sparse24 import Sparse24, metadata_shape
from srelu24.training.order import padded
from srelu24_gen.errors import Unsupported


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
        """The same matrix from the packed form of its transpose [F, padded(M)], which is copied."""
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
