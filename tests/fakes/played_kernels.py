"""The training kernels on the CPU: each function does what its kernel does, with the numerics reference."""

from __future__ import annotations

import torch
from torch import Tensor

from srelu24.numerics import reference as numerics
from srelu24.numerics.sparse24 import Sparse24, unpack_metadata
from srelu24.training.kernels import TrainingOperands
from srelu24.training.order import row_order, token_order
from srelu24.training.packed import TokenSparse24
from srelu24_gen.spec import Activation, KernelSpec, Op

CPU = torch.device("cpu")


def along_tokens(s: Sparse24) -> TokenSparse24:
    m, f = s.shape
    return of_positions(s.to_dense().view(m // 16, 2, 8, f).transpose(1, 2).reshape(m, f))


def of_positions(dense: Tensor) -> TokenSparse24:
    """Rows [M, F] in the order of positions, pruned along them."""
    return TokenSparse24.of_transposed(numerics.sparsify24(dense.T.contiguous(), Activation.NONE), len(dense))


def pruned_hidden(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    stride: int | None,
    out: tuple[Sparse24, TokenSparse24] | None = None,
) -> tuple[Sparse24, TokenSparse24, Tensor]:
    s = numerics.gemm_relu2_24(x[row_order(len(x), stride, CPU)], w1, b1)
    if out is None:
        return s, along_tokens(s), numerics.count_nonzeros(x, w1, b1)
    for mine, made in zip(out, (s, along_tokens(s)), strict=True):
        mine.values.copy_(made.values)
        mine.metadata.copy_(made.metadata)
    return (*out, numerics.count_nonzeros(x, w1, b1))


def dense_hidden(x: Tensor, w1: Tensor, b1: Tensor | None, out: Tensor) -> None:
    out.copy_(numerics.gemm(x, w1, b1, activation=Activation.RELU2))


def product(s: Sparse24, w: Tensor, bias: Tensor | None, stride: int | None) -> Tensor:
    y = torch.empty(s.shape[0], w.shape[0], dtype=w.dtype)
    y[row_order(s.shape[0], stride, CPU)] = numerics.spgemm(s, w, bias)
    return y


def hidden_gradient(
    g: Tensor, w2_transposed: Tensor, s: Sparse24, stride: int | None
) -> tuple[Sparse24, TokenSparse24]:
    m, f = s.shape
    ds = numerics.gemm(g[row_order(m, stride, CPU)], w2_transposed).float()
    dense = s.to_dense().float()
    dy1 = torch.where(dense != 0, 2 * ds * dense.sqrt(), 0.0).to(g.dtype)
    nibbles = unpack_metadata(s.metadata, m, f).long()
    places = torch.stack((nibbles & 3, nibbles >> 2), dim=-1)
    packed = Sparse24(dy1.view(m, f // 4, 4).gather(2, places).view(m, f // 2), s.metadata, s.shape)
    return packed, along_tokens(packed)


def weight_gradient(
    a: TokenSparse24, b: Tensor, stride: int | None, *, out: Tensor | None = None, transposed: bool = False
) -> Tensor:
    made = a.to_dense().float().T @ b[token_order(len(b), stride, CPU)].float()
    made = made.T.contiguous() if transposed else made
    if out is None:
        return made.to(b.dtype)
    return out.add_(made)


def transposed(w: Tensor) -> Tensor:
    return w.T.contiguous()


def dense_columns(
    s: Sparse24, columns: Tensor, stride: int | None, along_tokens: TokenSparse24 | None = None
) -> Tensor:
    if along_tokens is not None:
        clear_columns(along_tokens, columns)
    found = s.to_dense()[:, columns]
    return torch.empty_like(found).index_copy_(0, row_order(s.shape[0], stride, CPU), found)


def clear_columns(along_tokens: TokenSparse24, columns: Tensor) -> None:
    along_tokens.values[:, columns] = 0


def run(spec: KernelSpec, o: TrainingOperands) -> None:
    """The kernel of a spec, on its operands."""
    op, stride = spec.family.op, o.token_stride
    if op is Op.GEMM_RELU2_24:
        *_, counts = pruned_hidden(o.a, o.b, o.bias, stride, (o.out, o.along_tokens))
        o.counts += counts
    elif op is Op.GEMM_DRELU2_24:
        dy1, along = hidden_gradient(o.a, o.b, o.saved, stride)
        o.out.values.copy_(dy1.values)
        o.along_tokens.values.copy_(along.values)
        o.along_tokens.metadata.copy_(along.metadata)
    elif op is Op.SPGEMM:
        o.out.copy_(product(o.a, o.b, o.bias, stride))
    else:
        into = o.out if spec.family.accumulate else None
        o.out.copy_(weight_gradient(o.a, o.b, stride, out=into, transposed=spec.family.transposed))
