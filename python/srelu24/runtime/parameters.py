"""The parameter structs of the kernels: the names of their fields, and how the host packs each.

Every layout here is a struct of ``templates/include/srelu24``. Keep the two in step: a field added there is added here
at the same place, under the same name.
"""

from __future__ import annotations

import struct

_ALIGNMENT = {"Q": 8, "q": 8, "i": 4, "I": 4, "128s": 64, "256s": 64}
"""Of the formats that a field may have: addresses, int64, int32, uint32, one tensor map, an array of two of them."""


class Layout:
    """A C++ struct: its fields in order, each with a format of :mod:`struct` or with the layout of a struct in it.

    Fields lie where a C++ compiler puts them: at the next multiple of their alignment. A name that Python has reserved
    ends with an underscore that the header does not have.

    Attributes:
        header: below ``templates/include/srelu24``.
        name: of the struct.
        offsets: bytes from its begin to each field, by the header's names.
        alignment: in bytes, the largest of its fields.
        size: in bytes, a multiple of the alignment, as ``sizeof``.
    """

    def __init__(self, header: str, name: str, /, **fields: str | Layout) -> None:
        self.header, self.name = header, name
        self.offsets: dict[str, int] = {}
        self._fields = tuple(fields)
        formats, self.size, self.alignment = ["<"], 0, 1
        for field, kind in fields.items():
            form, size, alignment = _form_of(kind)
            padding = -self.size % alignment
            self.offsets[field.rstrip("_")] = self.size + padding
            formats.append(f"{padding}x{form}")
            self.size += padding + size
            self.alignment = max(self.alignment, alignment)
        formats.append(f"{-self.size % self.alignment}x")
        self.size += -self.size % self.alignment
        self._struct = struct.Struct("".join(formats))

    def pack(self, **values: int | bytes) -> bytes:
        """The struct's bytes: a number for each plain field, bytes for each tensor map and each struct in it.

        Raises:
            TypeError: a field is missing, or there is no such field.
        """
        if len(values) != len(self._fields):
            raise TypeError(f"{self.name} has the fields {', '.join(self._fields)}, not {', '.join(values)}")
        try:
            return self._struct.pack(*[values[field] for field in self._fields])
        except KeyError as missing:
            raise TypeError(f"{self.name} needs the field {missing}") from None

    def zeros(self) -> bytes:
        """The struct with every field zero."""
        return bytes(self.size)


def _form_of(kind: str | Layout) -> tuple[str, int, int]:
    """The format, size and alignment of a field."""
    if isinstance(kind, Layout):
        return f"{kind.size}s", kind.size, kind.alignment
    return kind, struct.calcsize(f"<{kind}"), _ALIGNMENT[kind]


FAST_DIVMOD = Layout("cutlass/fast_math.h", "FastDivmod", divisor="i", multiplier="I", shift_right="I")
"""CUTLASS's own, not below ``srelu24``."""

RASTER_PARAMS = Layout(
    "raster.cuh",
    "RasterParams",
    tiles="i",
    tiles_n="i",
    group="i",
    full_bands="i",
    band=FAST_DIVMOD,
    height=FAST_DIVMOD,
    last_height=FAST_DIVMOD,
)

SCALE_PARAMS = Layout(
    "scale.cuh",
    "ScaleParams",
    a="Q",
    b="Q",
    s_inverse="Q",
    r_largest="Q",
    saturated="Q",
    a_step="i",
    s_inverse_step="i",
)

# ------------------------------------------------------------------------------------------ GEMMs of the native family

SPLIT_PARAMS = Layout(
    "sm90/params.cuh",
    "SplitParams",
    first_tile="i",
    units="i",
    extra="i",
    tile_units=FAST_DIVMOD,
    partials="Q",
    flags="Q",
)

TOKEN_PARAMS = Layout(
    "sm90/params.cuh",
    "TokenParams",
    values="Q",
    metadata="Q",
    s="Q",
    s_metadata="Q",
    stride="q",
    s_stride="q",
    row_step="i",
    block_step="i",
)

GEMM_PARAMS_SM90 = Layout(
    "sm90/params.cuh",
    "GemmParams",
    a="128s",
    b_share="128s",
    b_rows="256s",
    metadata="Q",
    out="Q",
    out_metadata="Q",
    bias="Q",
    residual="Q",
    counts="Q",
    out_stride="q",
    residual_stride="q",
    m="i",
    n="i",
    k="i",
    k_blocks="i",
    raster=RASTER_PARAMS,
    split=SPLIT_PARAMS,
    scale=SCALE_PARAMS,
    tokens=TOKEN_PARAMS,
)

# ---------------------------------------------------------------------------------------- GEMMs of the portable family

SPLIT_K_PARAMS = Layout(
    "sm80/params.cuh", "SplitKParams", slices=FAST_DIVMOD, units="i", extra="i", partials="Q", flags="Q"
)

GEMM_PARAMS_SM80 = Layout(
    "sm80/params.cuh",
    "GemmParams",
    a="Q",
    b="Q",
    metadata="Q",
    out="Q",
    out_metadata="Q",
    bias="Q",
    residual="Q",
    counts="Q",
    a_stride="q",
    b_stride="q",
    out_stride="q",
    residual_stride="q",
    m="i",
    n="i",
    k="i",
    k_blocks="i",
    raster=RASTER_PARAMS,
    scale=SCALE_PARAMS,
    split=SPLIT_K_PARAMS,
)

# -------------------------------------------------------------------------------- kernels that only move or round bytes

SPARSIFY_PARAMS = Layout(
    "sparsify24.cuh",
    "SparsifyParams",
    in_="Q",
    out="Q",
    out_metadata="Q",
    in_stride="q",
    out_stride="q",
    m="i",
    n="i",
)

QUANTIZE_PARAMS = Layout(
    "quantize_rows.cuh",
    "QuantizeParams",
    in_="Q",
    out="Q",
    scale="Q",
    r_largest="Q",
    row_norm="Q",
    bias_largest="Q",
    s_scale="Q",
    s_inverse="Q",
    in_stride="q",
    out_stride="q",
    m="i",
    n="i",
)

SQUARE_PARAMS = Layout(
    "square_rows.cuh",
    "SquareParams",
    in_="Q",
    out="Q",
    r_largest="Q",
    s_scale="Q",
    in_stride="q",
    out_stride="q",
    m="i",
    n="i",
)

TRANSPOSE_PARAMS = Layout(
    "sm90/params.cuh", "TransposeParams", in_="Q", out="Q", in_stride="q", out_stride="q", m="i", n="i"
)

DENSE_COLUMNS_PARAMS = Layout(
    "sm90/params.cuh",
    "DenseColumnsParams",
    values="Q",
    metadata="Q",
    columns="Q",
    out="Q",
    token_values="Q",
    stride="q",
    token_stride="q",
    m="i",
    n="i",
    count="i",
    row_step="i",
    block_step="i",
)

LAYOUTS = (
    FAST_DIVMOD,
    RASTER_PARAMS,
    SCALE_PARAMS,
    SPLIT_PARAMS,
    TOKEN_PARAMS,
    GEMM_PARAMS_SM90,
    SPLIT_K_PARAMS,
    GEMM_PARAMS_SM80,
    SPARSIFY_PARAMS,
    QUANTIZE_PARAMS,
    SQUARE_PARAMS,
    TRANSPOSE_PARAMS,
    DENSE_COLUMNS_PARAMS,
)
"""All of them: a test compares each with its header."""
