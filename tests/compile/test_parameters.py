"""Every field of the kernels' parameter structs lies where the host packs it: the compiler says so, field by field."""

from __future__ import annotations

import pytest

from srelu24.runtime.parameters import LAYOUTS, Layout
from srelu24_gen.compile import compile_source
from srelu24_gen.errors import CompileError
from srelu24_gen.target import Toolchain


def source_of(layout: Layout) -> str:
    """Assertions that hold where the struct in C++ is the layout in Python. (``__INTADDR__`` is NVRTC's offsetof.)"""
    own = not layout.header.startswith("cutlass/")
    struct = f"{'srelu24' if own else 'cutlass'}::{layout.name}"
    asserted = [
        f'static_assert(__INTADDR__(&((Params*)0)->{field}) == {at}, "{field}");'
        for field, at in layout.offsets.items()
    ]
    return "\n".join(
        (
            f"#include <{'srelu24/' if own else ''}{layout.header}>",
            f"using Params = {struct};",
            *asserted,
            f'static_assert(sizeof(Params) == {layout.size}, "the whole");',
            'extern "C" __global__ void srelu24_kernel(float* p) { p[0] = 0; }',
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.header}-{layout.name}")
def test_fields_lie_where_the_host_packs_them(layout: Layout, toolchain: Toolchain) -> None:
    compile_source(source_of(layout), layout.name, toolchain=toolchain)


def test_a_field_that_moves_on_one_side_alone_is_found(toolchain: Toolchain) -> None:
    layout = next(each for each in LAYOUTS if each.name == "TokenParams")
    swapped = Layout(layout.header, layout.name, **{
        "metadata": "Q", "values": "Q", "s": "Q", "s_metadata": "Q", "stride": "q", "s_stride": "q",
        "row_step": "i", "block_step": "i",
    })  # fmt: skip
    with pytest.raises(CompileError) as caught:
        compile_source(source_of(swapped), layout.name, toolchain=toolchain)
    assert "metadata" in caught.value.log
    assert "block_step" not in caught.value.log
