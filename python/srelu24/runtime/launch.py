"""From a spec to a launch: the kernel is built, loaded and given to the launcher of its operation, once a device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from srelu24.numerics.dtypes import TORCH_DTYPE, FragmentOrder
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import Operands as Operands
from srelu24.runtime.arguments import Scales as Scales
from srelu24.runtime.gemm import GemmLauncher, MmaSyncLauncher
from srelu24.runtime.loader import LoadedKernel, load
from srelu24.runtime.rows import QuantizeLauncher, SparsifyLauncher, SquareLauncher
from srelu24_gen.bindings import WARPGROUP_THREADS, footprint
from srelu24_gen.compile import build
from srelu24_gen.errors import LaunchError
from srelu24_gen.spec import DType, Instructions, KernelSpec, Op, Problem

Launcher = GemmLauncher | SparsifyLauncher | QuantizeLauncher | SquareLauncher

_GEMM_LAUNCHERS = {Instructions.WGMMA: GemmLauncher, Instructions.MMA_SYNC: MmaSyncLauncher}
_ROW_LAUNCHERS: dict[Op, type[SparsifyLauncher | QuantizeLauncher | SquareLauncher]] = {
    Op.SPARSIFY24: SparsifyLauncher,
    Op.QUANTIZE_ROWS: QuantizeLauncher,
    Op.SQUARE_ROWS: SquareLauncher,
}
_THREADS = {Op.TRANSPOSE: 256}
"""Of a CTA of the kernels that are no GEMM, where it is not a warpgroup."""


def allocate(problem: Problem, device: torch.device) -> Tensor | Sparse24:
    """An uninitialised output for ``problem``; the kernels write all of it."""
    family = problem.family
    dtype = TORCH_DTYPE[family.out or family.dtype]
    if family.op.prunes or family.op in (Op.SPARSIFY24, Op.SQUARE_ROWS):
        order = FragmentOrder.BITS8 if DType.E4M3 in (family.dtype, family.out) else FragmentOrder.BITS16
        return Sparse24.empty(problem.m, problem.n, dtype, device, order)
    return torch.empty(problem.m, problem.n, dtype=dtype, device=device)


def run(spec: KernelSpec, operands: Operands) -> None:
    """Launch on the current torch stream of the operands' device, without synchronising.

    Builds and loads the kernel on first use. The operands are trusted: callers check shapes, types and
    alignment (:mod:`srelu24.ops.functions`).

    Raises:
        CompileError, ToolchainError: the kernel could not be built.
        LaunchError: the driver refused the cubin or the launch.
    """
    out = operands.out.values if isinstance(operands.out, Sparse24) else operands.out
    if out.shape[0] == 0:
        return
    launcher_for(spec, out.device.index)(operands)


@functools.cache
def launcher_for(spec: KernelSpec, device: int) -> Launcher:
    """The launcher of ``spec`` on ``cuda:device``, with its kernel loaded.

    Raises:
        CompileError, ToolchainError, LaunchError: as :func:`load_kernel`.
    """
    kernel = load_kernel(spec, device)
    if spec.family.op.multiplies:
        return _GEMM_LAUNCHERS[spec.instructions](spec, kernel)
    return _ROW_LAUNCHERS[spec.family.op](kernel)


def load_kernel(spec: KernelSpec, device: int) -> LoadedKernel:
    """Build ``spec``, or find it built, and load it on ``cuda:device``.

    Raises:
        CompileError, ToolchainError: the kernel could not be built.
        LaunchError: a CUDA graph is being captured, or the driver refused the cubin.
    """
    if torch.cuda.is_current_stream_capturing():
        raise LaunchError(f"{spec.name} is not loaded yet; run the operation once before capturing a CUDA graph.")
    family = spec.family
    if not family.op.multiplies:
        return load(build(spec), device, threads=_THREADS.get(family.op, WARPGROUP_THREADS), shared_bytes=0)
    size = footprint(family, spec.config)
    return load(build(spec), device, threads=size.threads, shared_bytes=size.shared_bytes)
