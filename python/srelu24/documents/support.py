"""The support matrix: which kernel family computes which product on which GPU. Needs no GPU, and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srelu24.documents.pages import refill
from srelu24.documents.tables import markdown_table
from srelu24_gen import space
from srelu24_gen.spec import WIDE_TYPES, Activation, DType, Family, Op, instructions_of
from srelu24_gen.target import TARGETS, GpuTarget

DENSE = "dense"
"""Neither family has the kernel: the operation is dense PyTorch."""


def _products() -> dict[str, dict[DType, Family]]:
    """By name, and by the type of A."""
    relu2 = Activation.RELU2
    return {
        "gemm": {dtype: Family(Op.GEMM, dtype) for dtype in WIDE_TYPES},
        "gemm_relu2_24": {
            **{dtype: Family(Op.GEMM_RELU2_24, dtype, relu2) for dtype in WIDE_TYPES},
            DType.E4M3: Family(Op.GEMM_RELU2_24, DType.E4M3, relu2, out=DType.E4M3),
        },
        "spgemm": {
            **{dtype: Family(Op.SPGEMM, dtype) for dtype in WIDE_TYPES},
            DType.E4M3: Family(Op.SPGEMM, DType.E4M3, out=DType.BF16),
        },
        "sparsify24": {dtype: Family(Op.SPARSIFY24, dtype, relu2) for dtype in WIDE_TYPES},
        "training step": {dtype: Family(Op.SPGEMM_TOKENS, dtype) for dtype in WIDE_TYPES},
    }


def matrix() -> list[dict[str, Any]]:
    """A row per GPU, type and product: ``kernels`` is native, portable or dense."""
    return [
        {
            "gpu": target.key,
            "name": target.name,
            "arch": target.arch,
            "dtype": dtype.value,
            "product": product,
            "kernels": _kernels(family, target),
        }
        for target in TARGETS.values()
        for product, families in _products().items()
        for dtype, family in families.items()
    ]


def markdown() -> str:
    """The same as a table, a GPU per row; types with the same answer share a column."""
    products = [
        (product, dtypes)
        for product, families in _products().items()
        for dtypes in (WIDE_TYPES, (DType.E4M3,))
        if dtypes[0] in families
    ]
    head = ["--gpu", "GPU", "compiled for", *(f"{name}, {', '.join(dtypes)}" for name, dtypes in products)]
    rows = []
    for target in TARGETS.values():
        cells = []
        for product, dtypes in products:
            answers = {_kernels(_products()[product][dtype], target) for dtype in dtypes}
            cells.append(" / ".join(sorted(answers)))
        rows.append([target.key, target.name.removeprefix("NVIDIA "), target.arch, *cells])
    return markdown_table(head, rows) + "\n"


def update(page: Path) -> bool:
    """Fill the table of a page; True if that changed it.

    Raises:
        RecordError: its markers ask for another table.
    """
    return refill(page, {"support": markdown()})


def _kernels(family: Family, target: GpuTarget) -> str:
    return instructions_of(target.arch).kind if space.has_kernel(family, target).ok else DENSE
