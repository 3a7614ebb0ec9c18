"""The order in which tokens are grouped by four for pruning along tokens (docs/training.md, "Groups along tokens").

Neighbours in a text use the same features, so a group of neighbours would lose many non-zeros. The order is a list of
positions: four consecutive ones are a group, and each names a token. It is a fixed function of the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srelu24_gen.errors import Unsupported

BLOCK = 16
"""Rows that one warp of a GEMM's epilogue holds: a group lies inside of them."""
NEIGHBOURS = 0
"""The stride that groups tokens 4i..4i+3: no permutation at all, to compare with."""
NATURAL = 1
"""The stride that takes rows as they are and groups as the epilogue holds them."""


def padded(m: int) -> int:
    """Positions of ``m`` tokens: whole blocks. Those that name no token count as rows of zeros."""
    return -(-m // BLOCK) * BLOCK


def widest_stride(m: int) -> int:
    """The stride that spreads a block over all of ``m`` tokens."""
    return max(NATURAL, padded(m) // BLOCK)


def check_stride(stride: int | None) -> None:
    """Raise Unsupported unless ``stride`` is None (the widest) or a whole number from 0."""
    if stride is not None and (not isinstance(stride, int) or isinstance(stride, bool) or stride < 0):
        raise Unsupported(
            f"token_stride is {stride!r}; a number of tokens from 1, 0 for groups of neighbours, "
            "or None for the widest stride is needed."
        )


def row_order(m: int, stride: int | None, device: torch.device) -> Tensor:
    """The token of every row: int64 [padded(m)], a permutation. Tokens from ``m`` on do not exist.

    With stride L, row 16 j + i of a band of 16 L rows is the band's token L i + j; what is left over after the whole
    bands keeps its order. Arguments as in :func:`token_order`.
    """
    tokens = torch.arange(padded(m), device=device)
    if stride == NEIGHBOURS:
        return tokens
    stride = widest_stride(m) if stride is None else stride
    whole = len(tokens) - len(tokens) % (BLOCK * stride)
    bands = tokens[:whole].view(-1, BLOCK, stride).transpose(1, 2).reshape(-1)
    return torch.cat((bands, tokens[whole:]))


def token_order(m: int, stride: int | None, device: torch.device) -> Tensor:
    """The token at every position: int64 [padded(m)], a permutation. Tokens from ``m`` on do not exist.

    In each block of 16 rows, position p is row p // 2 + 8 (p % 2), so a group holds rows 2i, 2i + 8, 2i + 1, 2i + 9: in
    the accumulators of a wgmma these meet in two neighbouring threads.

    Args:
        m: tokens.
        stride: L; None is the widest, NATURAL takes rows as they are, NEIGHBOURS takes positions as they are.
    """
    tokens = row_order(m, stride, device)
    if stride == NEIGHBOURS:
        return tokens
    return tokens.view(-1, 2, BLOCK // 2).transpose(1, 2).reshape(-1)
