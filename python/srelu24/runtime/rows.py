"""Launchers of the kernels that multiply nothing: they prune, round or move rows, by plain addresses."""

from __future__ import annotations

from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import Operands, address
from srelu24.runtime.loader import ArgumentBlock, LoadedKernel, keep_block, stream
from srelu24.runtime.parameters import QUANTIZE_PARAMS, SPARSIFY_PARAMS, SQUARE_PARAMS, Layout


class StructLauncher:
    """Launches a kernel on the fields of its parameter struct, and keeps the blocks that it has packed.

    Args:
        kernel: loaded on the device of the operands to come.
        layout: of its one argument.
    """

    def __init__(self, kernel: LoadedKernel, layout: Layout) -> None:
        self.kernel, self.layout = kernel, layout
        self._blocks: dict[tuple[int, ...], ArgumentBlock] = {}

    def launch(self, grid: int, /, **fields: int) -> None:
        """Launch ``grid`` CTAs on the current stream, without synchronising.

        Args:
            fields: all of the struct's, in the same order in every call: their values alone are the key.
        """
        key = tuple(fields.values())
        block = self._blocks.get(key)
        if block is None:
            block = ArgumentBlock(self.layout.pack(**fields))
            keep_block(self._blocks, key, block)
        self.kernel.launch(grid, block.address, stream(self.kernel.device))


class SparsifyLauncher(StructLauncher):
    """Launches sparsify24: dense ``a`` [M, N] to packed ``out``."""

    def __init__(self, kernel: LoadedKernel) -> None:
        super().__init__(kernel, SPARSIFY_PARAMS)

    def __call__(self, o: Operands) -> None:
        assert isinstance(o.a, Tensor)
        assert isinstance(o.out, Sparse24)
        m, n = o.a.shape
        values, metadata = o.out.values, o.out.metadata
        self.launch(
            metadata.shape[0] * metadata.shape[1],
            in_=o.a.data_ptr(),
            out=values.data_ptr(),
            out_metadata=metadata.data_ptr(),
            in_stride=o.a.stride(0),
            out_stride=values.stride(0),
            m=m,
            n=n,
        )


class QuantizeLauncher(StructLauncher):
    """Launches quantize_rows: ``a`` [M, N] to ``out``, e4m3 [M, N], and to ``scales.rows``."""

    def __init__(self, kernel: LoadedKernel) -> None:
        super().__init__(kernel, QUANTIZE_PARAMS)

    def __call__(self, o: Operands) -> None:
        assert isinstance(o.a, Tensor)
        assert isinstance(o.out, Tensor)
        s = o.scales
        assert s is not None
        m, n = o.a.shape
        self.launch(
            m,
            in_=o.a.data_ptr(),
            out=o.out.data_ptr(),
            scale=address(s.rows),
            r_largest=address(s.r_largest),
            row_norm=address(s.row_norm),
            bias_largest=address(s.bias_largest),
            s_scale=address(s.s_scale),
            s_inverse=address(s.s_inverse),
            in_stride=o.a.stride(0),
            out_stride=o.out.stride(0),
            m=m,
            n=n,
        )


class SquareLauncher(StructLauncher):
    """Launches square_rows: the values of ``a`` to those of ``out``, and to ``scales.rows``."""

    def __init__(self, kernel: LoadedKernel) -> None:
        super().__init__(kernel, SQUARE_PARAMS)

    def __call__(self, o: Operands) -> None:
        assert isinstance(o.a, Sparse24)
        assert isinstance(o.out, Sparse24)
        assert o.scales is not None
        m, n = o.a.shape
        self.launch(
            m,
            in_=o.a.values.data_ptr(),
            out=o.out.values.data_ptr(),
            r_largest=address(o.scales.r_largest),
            s_scale=address(o.scales.rows),
            in_stride=o.a.values.stride(0),
            out_stride=o.out.values.stride(0),
            m=m,
            n=n,
        )
