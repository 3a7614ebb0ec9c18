"""NVRTC agrees about what is a comment, and a comment leaves binary and key as they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from srelu24_gen import compile as compile_module
from srelu24_gen.compile import compile_source
from srelu24_gen.paths import templates_dir
from srelu24_gen.plain_code import without_comments
from srelu24_gen.render import render
from srelu24_gen.space import supports_family
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Producer
from srelu24_gen.target import Toolchain

HEADERS = sorted((templates_dir() / "include").rglob("*.cuh"))


def preprocessed(texts: list[str], toolchain: Toolchain) -> list[str]:
    """What NVRTC's preprocessor makes of each text: the operator ``#`` spells an argument's tokens after comments are
    gone and white space is one blank. Marks of directives, which may not stand in an argument, become a name."""
    spelled = "".join(
        f'extern "C" __device__ const char spelled_{i}[] = "<begin {i}>" SPELL({_as_argument(text)}\n) "<end {i}>";\n'
        f'extern "C" __global__ void read_{i}(char* p, int n) {{ p[n] = spelled_{i}[n]; }}\n'
        for i, text in enumerate(texts)
    )
    source = f"#define SPELL(...) #__VA_ARGS__\n{spelled}"
    cubin = compile_source(source, "spelled", toolchain=toolchain).cubin
    found = [re.search(rb"<begin %d>(.*)<end %d>" % (i, i), cubin, re.DOTALL) for i in range(len(texts))]
    return [match[1].decode() for match in found if match]


def _as_argument(text: str) -> str:
    return re.sub(r"^([ \t]*)#", r"\1directive ", text, flags=re.MULTILINE)


def test_the_compiler_sees_the_same_code(toolchain: Toolchain) -> None:
    texts = [header.read_text() for header in HEADERS]
    ours = [without_comments(text) for text in texts]
    seen = preprocessed(texts, toolchain)
    assert len(seen) == len(HEADERS) > 20
    assert preprocessed(ours, toolchain) == seen
    for header, text, spelling in zip(HEADERS, ours, seen, strict=True):
        assert re.sub(r"\s+", " ", _as_argument(text)) == spelling, header


TEXTS = [
    'const char* a = "x // y /* z"; // don\'t "',
    "int n = 1'000'000 /* ' */ + 0x1'f; char c = '\"', d = '\\''; // '",
    'int s = sizeof(R"x(a // b)" /* c )x") + FOOR"(" // d\n;',
    "a /* one\n * two // */ b //\\\n still a comment\n c",
    "a/**/b a+ +b a/ *b",
]


def test_literals_are_read_as_the_compiler_reads_them(toolchain: Toolchain) -> None:
    seen = preprocessed(TEXTS, toolchain)
    assert len(seen) == len(TEXTS)
    assert preprocessed([without_comments(text) for text in TEXTS], toolchain) == seen


WARPS = KernelConfig(tile_m=128, tile_n=128, producer=Producer.ALL, stages=3, stream_k=True)
PRUNED = Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2)
SPECS = [
    KernelSpec(PRUNED, KernelConfig(tile_n=256)),
    KernelSpec(PRUNED, WARPS, "sm_80"),
    *(KernelSpec(Family(op, DType.BF16), KernelConfig()) for op in (Op.SPARSIFY24, Op.TRANSPOSE, Op.DENSE_COLUMNS)),
    *(KernelSpec(Family(op, DType.BF16, out=DType.E4M3), KernelConfig()) for op in (Op.QUANTIZE_ROWS, Op.SQUARE_ROWS)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_comments_leave_binary_and_key(
    spec: KernelSpec, toolchain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert supports_family(spec.family).ok
    copy = tmp_path / "templates"
    shutil.copytree(templates_dir(), copy)
    for header in copy.rglob("*.cuh"):
        header.write_text(f"// Another comment.\n\n{without_comments(header.read_text())}\n")
    for template in copy.rglob("*.jinja"):
        template.write_text(f"/* Another */\n{template.read_text()}// comment\n")
    cubins, keys = [], []
    for folder in (templates_dir(), copy):
        monkeypatch.setattr(compile_module, "templates_dir", lambda folder=folder: folder)
        rendered = render(spec, folder)
        keys.append(compile_module._key(rendered, toolchain))
        cubins.append(compile_source(rendered.source, spec.name, arch=spec.arch, toolchain=toolchain).cubin)
    assert keys[0] == keys[1]
    assert cubins[0] == cubins[1]
