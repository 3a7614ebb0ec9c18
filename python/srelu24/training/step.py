"""The sparse step on the training kernels, with the dense features split off (docs/training.md).

What the forward pass keeps is one tensor, so that the dense steps of the warm-up, which keep all of relu2(Y1) in its
place, look the same to autograd and to compilers: the packed S, along features and along tokens, with their metadata.
Dense features are zero in the form along tokens; their columns are unpacked from the other one, for dense products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srelu24.numerics.dtypes import DTYPES, WIDE_NAMES
from srelu24.numerics.sparse24 import Sparse24, metadata_shape
from srelu24.runtime.dispatch import choose, compiles, gpu_of, missing
from srelu24.runtime.fallback import Reason
from srelu24.runtime.launch import launcher_for
from srelu24.training import kernels, movers
from srelu24.training.order import padded
from srelu24.training.packed import TokenSparse24, columns
from srelu24.training.reference import Forward, Gradients, Needed, Pruning
from srelu24_gen import space
from srelu24_gen.bindings import E_VECTOR_COLUMNS
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, Family, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget

_ALIGNMENT = 16


def reason_against(
    x: Tensor, f: int, token_stride: int | None, wanted: bool, b1: bool = False, b2: bool = False
) -> str | None:
    """Why the kernels do not take a step of x [M, D] with F = ``f``, or None if they do. Looks at no values.

    Args:
        wanted: whether the recipe wants kernels.
        b1, b2: whether the layer has these biases.
    """
    if not x.is_cuda:
        return "the tensors are not on a GPU"
    if not wanted:
        return "the recipe says kernels=False"
    if x.dtype not in DTYPES:
        return f"the type is {x.dtype}, and the kernels take {WIDE_NAMES}"
    m, d = x.shape
    if m % 16 or d % 64 or f % 64:
        words = f"M = {m}, D = {d}, F = {f} are not multiples of 16, 64 and 64"
        return Reason(words, kind=f"D = {d}, F = {f}, {'whole' if m % 16 == 0 else 'broken'} blocks of tokens")
    try:
        verdict = space.has_kernel(Family(Op.SPGEMM_TOKENS, DTYPES[x.dtype]), gpu_of(x.device))
        if not verdict.ok:
            return verdict.reason
        kernels.row_steps(m, token_stride)
    except Unsupported as error:
        return str(error).rstrip(".")
    if not m or compiles():
        return None
    # Without a compiler a step runs on the kernels only where every one of them was loaded from a bundle.
    specs = specs_of(Shape(int(m), int(d), int(f)), DTYPES[x.dtype], b1, b2, gpu_of(x.device))
    return next(filter(None, map(missing, specs)), None)


def problems_of(shape: Shape, dtype: DType, b1: bool, b2: bool) -> tuple[Problem, ...]:
    """Every kernel that the steps of a layer may launch, dense ones and sparse ones, whether the gradients of its
    weights are returned or added to buffers; each once."""
    hidden, y, *gradients = shape.step_gemms(dtype, b1, b2)
    dx = shape.step_gemms(dtype)[1]  # the same product as y, and never with a bias
    return tuple(dict.fromkeys((hidden, y, dx, *gradients, *shape.step_kernels(dtype, b1))))


def specs_of(shape: Shape, dtype: DType, b1: bool, b2: bool, target: GpuTarget) -> list[KernelSpec]:
    """The kernels that answer :func:`problems_of` on a GPU.

    Raises:
        Unsupported: no kernel takes these sizes.
    """
    problems = problems_of(shape, dtype, b1, b2)
    return [KernelSpec(p.family, choose(p, target).config, target.arch) for p in problems]


def load(shape: Shape, dtype: DType, b1: bool, b2: bool, device: torch.device) -> None:
    """Build and load all of :func:`specs_of` on a CUDA device, so that no step waits for a kernel.

    Raises:
        Unsupported, ToolchainError, CompileError, LaunchError: as their names say.
    """
    for spec in specs_of(shape, dtype, b1, b2, gpu_of(device)):
        op = spec.family.op
        if op in movers.LAYOUTS:
            movers.launcher_for(op, device)
        elif op is Op.GEMM:
            launcher_for(spec, device.index)
        else:
            kernels.launcher_for(spec, device.index)


def keeps_packed(hidden: Tensor) -> bool:
    """Whether ``hidden`` was kept by a step on the kernels, as :func:`hidden_size` elements. The reference keeps
    relu2(Y1), [M, F]."""
    return hidden.dim() == 1


def hidden_size(m: int, f: int) -> int:
    """Elements of what the forward pass keeps, 16 bits each."""
    along_features, along_tokens = metadata_shape(m, f), metadata_shape(f, padded(m))
    return m * f + 2 * (math.prod(along_features) + math.prod(along_tokens))


def dense_part(hidden: Tensor, m: int, f: int) -> Tensor:
    """Where a dense step keeps relu2(Y1), [M, F]."""
    return hidden[: m * f].view(m, f)


def packed_parts(hidden: Tensor, m: int, f: int) -> tuple[Sparse24, TokenSparse24]:
    """Where a sparse step keeps S: along features, rows in the order of the tokens' groups, and along tokens."""
    shapes = metadata_shape(m, f), metadata_shape(f, padded(m))
    sizes = [m * f // 2, m * f // 2, *(2 * math.prod(shape) for shape in shapes)]
    values, token_values, metadata, token_metadata = hidden.split(sizes)
    return (
        Sparse24(values.view(m, f // 2), metadata.view(torch.int32).view(shapes[0]), (m, f)),
        TokenSparse24(token_values.view(m // 2, f), token_metadata.view(torch.int32).view(shapes[1]), (m, f)),
    )


def dense_forward(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> Forward:
    """A dense step: the fused GEMM, then cuBLAS. Non-zeros are counted after squaring."""
    m, f = x.shape[0], w1.shape[0]
    hidden = x.new_empty(hidden_size(m, f))
    s = dense_part(hidden, m, f)
    hidden[m * f :].zero_()  # nothing reads this part, but an op's output must not hold what was in memory before
    kernels.dense_hidden(_make_loadable(x), _make_loadable(w1), None if b1 is None else _make_loadable(b1), s)
    counts = (s != 0).sum(dim=0, dtype=torch.int32)
    return Forward(torch.nn.functional.linear(s, w2, b2), hidden, counts)


def forward(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, pruning: Pruning) -> Forward:
    """:func:`srelu24.training.reference.forward` on the kernels; ``hidden`` is as the module says."""
    m, f = x.shape[0], w1.shape[0]
    x, w1, w2 = _make_loadable(x), _make_loadable(w1), _make_loadable(w2)
    b1, b2 = (b if b is None else _make_loadable(b) for b in (b1, b2))
    hidden = x.new_empty(hidden_size(m, f))
    s, along_tokens = packed_parts(hidden, m, f)
    if m % E_VECTOR_COLUMNS:  # then no kernel writes the last words
        along_tokens.metadata.zero_()
    _, _, counts = kernels.pruned_hidden(x, w1, b1, pruning.token_stride, (s, along_tokens))
    movers.clear_columns(along_tokens, pruning.dense_features)
    return Forward(kernels.product(s, w2, b2, pruning.token_stride), hidden, counts)


def backward(
    g: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    *,
    pruning: Pruning,
    needed: Needed,
    w1_grad: Tensor | None = None,
    w2_grad: Tensor | None = None,
) -> Gradients:
    """:func:`srelu24.training.reference.backward` on the kernels, rounded to storage.

    Args:
        w1_grad, w2_grad: buffers to which the gradients of the weights are added, unrounded; the result holds the
            buffers then.
    """
    m, f = x.shape[0], w1.shape[0]
    g, x, stride = _make_loadable(g), _make_loadable(x), pruning.token_stride
    s, s_tokens = packed_parts(hidden, m, f)
    dx = dw1 = dw2 = db1 = None
    if needed.x or needed.w1 or needed.b1:
        dy1, dy1_tokens = kernels.hidden_gradient(g, _transpose(w2, m), s, stride)
        if needed.x:
            dx = kernels.product(dy1, _transpose(w1, m), None, stride)
        if needed.w1:
            dense = movers.dense_columns(dy1, pruning.dense_features, stride, dy1_tokens)
            dw1 = _weight_gradient(dy1_tokens, dense, x, pruning, w1_grad, transposed=False)
        if needed.b1:
            db1 = dy1.to_dense().sum(dim=0, dtype=torch.float32).to(x.dtype)
    if needed.w2:
        dense = movers.dense_columns(s, pruning.dense_features, stride)  # zero along tokens since the forward pass
        dw2 = _weight_gradient(s_tokens, dense, g, pruning, w2_grad, transposed=True)
    db2 = g.sum(dim=0, dtype=torch.float32).to(x.dtype) if needed.b2 else None
    return Gradients(dx, dw1, dw2, db1, db2)


def kept(hidden: Tensor, m: int, f: int, pruning: Pruning) -> tuple[Tensor, Tensor]:
    """The numbers of non-zeros of S, and of S pruned along tokens: int64 [] each."""
    s, along_tokens = packed_parts(hidden, m, f)
    dense = (columns(s, pruning.dense_features) != 0).sum()
    return (s.values != 0).sum(), (along_tokens.values != 0).sum() + dense


def _weight_gradient(
    along_tokens: TokenSparse24,
    dense: Tensor,
    b: Tensor,
    pruning: Pruning,
    into: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    """``A^T B``, [F, N], or [N, F] transposed: A pruned along tokens, but ``dense`` in the dense features' columns."""
    fits = into is None or (into.is_contiguous() and into.data_ptr() % _ALIGNMENT == 0)
    gradient = kernels.weight_gradient(
        along_tokens, b, pruning.token_stride, out=into if fits else None, transposed=transposed
    )
    if len(pruning.dense_features):
        part = b.T @ dense if transposed else dense.T @ b
        # The kernel has left zeros for these features, or what was there before.
        gradient.index_add_(1 if transposed else 0, pruning.dense_features, part.to(gradient.dtype))
    if into is not None and not fits:
        into += gradient
        return into
    return gradient


def _transpose(w: Tensor, m: int) -> Tensor:
    return movers.transposed(_make_loadable(w)) if m else w.T  # nothing is multiplied without tokens


def _make_loadable(x: Tensor) -> Tensor:
    """The operand as the TMA reads it: contiguous and 16-byte aligned."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
