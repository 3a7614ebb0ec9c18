"""The layouts of parameter structs: the headers' fields, at the offsets that a C compiler gives them (ctypes)."""

from __future__ import annotations

import ctypes
import re
import struct

import pytest

from srelu24.runtime.parameters import FAST_DIVMOD, LAYOUTS, RASTER_PARAMS, SPARSIFY_PARAMS, Layout
from srelu24_gen.paths import templates_dir


class FastDivmod(ctypes.Structure):
    """cutlass/fast_math.h."""

    _fields_ = (("divisor", ctypes.c_int), ("multiplier", ctypes.c_uint), ("shift_right", ctypes.c_uint))


KNOWN: dict[str, type] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "cutlass::FastDivmod": FastDivmod,
    "TensorMap": ctypes.c_ubyte * 128,  # alignas(64), and always at a multiple of it
}


def of_header(header: str, name: str) -> type[ctypes.Structure]:
    """The struct of a header, read from its source."""
    code = re.sub(r"//.*", "", (templates_dir() / "include" / "srelu24" / header).read_text())
    (body,) = re.findall(rf"struct {name} {{(.*?)\n}};", code, re.DOTALL)
    fields: list[tuple[str, type]] = []
    for statement in body.split("{")[0].split(";"):
        declared = re.fullmatch(r"\s*(.+?)([ *])(\w+(?:, \w+)*)(\[2\])?\s*", statement)
        if declared is None:
            continue
        kind, mark, names, array = declared.groups()
        if "(" in kind:  # a method
            continue
        if mark == "*" or "*" in kind:
            found: type = ctypes.c_void_p
        elif kind in KNOWN:
            found = KNOWN[kind]
        else:
            (of,) = (layout for layout in LAYOUTS if layout.name == kind)
            found = of_header(of.header, kind)
        fields += [(each, found * 2 if array else found) for each in names.split(", ")]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout is not FAST_DIVMOD], ids=lambda each: f"{each.header}:{each.name}"
)
def test_fields_lie_where_the_header_has_them(layout: Layout) -> None:
    declared = of_header(layout.header, layout.name)
    names = [name for name, *_ in declared._fields_]
    assert layout.offsets == {name: getattr(declared, name).offset for name in names}
    assert list(layout.offsets) == names
    assert layout.size == -(-ctypes.sizeof(declared) // layout.alignment) * layout.alignment


def test_values_are_packed_at_their_offsets() -> None:
    fields = {name: at + 1 for at, name in enumerate(("in_", "out", "out_metadata", "in_stride", "out_stride"))}
    content = SPARSIFY_PARAMS.pack(**fields, m=2**31 - 1, n=-1)
    for name, value in fields.items():
        assert struct.unpack_from("<Q", content, SPARSIFY_PARAMS.offsets[name.rstrip("_")]) == (value,)
    assert struct.unpack_from("<2i", content, SPARSIFY_PARAMS.offsets["m"]) == (2**31 - 1, -1)
    assert len(content) == SPARSIFY_PARAMS.size
    inner = FAST_DIVMOD.pack(divisor=3, multiplier=4, shift_right=5)
    whole = RASTER_PARAMS.pack(
        tiles=0, tiles_n=0, group=0, full_bands=0, band=FAST_DIVMOD.zeros(), height=inner, last_height=bytes(12)
    )
    assert struct.unpack_from("<iII", whole, RASTER_PARAMS.offsets["height"]) == (3, 4, 5)


def test_a_forgotten_or_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match=r"FastDivmod has the fields divisor, multiplier, shift_right, not divisor$"):
        FAST_DIVMOD.pack(divisor=1)
    with pytest.raises(TypeError, match="FastDivmod needs the field 'shift_right'"):
        FAST_DIVMOD.pack(divisor=1, multiplier=2, shift=3)
