"""The kernels of a training step, one function each (docs/training.md, "The kernels").

Rows of packed matrices are in the order of ``token_stride`` (:mod:`srelu24.training.order`); dense matrices of M rows
are in the order of the tokens, and the kernels read and write their rows permuted. Operands are trusted: their sizes
are those that :func:`srelu24_gen.space.supports_problem` takes, dense ones are contiguous in their last dimension and
16-byte aligned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from srelu24 import dispatch
from srelu24.launch import DTYPES, Arguments, GemmLauncher, Operands, row_stride, stream
from srelu24.sparse24 import Sparse24
from srelu24.tensor_map import tensor_map
from srelu24.training.order import BLOCK, NATURAL, widest_stride
from srelu24.training.packed import TokenSparse24
from srelu24_gen.errors import LaunchError, Unsupported
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem


def dense_hidden(x: Tensor, w1: Tensor, b1: Tensor | None, out: Tensor) -> None:
    """GEMM1 of a dense step: ``relu2(x w1^T + b1)`` to ``out`` [M, F], rows in the order of the tokens.

    Raises:
        As :func:`pruned_hidden`.
    """
    m, (f, d) = x.shape[0], w1.shape
    if m:
        family = dispatch.family_of(Op.GEMM, x.dtype, Activation.RELU2, b1 is not None)
        dispatch.launcher_of(family, m, f, d, x.device)(Operands(a=x, b=w1, bias=b1, out=out))


def pruned_hidden(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    token_stride: int | None,
    out: tuple[Sparse24, TokenSparse24] | None = None,
) -> tuple[Sparse24, TokenSparse24, Tensor]:
    """GEMM1: S packed along features and along tokens, and the non-zeros of every feature before pruning, int32 [F].

    Args:
        x: [M, D]. w1: [F, D]. b1: [F].
        out: room for both forms of S; new where None.

    Raises:
        Unsupported: no kernel takes these sizes or this stride.
        CompileError, LaunchError: the kernel could not be built or launched.
    """
    m, f = x.shape[0], w1.shape[0]
    if out is None:
        out = Sparse24.empty(m, f, x.dtype, x.device), TokenSparse24.empty(m, f, x.dtype, x.device)
    s, along_tokens = out
    counts = torch.zeros(f, dtype=torch.int32, device=x.device)
    family = Family(
        Op.GEMM_RELU2_24,
        DTYPES[x.dtype],
        Activation.RELU2,
        bias=b1 is not None,
        count_nonzeros=True,
        tokens=True,
        permuted=True,
    )
    _launch(
        family,
        (m, f, x.shape[1]),
        a=x,
        b=w1,
        bias=b1,
        out=s.values,
        out_metadata=s.metadata,
        counts=counts,
        tokens=(*_pointers(along_tokens), 0, 0, f, 0, *row_steps(m, token_stride)),
    )
    return s, along_tokens, counts


def hidden_gradient(
    g: Tensor, w2_transposed: Tensor, s: Sparse24, token_stride: int | None
) -> tuple[Sparse24, TokenSparse24]:
    """dY1 packed along features, with the metadata of ``s``, and along tokens.

    Args:
        g: dL/dY [M, D]. w2_transposed: W2^T [F, D]. s: what the forward pass kept.

    Raises:
        As :func:`pruned_hidden`.
    """
    m, f = s.shape
    values = torch.empty_like(s.values)
    along_tokens = TokenSparse24.empty(m, f, g.dtype, g.device)
    saved = (s.values.data_ptr(), s.metadata.data_ptr())
    _launch(
        Family(Op.GEMM_DRELU2_24, DTYPES[g.dtype], tokens=True, permuted=True),
        (m, f, g.shape[1]),
        a=g,
        b=w2_transposed,
        out=values,
        tokens=(*_pointers(along_tokens), *saved, f, s.values.stride(0), *row_steps(m, token_stride)),
    )
    return Sparse24(values, s.metadata, s.shape), along_tokens


def product(s: Sparse24, w: Tensor, bias: Tensor | None, token_stride: int | None) -> Tensor:
    """``S w^T + bias`` with its rows back in the order of the tokens: S [M, K] packed, w [N, K] -> [M, N].

    Raises:
        As :func:`pruned_hidden`.
    """
    m, n = s.shape[0], w.shape[0]
    out = torch.empty(m, n, dtype=w.dtype, device=w.device)
    _launch(
        Family(Op.SPGEMM, DTYPES[w.dtype], bias=bias is not None, permuted=True),
        (m, n, s.shape[1]),
        a=s.values,
        metadata=s.metadata,
        b=w,
        bias=bias,
        out=out,
        tokens=(0,) * 6 + row_steps(m, token_stride),
    )
    return out


def weight_gradient(
    a: TokenSparse24,
    b: Tensor,
    token_stride: int | None,
    *,
    out: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """``A^T B`` summed over tokens in fp32: A [M, F] packed along tokens, B [M, N] -> [F, N], or transposed [N, F].

    Args:
        out: added to; fp32 or the type of ``b``. None makes a new one in the type of ``b``.

    Raises:
        As :func:`pruned_hidden`.
    """
    m, f = a.shape
    accumulate = out is not None
    if out is None:
        shape = (b.shape[1], f) if transposed else (f, b.shape[1])
        out = torch.empty(shape, dtype=b.dtype, device=b.device)
    family = Family(
        Op.SPGEMM_TOKENS,
        DTYPES[b.dtype],
        out=DType.FP32 if out.dtype is torch.float32 else None,
        accumulate=accumulate,
        transposed=transposed,
    )
    _launch(
        family,
        (f, b.shape[1], m),
        a=a.values,
        metadata=a.metadata,
        b=b,
        out=out,
        tokens=(0,) * 6 + row_steps(m, token_stride),
    )
    return out


def row_steps(m: int, stride: int | None) -> tuple[int, int]:
    """Tokens from one row of a block of 16 to the next, and from one block to the next.

    Raises:
        Unsupported: the kernels have the natural and the widest stride only.
    """
    widest = widest_stride(m)
    if stride is None or stride == widest:
        return widest, 1
    if stride == NATURAL:
        return 1, BLOCK
    raise Unsupported(f"token_stride is {stride}; the kernels take 1 and the widest, None")


_fixed: ContextVar[KernelConfig | None] = ContextVar("_fixed", default=None)


@contextmanager
def fixed_config(config: KernelConfig) -> Iterator[None]:
    """Every kernel of this module that is launched inside has this configuration: to compare configurations."""
    token = _fixed.set(config)
    try:
        yield
    finally:
        _fixed.reset(token)


def _launcher(family: Family, sizes: tuple[int, int, int], device: torch.device) -> TrainingLauncher:
    target = dispatch.gpu_of(device)
    config = _fixed.get() or dispatch.choose(Problem(family, *sizes), target).config
    return launcher_for(KernelSpec(family, config, target.arch), device.index)


@functools.cache
def launcher_for(spec: KernelSpec, device: int) -> TrainingLauncher:
    """The loaded kernel of ``spec`` on ``cuda:device``.

    Raises:
        LaunchError: the kernel is not loaded yet and a CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise LaunchError(f"{spec.name} is not loaded yet; run a training step once before capturing a CUDA graph.")
    return TrainingLauncher(spec, device)


def _launch(
    family: Family,
    sizes: tuple[int, int, int],
    *,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    tokens: tuple[int, ...],
    metadata: Tensor | None = None,
    out_metadata: Tensor | None = None,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    if min(sizes) == 0:  # no tokens: a product of nothing
        if family.op is Op.SPGEMM_TOKENS and not family.accumulate:
            out.zero_()
        return
    launcher = _launcher(family, sizes, b.device)
    launcher.launch(
        Arguments(
            a=a.data_ptr(),
            b=b.data_ptr(),
            out=out.data_ptr(),
            metadata=_address(metadata),
            out_metadata=_address(out_metadata),
            bias=_address(bias),
            residual=0,
            counts=_address(counts),
            partials=0,
            flags=0,
            m=sizes[0],
            n=sizes[1],
            k=sizes[2],
            a_stride=row_stride(a),
            b_stride=row_stride(b),
            out_stride=row_stride(out),
            residual_stride=0,
            tokens=tokens,
        )
    )


def _pointers(x: TokenSparse24) -> tuple[int, int]:
    return x.values.data_ptr(), x.metadata.data_ptr()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class TrainingLauncher(GemmLauncher):
    """A training kernel of one spec on one device."""

    def launch(self, x: Arguments) -> None:
        """Launch on the current stream, without synchronising."""
        device = self.kernel.device
        if self.spec.config.stream_k:
            space = self._workspace(x.m, x.n, x.k, torch.device("cuda", device))
            if space is not None:
                x = x._replace(partials=space.partials.data_ptr(), flags=space.flags.data_ptr())
        block, grid = self._encoded(x)
        self.kernel.launch(grid, block.address, stream(device))

    def _maps(self, x: Arguments) -> tuple[bytes, bytes, bytes, bytes]:
        family, c = self.spec.family, self.spec.config
        row_step, block_step = x.tokens[-2:]
        if family.op is Op.SPGEMM:  # its A is packed, in the order of rows; only its output is permuted
            return super()._maps(x)
        if family.op is not Op.SPGEMM_TOKENS:
            rows = tensor_map(
                family.dtype,
                x.a,
                dims=(x.k, BLOCK, x.m // BLOCK),
                strides=(row_step * x.a_stride, block_step * x.a_stride),
                box=(c.tile_k, BLOCK, c.tile_m // BLOCK),
                swizzle_bytes=128,
            )
            return rows, *self._maps_b(x.b, x.n, x.k, x.b_stride)
        features = tensor_map(
            family.dtype,
            x.a,
            dims=(64, x.k // 2, x.m // 64),
            strides=(x.a_stride, 64),
            box=(64, c.tile_k // 2, c.tile_m // 64),
            swizzle_bytes=128,
        )
        columns = tensor_map(
            family.dtype,
            x.b,
            dims=(64, 2, 8, x.k // BLOCK, x.n // 64),
            strides=(8 * row_step * x.b_stride, row_step * x.b_stride, block_step * x.b_stride, 64),
            box=(64, 2, 8, c.tile_k // BLOCK, c.tile_n // c.cluster_m // 64),
            swizzle_bytes=128,
        )
        return features, columns, columns, columns
