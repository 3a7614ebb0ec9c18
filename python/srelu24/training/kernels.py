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
from dataclasses import dataclass

import torch
from torch import Tensor

from srelu24.numerics.dtypes import DTYPES
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime import dispatch
from srelu24.runtime.arguments import Arguments, Operands, TokenArguments, address, row_stride
from srelu24.runtime.gemm import GemmLauncher
from srelu24.runtime.launch import load_kernel
from srelu24.runtime.loader import stream
from srelu24.runtime.tensor_map import tensor_map
from srelu24.training.order import BLOCK, NATURAL, widest_stride
from srelu24.training.packed import TokenSparse24
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget


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
        TrainingOperands(
            a=x, b=w1, out=s, token_stride=token_stride, bias=b1, counts=counts, along_tokens=along_tokens
        ),
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
    dy1 = Sparse24(torch.empty_like(s.values), s.metadata, s.shape)
    along_tokens = TokenSparse24.empty(*s.shape, g.dtype, g.device)
    _launch(
        Family(Op.GEMM_DRELU2_24, DTYPES[g.dtype], tokens=True, permuted=True),
        TrainingOperands(a=g, b=w2_transposed, out=dy1, token_stride=token_stride, along_tokens=along_tokens, saved=s),
    )
    return dy1, along_tokens


def product(s: Sparse24, w: Tensor, bias: Tensor | None, token_stride: int | None) -> Tensor:
    """``S w^T + bias`` with its rows back in the order of the tokens: S [M, K] packed, w [N, K] -> [M, N].

    Raises:
        As :func:`pruned_hidden`.
    """
    out = torch.empty(s.shape[0], w.shape[0], dtype=w.dtype, device=w.device)
    family = Family(Op.SPGEMM, DTYPES[w.dtype], bias=bias is not None, permuted=True)
    _launch(family, TrainingOperands(a=s, b=w, out=out, token_stride=token_stride, bias=bias))
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
        out: the product is added to it; fp32 or the type of ``b``. None makes a new tensor in the type of ``b``.

    Raises:
        As :func:`pruned_hidden`.
    """
    accumulate = out is not None
    if out is None:
        shape = (a.shape[1], b.shape[1])
        out = torch.empty(shape[::-1] if transposed else shape, dtype=b.dtype, device=b.device)
    family = Family(
        Op.SPGEMM_TOKENS,
        DTYPES[b.dtype],
        out=DType.FP32 if out.dtype is torch.float32 else None,
        accumulate=accumulate,
        transposed=transposed,
    )
    _launch(family, TrainingOperands(a=a, b=b, out=out, token_stride=token_stride))
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
    """Launch every kernel of this module with this configuration inside of the context, to compare configurations."""
    token = _fixed.set(config)
    try:
        yield
    finally:
        _fixed.reset(token)


@dataclass(slots=True, kw_only=True)
class TrainingOperands:
    """The tensors of one launch. Shapes as in :class:`srelu24_gen.spec.Op`, rows in the order that the module says.

    a: [M, K]; packed for spgemm; for spgemm_tokens [K, M], packed along tokens.
    b: [N, K]; [K, N] for spgemm_tokens.
    out: [M, N], or [N, M] where the family is transposed; packed for a GEMM that packs. Of gemm_drelu2_24 only the
        values are written, its metadata is that of ``saved``.
    counts: int32 [N], added to.
    along_tokens: what a GEMM that packs packs along tokens as well, [M, N].
    saved: S [M, N], for gemm_drelu2_24.
    """

    a: Tensor | Sparse24 | TokenSparse24
    b: Tensor
    out: Tensor | Sparse24
    token_stride: int | None
    bias: Tensor | None = None
    counts: Tensor | None = None
    along_tokens: TokenSparse24 | None = None
    saved: Sparse24 | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N and K."""
        if isinstance(self.a, TokenSparse24):
            return self.a.shape[1], self.b.shape[1], self.a.shape[0]
        return self.a.shape[0], self.b.shape[0], self.a.shape[1]


def run(spec: KernelSpec, o: TrainingOperands) -> None:
    """Launch this very kernel on the current stream, without synchronising.

    Raises:
        Unsupported: the kernels do not have this stride.
        CompileError, LaunchError: the kernel could not be built or launched.
    """
    launcher_for(spec, o.b.device.index).launch(_arguments_of(o))


@functools.cache
def launcher_for(spec: KernelSpec, device: int) -> TrainingLauncher:
    """The loaded kernel of ``spec`` on ``cuda:device``.

    Raises:
        CompileError, ToolchainError, LaunchError: as :func:`srelu24.runtime.launch.load_kernel`.
    """
    return TrainingLauncher(spec, load_kernel(spec, device))


def spec_for(family: Family, sizes: tuple[int, int, int], target: GpuTarget) -> KernelSpec:
    """The kernel that answers: by the tuning records, unless a configuration is fixed.

    Raises:
        Unsupported: no kernel takes these sizes.
    """
    config = _fixed.get() or dispatch.choose(Problem(family, *sizes), target).config
    return KernelSpec(family, config, target.arch)


def _launch(family: Family, o: TrainingOperands) -> None:
    sizes = o.sizes
    if min(sizes) == 0:  # no tokens: a product of nothing
        if family.op is Op.SPGEMM_TOKENS and not family.accumulate:
            assert isinstance(o.out, Tensor)
            o.out.zero_()
        return
    run(spec_for(family, sizes, dispatch.gpu_of(o.b.device)), o)


def _arguments_of(o: TrainingOperands) -> Arguments:
    m, n, k = o.sizes
    a = o.a if isinstance(o.a, Tensor) else o.a.values
    out = o.out.values if isinstance(o.out, Sparse24) else o.out
    along, saved = o.along_tokens, o.saved
    row_step, block_step = row_steps(o.a.shape[0], o.token_stride)
    return Arguments(
        a=a.data_ptr(),
        b=o.b.data_ptr(),
        out=out.data_ptr(),
        metadata=0 if isinstance(o.a, Tensor) else o.a.metadata.data_ptr(),
        out_metadata=o.out.metadata.data_ptr() if isinstance(o.out, Sparse24) and saved is None else 0,
        bias=address(o.bias),
        residual=0,
        counts=address(o.counts),
        partials=0,
        flags=0,
        m=m,
        n=n,
        k=k,
        a_stride=row_stride(a),
        b_stride=row_stride(o.b),
        out_stride=row_stride(out),
        residual_stride=0,
        tokens=TokenArguments(
            values=0 if along is None else along.values.data_ptr(),
            metadata=0 if along is None else along.metadata.data_ptr(),
            s=0 if saved is None else saved.values.data_ptr(),
            s_metadata=0 if saved is None else saved.metadata.data_ptr(),
            stride=0 if along is None else n,
            s_stride=0 if saved is None else saved.values.stride(0),
            row_step=row_step,
            block_step=block_step,
        ),
    )


class TrainingLauncher(GemmLauncher):
    """Launches a training kernel."""

    def launch(self, x: Arguments) -> None:
        """Launch on the current stream, without synchronising."""
        device = self.kernel.device
        if self.spec.config.stream_k:
            space = self._find_workspace(x.m, x.n, x.k, torch.device("cuda", device))
            if space is not None:
                x = x._replace(partials=space.partials.data_ptr(), flags=space.flags.data_ptr())
        block, grid = self._find_or_encode(x)
        self.kernel.launch(grid, block.address, stream(device))

    def _encode_maps(self, x: Arguments) -> tuple[bytes, bytes, bytes, bytes]:
        family, c = self.spec.family, self.spec.config
        if family.op is Op.SPGEMM:  # its A is packed, in the order of rows; only its output is permuted
            return super()._encode_maps(x)
        assert x.tokens is not None
        row_step, block_step = x.tokens.row_step, x.tokens.block_step
        if family.op is not Op.SPGEMM_TOKENS:
            rows = tensor_map(
                family.dtype,
                x.a,
                dims=(x.k, BLOCK, x.m // BLOCK),
                strides=(row_step * x.a_stride, block_step * x.a_stride),
                box=(c.tile_k, BLOCK, c.tile_m // BLOCK),
                swizzle_bytes=128,
            )
            return rows, *self._encode_maps_of_b(x.b, x.n, x.k, x.b_stride)
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
