"""Rendering: the dialect leaves C++ alone, every kernel renders, and an error names template, line and variable."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from srelu24_gen.errors import RenderError
from srelu24_gen.paths import templates_dir
from srelu24_gen.render import fill, render
from srelu24_gen.space import supports_family
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Producer

FAMILIES = [
    family
    for op in Op
    for dtype in DType
    for activation in Activation
    for bias in (False, True)
    for residual in (False, True)
    for count in (False, True)
    if supports_family(family := Family(op, dtype, activation, bias, residual, count)).ok
]


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    return tmp_path


def write(templates: Path, text: str) -> str:
    (templates / "k.cu.jinja").write_text(text)
    return "k.cu.jinja"


def test_values_lines_and_comments(templates: Path) -> None:
    name = write(
        templates,
        "int m = ${tile_m};  //% not a statement here\n"
        "//%# a note for template authors\n"
        '  //% if sparse == "true"\n'
        "sparse();\n"
        "  //% else\n"
        "dense();\n"
        "//% endif\n",
    )
    text = fill(name, {"tile_m": 128, "sparse": "true"}, templates)
    assert text.splitlines() == ["int m = 128;  //% not a statement here", "", "sparse();"]
    assert "dense();" in fill(name, {"tile_m": 128, "sparse": "false"}, templates)


def test_cpp_is_left_alone(templates: Path) -> None:
    cpp = (
        '#define S(x) {#x}\nint a[] = {%s};  // {{ 1 }} {# #} % 3\nauto f = []<int I>() { return x<y; };\n"<>&\'";\n\n'
    )
    assert fill(write(templates, cpp), {}, templates) == cpp


def test_an_unbound_variable_is_named_with_its_line_even_in_a_branch_not_taken(templates: Path) -> None:
    name = write(templates, 'int a = 1;\n//% if kind == "x"\nint b = ${tile_q};\n//% endif\n')
    with pytest.raises(RenderError, match=r"k\.cu\.jinja, line 3: .*'tile_q' is not bound.*kind, stages"):
        fill(name, {"kind": "y", "stages": 4}, templates)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n//% if x\nb\n", r"k\.cu\.jinja, line \d: .*endif"),
        ("a\nb ${x +}\n", r"k\.cu\.jinja, line 2: "),
        ("a\n\n${x.missing}\n", r"k\.cu\.jinja, line 3: .*missing"),
        ("a\n${1 // x}\n", r"k\.cu\.jinja, line 2: .*zero"),
        ("//% include 'gone.jinja'\n", r"no template gone\.jinja"),
    ],
)
def test_a_template_error_names_its_line(text: str, words: str, templates: Path) -> None:
    with pytest.raises(RenderError, match=words):
        fill(write(templates, text), {"x": 0}, templates)


def test_a_missing_or_foreign_template_is_named(templates: Path) -> None:
    with pytest.raises(RenderError, match=r"no template k2\.cu\.jinja"):
        fill("k2.cu.jinja", {}, templates)
    (templates / "k.cu.jinja").write_bytes(b"int a;\xff\n")
    with pytest.raises(RenderError, match=r"k\.cu\.jinja is not UTF-8 text .*byte 6"):
        fill("k.cu.jinja", {}, templates)


def test_a_changed_template_is_read_again(templates: Path) -> None:
    name = write(templates, "one\n")
    assert fill(name, {}, templates) == "one\n"
    write(templates, "second\n")
    assert fill(name, {}, templates) == "second\n"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_renders_completely(family: Family) -> None:
    rendered = render(KernelSpec(family, KernelConfig()))
    assert "${" not in rendered.source
    assert "//%" not in rendered.source
    assert "None" not in rendered.source
    assert re.search(r'extern "C" __global__[^;{]*\bsrelu24_kernel\(', rendered.source)
    assert (family.dtype is DType.FP16) == ("half_t" in rendered.source)


def test_every_static_assertion_says_what_is_wrong() -> None:
    headers = sorted((templates_dir() / "include" / "srelu24").rglob("*.cuh"))
    found = [a for header in headers for a in re.findall(r"static_assert\((.*?)\);", header.read_text(), re.DOTALL)]
    assert len(found) > 20
    for assertion in found:
        assert re.search(r',\s*"[^"]+"$', assertion), assertion


def test_families_differ_in_source() -> None:
    sources = {render(KernelSpec(family, KernelConfig())).source for family in FAMILIES}
    assert len(sources) == len(FAMILIES)


@pytest.mark.parametrize(
    "change", [{"tile_m": 192, "producer": Producer.THREAD}, {"tile_n": 128}, {"cluster_m": 1}, {"stages": 3}]
)
def test_compiled_fields_reach_the_source_and_runtime_fields_do_not(change: dict[str, object]) -> None:
    family = Family(Op.GEMM, DType.BF16)
    base = KernelConfig()
    source = render(KernelSpec(family, base)).source
    assert render(KernelSpec(family, dataclasses.replace(base, **change))).source != source
    assert render(KernelSpec(family, dataclasses.replace(base, raster_group=1))).source == source
