"""How the operations run on DTensors: importing this module registers the rules.

An FFN is sharded by tokens (every tensor of M rows on dimension 0), or along F: W1 by rows, W2 by columns. Then the
packed S stays on its rank and Y is a partial sum. Groups of 4 must not be cut, and E's blocks of 64 x 256 neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from srelu24.ops import functions  # noqa: F401 (defines the operations)
from srelu24_gen.spec import PRUNED_ACTIVATIONS

Rule = tuple[list[Any], list[Any]]
"""Placements of the outputs and of the inputs, along one dimension of the mesh; None where there is no tensor."""

ROWS, COLUMNS, ALL = Shard(0), Shard(1), Replicate()
_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 256


def _where_given(tensor: Any, placement: Any) -> Any:
    """The placement of an optional tensor; None where it is left out."""
    return None if tensor is None else placement


def _splits_into_whole_units(tensor: Any, dimension: int, unit: int) -> bool:
    """Whether every rank of the mesh gets whole units of a dimension."""
    return bool(tensor.shape[dimension] % (unit * tensor.mesh.size()) == 0)


def _ffn(x: Any, w1: Any, w2: Any, b1: Any, b2: Any, *options: str) -> Sequence[Rule]:
    rest = [None] * len(options)  # mode and activation, as far as they are given
    rules: list[Rule] = [
        ([ALL], [ALL, ALL, ALL, _where_given(b1, ALL), _where_given(b2, ALL), *rest]),
        ([ROWS], [ROWS, ALL, ALL, _where_given(b1, ALL), _where_given(b2, ALL), *rest]),
    ]
    if _splits_into_whole_units(w1, 0, 4):
        rules.append(([Partial()], [ALL, ROWS, COLUMNS, _where_given(b1, ROWS), _where_given(b2, Partial()), *rest]))
    return rules


def _linear(x: Any, w: Any, bias: Any, activation: str) -> Sequence[Rule]:
    rules: list[Rule] = [
        ([ALL], [ALL, ALL, _where_given(bias, ALL), None]),
        ([ROWS], [ROWS, ALL, _where_given(bias, ALL), None]),
        ([COLUMNS], [ALL, ROWS, _where_given(bias, ROWS), None]),
    ]
    if activation == "none":
        rules.append(([Partial()], [COLUMNS, COLUMNS, _where_given(bias, Partial()), None]))
    return rules


def _linear24(a: Any, w: Any, bias: Any, mode: str | None = None) -> Sequence[Rule]:
    rest = [None] * (mode is not None)
    rules: list[Rule] = [
        ([ALL], [ALL, ALL, _where_given(bias, ALL), *rest]),
        ([ROWS], [ROWS, ALL, _where_given(bias, ALL), *rest]),
    ]
    if _splits_into_whole_units(w, 1, 4):
        rules.append(([Partial()], [COLUMNS, COLUMNS, _where_given(bias, Partial()), *rest]))
    return rules


def _gemm_24(x: Any, w1: Any, b1: Any) -> Sequence[Rule]:
    rules: list[Rule] = [([ALL, ALL], [ALL, ALL, _where_given(b1, ALL)])]
    if _splits_into_whole_units(x, 0, _BLOCK_ROWS):
        rules.append(([ROWS, ROWS], [ROWS, ALL, _where_given(b1, ALL)]))
    if _splits_into_whole_units(w1, 0, _BLOCK_COLUMNS):
        rules.append(([COLUMNS, COLUMNS], [ALL, ROWS, _where_given(b1, ROWS)]))
    return rules


def _gemm_24_count(x: Any, w1: Any, b1: Any) -> Sequence[Rule]:
    counts = {0: ALL, 1: Partial(), 2: ROWS}  # of all rows; of a rank's rows; of a rank's features
    rules = _gemm_24(x, w1, b1)
    return [([*outputs, counts[_kind(outputs[0])]], inputs) for outputs, inputs in rules]


def _kind(values: Any) -> int:
    return 0 if values == ALL else 1 if values == ROWS else 2


def _sparsify24(h: Any, activation: str) -> Sequence[Rule]:
    rules: list[Rule] = [([ALL, ALL], [ALL, None])]
    if _splits_into_whole_units(h, 0, _BLOCK_ROWS):
        rules.append(([ROWS, ROWS], [ROWS, None]))
    if _splits_into_whole_units(h, 1, _BLOCK_COLUMNS):
        rules.append(([COLUMNS, COLUMNS], [COLUMNS, None]))
    return rules


def _matmul(values: Any, metadata: Any, w2: Any, bias: Any, residual: Any) -> Sequence[Rule]:
    rules: list[Rule] = [([ALL], [ALL, ALL, ALL, _where_given(bias, ALL), _where_given(residual, ALL)])]
    if _splits_into_whole_units(values, 0, _BLOCK_ROWS):
        rules.append(([ROWS], [ROWS, ROWS, ALL, _where_given(bias, ALL), _where_given(residual, ROWS)]))
    if _splits_into_whole_units(w2, 1, _BLOCK_COLUMNS):
        partial = [_where_given(bias, Partial()), _where_given(residual, Partial())]
        rules.append(([Partial()], [COLUMNS, COLUMNS, COLUMNS, *partial]))
    return rules


_RULES: dict[str, Callable[..., Sequence[Rule]]] = {
    "ffn": _ffn,
    "linear": _linear,
    "linear24": _linear24,
    **{op.value: _gemm_24 for op in PRUNED_ACTIVATIONS},
    **{f"{op.value}_count": _gemm_24_count for op in PRUNED_ACTIVATIONS},
    "sparsify24": _sparsify24,
    "matmul": _matmul,
}
for _name, _rule in _RULES.items():
    register_sharding(getattr(torch.ops.srelu24, _name).default)(_rule)
