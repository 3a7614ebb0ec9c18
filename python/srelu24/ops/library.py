"""The torch.library ops of 16-bit operands: CUDA tensors run the kernels, CPU tensors the reference, fakes give shapes.

A call that the kernels cannot take, or whose kernels this machine neither has nor can compile, runs as dense PyTorch
with one warning per reason, where the result has a dense form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from srelu24.db.choice import SPARSE
from srelu24.numerics import reference
from srelu24.numerics.activations import rule_of
from srelu24.numerics.dtypes import DTYPES
from srelu24.numerics.sparse24 import Sparse24, metadata_shape, row_stride
from srelu24.runtime import dense
from srelu24.runtime.dispatch import BATCH, family_of, ffn_way, launcher_of, pair_of
from srelu24.runtime.fallback import reason_of, warn_dense
from srelu24.runtime.launch import Operands
from srelu24.runtime.operands import ALIGNMENT, kernel_reason
from srelu24_gen.errors import ToolchainError, Unsupported
from srelu24_gen.spec import PRUNED_ACTIVATIONS, Activation, Op, pruning_op

_library = torch.library.Library("srelu24", "DEF")
_library.define(
    "ffn(Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, str mode='auto', str activation='relu2') -> Tensor"
)
_library.define("linear(Tensor x, Tensor w, Tensor? bias, str activation) -> Tensor")
for _op in PRUNED_ACTIVATIONS:
    _library.define(f"{_op.value}(Tensor x, Tensor w1, Tensor? b1) -> (Tensor, Tensor)")
    _library.define(f"{_op.value}_count(Tensor x, Tensor w1, Tensor? b1) -> (Tensor, Tensor, Tensor)")
_library.define("sparsify24(Tensor h, str activation) -> (Tensor, Tensor)")
_library.define("linear24(Tensor a, Tensor w, Tensor? bias, str mode='auto') -> Tensor")
_library.define("matmul(Tensor values, Tensor metadata, Tensor w2, Tensor? bias, Tensor? residual) -> Tensor")


# --------------------------------------------------------------------------------------------------- CUDA kernels


def _ffn_cuda(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    mode: str = "auto",
    activation: str = Activation.RELU2,
) -> Tensor:
    reason = kernel_reason(x, w1, w2, b1, b2)
    if reason is not None:
        return fallback_ffn(reason, mode, x, w1, w2, b1, b2, activation)
    m, (f, d) = x.shape[0], w1.shape
    if m == 0:
        return x.new_empty((0, d))
    kind = (x.dtype, b1 is not None, b2 is not None, m, d, f, x.device)
    try:
        if mode not in (SPARSE, BATCH):
            way = ffn_way(mode, *kind, activation)
            if way != SPARSE:
                return dense.ffn(way, x, w1, w2, b1, b2, Activation(activation))
        return pair_of(*kind, mode == BATCH, activation)(x, w1, w2, b1, b2)
    except ToolchainError as error:
        return fallback_ffn(reason_of(error), mode, x, w1, w2, b1, b2, activation)


def _linear_cuda(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    reason = kernel_reason(x, w, bias)
    if reason is not None:
        warn_dense(reason)
        return dense_linear(x, w, bias, activation)
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    try:
        _run(Op.GEMM, Operands(a=x, b=w, bias=bias, out=out), Activation(activation))
    except ToolchainError as error:
        warn_dense(reason_of(error))
        return dense_linear(x, w, bias, activation)
    return out


def _gemm_24_cuda(activation: Activation, x: Tensor, w1: Tensor, b1: Tensor | None) -> tuple[Tensor, Tensor]:
    _require_kernel(x, w1, b1)
    s = Sparse24.empty(x.shape[0], w1.shape[0], x.dtype, x.device)
    _run(pruning_op(activation), Operands(a=x, b=w1, bias=b1, out=s), activation)
    return s.values, s.metadata


def _gemm_24_count_cuda(
    activation: Activation, x: Tensor, w1: Tensor, b1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _require_kernel(x, w1, b1)
    s = Sparse24.empty(x.shape[0], w1.shape[0], x.dtype, x.device)
    counts = torch.zeros(w1.shape[0], dtype=torch.int32, device=x.device)
    _run(pruning_op(activation), Operands(a=x, b=w1, bias=b1, out=s, counts=counts), activation)
    return s.values, s.metadata, counts


def _sparsify24_cuda(h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _require_kernel(h)
    s = Sparse24.empty(h.shape[0], h.shape[1], h.dtype, h.device)
    _run(Op.SPARSIFY24, Operands(a=h, out=s), Activation(activation))
    return s.values, s.metadata


def _matmul_cuda(values: Tensor, metadata: Tensor, w2: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    s = _make_packed(values, metadata, w2.shape[1])
    reason = kernel_reason(w2, bias, residual)
    if reason is not None:
        warn_dense(reason)
        return _run_dense_matmul(s, w2, bias, residual)
    out = torch.empty(s.shape[0], w2.shape[0], dtype=s.dtype, device=s.device)
    try:
        _run(Op.SPGEMM, Operands(a=s, b=w2, bias=bias, residual=residual, out=out))
    except ToolchainError as error:
        warn_dense(reason_of(error))
        return _run_dense_matmul(s, w2, bias, residual)
    return out


def _run(op: Op, o: Operands, activation: Activation = Activation.NONE) -> None:
    """Choose and launch the kernel of ``op`` for operands that :func:`kernel_reason` accepts."""
    m, width = o.a.shape
    if m == 0:
        return
    n, k = (width, 0) if o.b is None else o.b.shape
    options = (o.bias is not None, o.residual is not None, o.counts is not None)
    launcher_of(family_of(op, o.out.dtype, activation, *options), m, n, k, o.out.device)(o)


# ------------------------------------------------------------------------------------- CPU reference and fake kernels


def _ffn_cpu(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    mode: str = "auto",
    activation: str = Activation.RELU2,
) -> Tensor:
    reason = kernel_reason(x, w1, w2, b1, b2)
    if reason is not None:
        return fallback_ffn(reason, mode, x, w1, w2, b1, b2, activation)
    if mode == "dense":
        return _run_dense_ffn(x, w1, w2, b1, b2, activation)
    return reference.ffn(x, w1, w2, b1, b2, activation)


def _linear_cpu(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if x.dtype not in DTYPES:
        return dense_linear(x, w, bias, activation)
    return reference.gemm(x, w, bias, activation=Activation(activation))


def _gemm_24_cpu(activation: Activation, x: Tensor, w1: Tensor, b1: Tensor | None) -> tuple[Tensor, Tensor]:
    s = reference.gemm_24(x, w1, b1, activation)
    return s.values, s.metadata


def _gemm_24_count_cpu(
    activation: Activation, x: Tensor, w1: Tensor, b1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_gemm_24_cpu(activation, x, w1, b1), reference.count_nonzeros(x, w1, b1, activation))


def _sparsify24_cpu(h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    s = reference.sparsify24(h, Activation(activation))
    return s.values, s.metadata


def _matmul_cpu(values: Tensor, metadata: Tensor, w2: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return reference.spgemm(_make_packed(values, metadata, w2.shape[1]), w2, bias, residual)


def _linear24(a: Tensor, w: Tensor, bias: Tensor | None, mode: str = "auto") -> Tensor:
    reason = kernel_reason(a, w, bias)
    if reason is not None:
        warn_dense(reason)
        return torch.nn.functional.linear(a, w, bias)
    (m, f), d = a.shape, w.shape[0]
    if mode == "auto" and a.is_cuda and m:
        mode = ffn_way(mode, a.dtype, False, bias is not None, m, d, f, a.device)
    if mode not in ("auto", SPARSE):
        return torch.nn.functional.linear(a, w, bias)
    try:
        values, metadata = torch.ops.srelu24.sparsify24(a, "none")
    except ToolchainError as error:
        warn_dense(reason_of(error))
        return torch.nn.functional.linear(a, w, bias)
    return torch.ops.srelu24.matmul(values, metadata, w, bias, None)  # type: ignore[no-any-return]


def _ffn_fake(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    mode: str = "auto",
    activation: str = Activation.RELU2,
) -> Tensor:
    return x.new_empty((x.shape[0], w2.shape[0]))


def _linear_fake(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))


def _packed_fake(x: Tensor, f: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty((x.shape[0], row_stride(f)))[:, : f // 2]
    return values, x.new_empty(metadata_shape(x.shape[0], f), dtype=torch.int32)


def _gemm_24_fake(x: Tensor, w1: Tensor, b1: Tensor | None) -> tuple[Tensor, Tensor]:
    return _packed_fake(x, w1.shape[0])


def _gemm_24_count_fake(x: Tensor, w1: Tensor, b1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (*_packed_fake(x, w1.shape[0]), x.new_empty((w1.shape[0],), dtype=torch.int32))


def _sparsify24_fake(h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _packed_fake(h, h.shape[1])


def _matmul_fake(values: Tensor, metadata: Tensor, w2: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return values.new_empty((values.shape[0], w2.shape[0]))


def _linear24_fake(a: Tensor, w: Tensor, bias: Tensor | None, mode: str = "auto") -> Tensor:
    return a.new_empty((a.shape[0], w.shape[0]))


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., object], Callable[..., object], Callable[..., object]]] = {
    "ffn": (_ffn_cuda, _ffn_cpu, _ffn_fake),
    "linear": (_linear_cuda, _linear_cpu, _linear_fake),
    "sparsify24": (_sparsify24_cuda, _sparsify24_cpu, _sparsify24_fake),
    "matmul": (_matmul_cuda, _matmul_cpu, _matmul_fake),
    "linear24": (_linear24, _linear24, _linear24_fake),
}
for _op, _applied in PRUNED_ACTIVATIONS.items():
    _IMPLEMENTATIONS[_op.value] = (partial(_gemm_24_cuda, _applied), partial(_gemm_24_cpu, _applied), _gemm_24_fake)
    _IMPLEMENTATIONS[f"{_op.value}_count"] = (
        partial(_gemm_24_count_cuda, _applied),
        partial(_gemm_24_count_cpu, _applied),
        _gemm_24_count_fake,
    )
for _name, (_cuda, _cpu, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, _cuda, "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"srelu24::{_name}", _fake)


# ------------------------------------------------------------------------------------------------ dense and helpers


def fallback_ffn(
    reason: str,
    mode: str,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str = Activation.RELU2,
) -> Tensor:
    """The FFN in dense PyTorch, with a warning.

    Raises:
        Unsupported: the results must be batch-invariant, and dense ones are not.
    """
    if mode == BATCH:
        raise Unsupported(f"Batch-invariant results need the sparse kernels: {reason}.")
    warn_dense(reason)
    return _run_dense_ffn(x, w1, w2, b1, b2, activation)


def _run_dense_ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: str) -> Tensor:
    return torch.nn.functional.linear(dense_linear(x, w1, b1, activation), w2, b2)


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``act(x w^T + bias)`` in dense PyTorch.

    Raises:
        Unsupported: the activation is unknown.
    """
    return rule_of(activation).plain(torch.nn.functional.linear(x, w, bias))


def _make_packed(values: Tensor, metadata: Tensor, f: int) -> Sparse24:
    """The packed operand. Where a compiler has copied its values without the padding of their rows, they are copied
    once more, into padded rows."""
    m, stride = values.shape[0], row_stride(f)
    if values.stride(1) != 1 or (m > 1 and values.stride(0) != stride) or values.data_ptr() % ALIGNMENT:
        values = torch.nn.functional.pad(values, (0, stride - f // 2))[:, : f // 2]
    return Sparse24(values, metadata, (m, f))


def _run_dense_matmul(s: Sparse24, w2: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = torch.nn.functional.linear(s.to_dense(), w2, bias)
    return y if residual is None else y + residual


def _require_kernel(*tensors: Tensor | None) -> None:
    reason = kernel_reason(*tensors)
    if reason is not None:
        raise Unsupported(f"A packed result needs the sparse kernels: {reason}.")
