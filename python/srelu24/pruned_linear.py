"""A linear layer whose input is pruned to 2:4 on the way: the second half of a squared-ReLU FFN on its own.

For modules whose code between the two layers has to stay, such as RWKV's channel mix with its gate. Activation and
pruning then go over memory, which :func:`srelu24.ffn` does not need (``unfused`` in docs/benchmarks.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from srelu24 import ops
from srelu24.dispatch import SPARSE, ffn_way
from srelu24.fallback import warn_dense
from srelu24.operands import (
    autocast,
    autocasting,
    check_matrix,
    check_mode,
    check_tensor,
    check_vector,
    differentiated,
    kernel_reason,
)
from srelu24_gen.errors import ToolchainError, Unsupported

_library = torch.library.Library("srelu24", "FRAGMENT")
_library.define("linear24(Tensor a, Tensor w, Tensor? bias, str mode='auto') -> Tensor")


def linear24(a: Tensor, w: Tensor, bias: Tensor | None = None, *, mode: str = "auto") -> Tensor:
    """``prune24(a) w^T + bias``: of every 4 neighbours along F the 2 of largest magnitude enter the product.

    On a GPU, "auto" is dense and unpruned where :func:`srelu24.ffn` of these sizes would be (few tokens). Where no
    kernel takes the operands, and while gradients are recorded, it is dense with one warning.

    Args:
        a: [..., F], bf16 or fp16; squared-ReLU activations, so that pruning drops little.
        w: [D, F]. bias: [D].
        mode: "auto", "sparse" (always prune) or "dense" (never). On a CPU "auto" prunes.

    Returns:
        [..., D] in the type of ``a``.

    Raises:
        Unsupported: ranks, sizes, types or devices do not fit together.
    """
    mode = check_mode(mode, "run")
    check_tensor("a", a)
    if a.dim() < 1:
        raise Unsupported("a has no dimensions; it must be [..., F].")
    if autocasting(a):
        a, w, bias = autocast(a, w, bias)  # type: ignore[assignment]
    check_matrix("w", w, (None, a.shape[-1]), a)
    check_vector("bias", bias, w.shape[0], a)
    if differentiated(a, w, bias):
        warn_dense(ops.NO_BACKWARD)
        return functional.linear(a, w, bias)
    y: Tensor = torch.ops.srelu24.linear24(a.reshape(-1, a.shape[-1]), w, bias, mode)
    return y.view(*a.shape[:-1], w.shape[0])


def _linear24(a: Tensor, w: Tensor, bias: Tensor | None, mode: str = "auto") -> Tensor:
    reason = kernel_reason(a, w, bias)
    if reason is not None:
        warn_dense(reason)
        return functional.linear(a, w, bias)
    (m, f), d = a.shape, w.shape[0]
    if mode == "auto" and a.is_cuda and m:
        mode = ffn_way(mode, a.dtype, False, bias is not None, m, d, f, a.device)
    if mode not in ("auto", SPARSE):
        return functional.linear(a, w, bias)
    try:
        values, metadata = torch.ops.srelu24.sparsify24(a, "none")
    except ToolchainError as error:
        warn_dense(str(error))
        return functional.linear(a, w, bias)
    return torch.ops.srelu24.matmul(values, metadata, w, bias, None)  # type: ignore[no-any-return]


def _linear24_fake(a: Tensor, w: Tensor, bias: Tensor | None, mode: str = "auto") -> Tensor:
    return a.new_empty((a.shape[0], w.shape[0]))


_library.impl("linear24", _linear24, "CUDA")
_library.impl("linear24", _linear24, "CPU")
torch.library.register_fake("srelu24::linear24", _linear24_fake)


class Linear24(nn.Linear):
    """``nn.Linear`` through :func:`linear24`; parameters and state dict are those of ``nn.Linear``."""

    mode: str = "auto"
    """As for :func:`linear24`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., F] -> [..., D]."""
        return linear24(input, self.weight, self.bias, mode=self.mode)
