"""The FFN without pruning, in every way that may be the fastest: cuBLAS, our own GEMMs, or one of each.

All compute what docs/numerics.md says of ``gemm`` with squared ReLU and of ``gemm``; they differ in the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from srelu24.numerics.activations import rule_of
from srelu24.runtime.dispatch import family_of, launcher_of
from srelu24.runtime.kept_memory import allocate_kept
from srelu24.runtime.launch import Operands
from srelu24.runtime.loader import stream
from srelu24_gen.spec import Activation, Op

WAYS = {
    "cublas": "cuBLAS for both GEMMs, relu in the first one's epilogue, squares in place",
    "mixed": "our GEMM with squared ReLU in its epilogue, then cuBLAS",
    "gemm": "our GEMM with squared ReLU in its epilogue, then our dense GEMM",
}
"""Name of each way, and what it is. Records store a time under these names."""


def ffn(
    way: str,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: Activation = Activation.RELU2,
) -> Tensor:
    """``act(x w1^T + b1) w2^T + b2`` on a GPU: x [M, D], w1 [F, D], w2 [D, F] -> [M, D].

    The operands are trusted, as those of :func:`srelu24.runtime.launch.run` are.
    """
    h = library_gemm(x, w1, b1, activation) if way == "cublas" else _run_own_gemm(x, w1, b1, activation)
    return _run_own_gemm(h, w2, b2, Activation.NONE) if way == "gemm" else linear(h, w2, b2)


def library_gemm(x: Tensor, w: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """``act(x w^T + bias)`` by cuBLAS, which has relu in its epilogue. With squared ReLU that is two kernels: the
    squares are taken in place."""
    if activation not in (Activation.RELU, Activation.RELU2):
        return rule_of(activation).plain(linear(x, w, bias))
    h = torch._addmm_activation(_find_zeros(w) if bias is None else bias, x, w.t())
    return h.mul_(h) if activation is Activation.RELU2 else h


def _run_own_gemm(x: Tensor, w: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    m, (n, k) = x.shape[0], w.shape
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    family = family_of(Op.GEMM, x.dtype, activation, bias is not None)
    launcher_of(family, m, n, k, x.device)(Operands(a=x, b=w, bias=bias, out=out))
    return out


_kept_zeros: dict[tuple[int, torch.dtype, torch.device, int], Tensor] = {}


def _find_zeros(w: Tensor) -> Tensor:
    """A bias of zeros: without a bias cuBLASLt has no relu. It is kept for the current stream; a CUDA graph gets zeros
    of its own."""
    if w.is_cuda and torch.cuda.is_current_stream_capturing():
        return w.new_zeros(w.shape[0])
    key = (w.shape[0], w.dtype, w.device, stream(w.device.index) if w.is_cuda else 0)
    if (found := _kept_zeros.get(key)) is None:
        (found,) = allocate_kept(lambda: (w.new_zeros(w.shape[0]),), w.device)
        _kept_zeros[key] = found
    return found
