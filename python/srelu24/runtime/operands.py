"""Checks of the tensors that a caller gives. Operands that do not fit together are refused; for those that the kernels
cannot read there is a reason, with which the call runs in plain PyTorch."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from srelu24.numerics.dtypes import DTYPES, STORAGE_DTYPES, WIDE_NAMES
from srelu24.runtime.dispatch import BATCH, MODES, gpu_of
from srelu24.runtime.fallback import Reason
from srelu24_gen.errors import Unsupported

ALIGNMENT = 16
"""Bytes to which the TMA needs addresses and row strides aligned."""

FLOATS = frozenset({*STORAGE_DTYPES, torch.float32, torch.float64})
"""Types that a call takes: the kernels compute the 16-bit ones, PyTorch the others."""

DISABLED = os.environ.get("SRELU24_DISABLE", "0") not in ("", "0")
"""Whether the kernels are switched off for this process. It is read once, so that calls do not pay for it."""


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd, in reverse or forward mode, records what is done with one of these operands."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return has_tangent(*tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of these operands carries a forward-mode derivative."""
    # A private name, -1 outside of every dual level; PyTorch has no public way to ask that costs nothing per operand.
    return getattr(forward_ad, "_current_level", -1) >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def transformed() -> bool:
    """Whether torch.func transforms what runs (grad, vjp, jvp, vmap and what is made of them)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    kind = "cuda" if x.is_cuda else x.device.type  # is_cuda is the faster question
    return kind != "meta" and torch.is_autocast_enabled(kind)  # autocast has no "meta"


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands as autocast wants those of a matrix product, where it is on for the device of ``x``."""
    tensors = (x, *others)
    if not autocasting(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor, by its name: importing torch.distributed.tensor takes a second."""
    return type(value).__name__ == "DTensor"


def check_tensor(name: str, value: object) -> None:
    """Raise Unsupported unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise Unsupported(f"{name} is a {type(value).__name__}; a torch.Tensor is needed.")


def check_ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> None:
    """Raise Unsupported unless x [..., D], w1 [F, D], w2 [D, F], b1 [F] and b2 [D] fit together."""
    if not _matrices_fit(x, w1, w2):  # one of the checks below raises, and its message says what is wrong
        if x.dim() < 1:
            raise Unsupported("x has no dimensions; it must be [..., D].")
        check_tensor("w1", w1)
        d, f = x.shape[-1], w1.shape[0] if w1.dim() else 0
        check_matrix("w1", w1, (None, d), x)
        check_matrix("w2", w2, (d, f), x)
    if b1 is not None:
        check_vector("b1", b1, w1.shape[0], x)
    if b2 is not None:
        check_vector("b2", b2, w2.shape[0], x)


def _matrices_fit(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """Whether the matrices of an FFN fit together. This runs before every launch, so it finds no words for what is
    wrong."""
    if not (isinstance(w1, Tensor) and isinstance(w2, Tensor) and w1.dim() == 2):
        return False
    (f, d), dtype, device = w1.shape, x.dtype, x.device
    return (
        w2.shape == (d, f)
        and x.shape[-1:] == (d,)
        and w1.dtype == dtype
        and w2.dtype == dtype
        and w1.device == device
        and w2.device == device
        and dtype in FLOATS
    )


def check_mode(mode: str, deterministic: str) -> str:
    """The mode that an FFN has to run in: one of the dispatcher's MODES, or BATCH.

    Raises:
        Unsupported: one of the two is unknown, or they contradict each other.
    """
    if mode not in MODES:
        raise Unsupported(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    if deterministic not in ("run", "batch"):
        raise Unsupported(f"deterministic is {deterministic!r}; it must be run or batch.")
    if deterministic == "batch" and mode == "dense":
        raise Unsupported("The dense FFN is not batch-invariant; leave mode at auto with deterministic='batch'.")
    return mode if deterministic == "run" else BATCH


def check_matrix(name: str, tensor: Tensor, shape: tuple[int | None, int | None], like: Tensor) -> None:
    """Raise Unsupported unless ``tensor`` is a matrix of that shape, of the type and on the device of ``like``."""
    check_tensor(name, tensor)
    if tensor.dim() != 2 or any(s is not None and s != t for s, t in zip(shape, tensor.shape, strict=True)):
        wanted = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
        raise Unsupported(f"{name} has shape {list(tensor.shape)}; {wanted} is needed.")
    _check_kind(name, tensor, like)


def check_vector(name: str, tensor: Tensor | None, size: int, like: Tensor) -> None:
    """Raise Unsupported unless ``tensor`` is None or a vector of that size, type and device."""
    if tensor is None:
        return
    check_tensor(name, tensor)
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise Unsupported(f"{name} has shape {list(tensor.shape)}; [{size}] is needed.")
    _check_kind(name, tensor, like)


def _check_kind(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise Unsupported(f"{name} is {tensor.dtype}; {WIDE_NAMES.replace(' and ', ' or ')} is needed.")
    if tensor.dtype != like.dtype:
        raise Unsupported(f"{name} is {tensor.dtype} and the input {like.dtype}; give both the same type.")
    if tensor.device != like.device:
        raise Unsupported(f"{name} is on {tensor.device} and the input on {like.device}; move both to one device.")


def _describe_fault(tensor: Tensor, fault: str) -> Reason:
    """What is wrong with a tensor. Its number of rows stands in the words and not in the kind."""
    return Reason(f"a tensor of shape {list(tensor.shape)} {fault}", kind=f"a width of {tensor.shape[-1]} {fault}")


def kernel_reason(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these operands, or None if they can. The sizes are known to fit together."""
    first = tensors[0]
    assert first is not None
    if DISABLED:
        return "SRELU24_DISABLE is set"
    if first.dtype not in DTYPES:
        return f"the type is {first.dtype}, and the kernels take {WIDE_NAMES}"
    on_gpu = first.is_cuda
    if on_gpu:
        try:
            gpu_of(first.device)
        except Unsupported as error:
            return str(error).rstrip(".")
    for tensor in tensors:
        if tensor is None:
            continue
        width = tensor.shape[-1]
        if width % 8 or width == 0:
            return f"a width of {width} is not a positive multiple of 8"
        if on_gpu and tensor.data_ptr() % ALIGNMENT:
            return _describe_fault(tensor, f"does not start at a multiple of {ALIGNMENT} bytes")
        if tensor.is_contiguous():  # so its rows are of ``width``
            continue
        strides = tensor.stride()
        if strides[-1] != 1:
            return _describe_fault(tensor, "is not contiguous in its last dimension")
        row = strides[0] if len(strides) == 2 and tensor.shape[0] > 1 else width
        if row < width:
            return f"a row stride of {row} elements lets rows of {width} overlap"
        if row * first.itemsize % ALIGNMENT:
            return f"a row stride of {row} elements is not a multiple of {ALIGNMENT} bytes"
    return None
