"""Compiling with the real NVRTC: resource reports, the key, the cache, failures, many processes. Needs no GPU."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from srelu24_gen import compile as compile_module
from srelu24_gen import store as store_module
from srelu24_gen.compile import BuildStore, BuiltKernel, build, build_many, build_rendered, compile_source
from srelu24_gen.errors import CacheError, CompileError, RenderError
from srelu24_gen.kept_kernel import encode_meta
from srelu24_gen.machine_code import machine_code, why_not_kernel
from srelu24_gen.render import RenderedKernel
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op
from srelu24_gen.target import Toolchain

Rendered = Callable[..., RenderedKernel]
COPY_BODY = "p[threadIdx.x] = p[threadIdx.x + 32];"
ELF = b"\x7fELF"


def kernel(body: str, name: str = "srelu24_kernel", bounds: str = "") -> str:
    return f'extern "C" __global__ void {bounds} {name}(float* p, int n) {{ {body} }}\n'


# ---- what NVRTC and ptxas report


def test_a_cubin_and_its_resources(rendered: Rendered, store: BuildStore) -> None:
    source = kernel("__shared__ float s[96]; s[threadIdx.x] = p[n]; __syncthreads(); p[n] = s[n];")
    built = build_rendered(rendered(source), store=store)
    assert built.cubin.startswith(ELF)
    assert b"srelu24_kernel" in built.cubin
    meta = built.meta
    assert meta.static_smem == 96 * 4
    assert 0 < meta.registers < 64
    assert (meta.stack_bytes, meta.spill_bytes) == (0, 0)
    assert meta.warnings == []
    assert 0 < meta.compile_seconds < 60
    assert meta.cubin_bytes == len(built.cubin)
    assert not built.from_cache


def test_spills_and_stack_are_reported_for_the_entry_alone(rendered: Rendered, store: BuildStore) -> None:
    lines = "float a[200];\n#pragma unroll\nfor (int i = 0; i < 200; ++i) a[i] = p[i * n];\n__syncthreads();\n"
    lines += "#pragma unroll\nfor (int i = 0; i < 200; ++i) p[i * n + 1] = a[199 - i] * a[i];"
    hungry = kernel(lines, bounds="__launch_bounds__(1024)")
    frugal = kernel(COPY_BODY)
    meta = build_rendered(rendered(hungry), store=store).meta
    assert meta.registers <= 65536 // 1024
    assert meta.spill_bytes >= 200 * 4, "200 values cannot stay in 64 registers"
    assert meta.stack_bytes > 0
    both = frugal + hungry.replace("srelu24_kernel", "another_kernel")
    meta = build_rendered(rendered(both), store=store).meta
    assert (meta.spill_bytes, meta.stack_bytes) == (0, 0)


def test_a_serialised_wgmma_is_a_warning(rendered: Rendered, store: BuildStore) -> None:
    source = (
        "#include <cute/arch/mma_sm90_gmma.hpp>\nusing namespace cute;\n"
        "__device__ __noinline__ float twice(float x) { return x + x; }\n"
        'extern "C" __global__ void srelu24_kernel(float* p, unsigned long long a, int n) {\n'
        "  float d[4] = {};\n  for (int i = 0; i < n; ++i) {\n    warpgroup_arrive();\n"
        "    SM90::GMMA::MMA_64x8x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>::fma(\n"
        "        a + i, a, d[0], d[1], d[2], d[3]);\n    warpgroup_commit_batch();\n    d[0] = twice(d[0]);\n  }\n"
        "  warpgroup_wait<0>();\n  p[threadIdx.x] = d[0] + d[1] + d[2] + d[3];\n}\n"
    )
    found = build_rendered(rendered(source), store=store).meta.warnings
    assert any("wgmma" in line and "serialized" in line for line in found)
    assert all(line.startswith("(C75") for line in found)


@pytest.mark.parametrize(
    "header",
    ["cute/arch/mma_sm90_gmma_sparse.hpp", "cutlass/arch/barrier.h", "cutlass/numeric_types.h", "cuda/std/cstdint"],
)
def test_the_headers_kernels_stand_on_compile(header: str, rendered: Rendered, store: BuildStore) -> None:
    source = f"#include <{header}>\n#ifndef __CUDA_ARCH_FEAT_SM90_ALL\n#error\n#endif\n{kernel(COPY_BODY)}"
    assert build_rendered(rendered(source), store=store).cubin.startswith(ELF)


def test_every_kernel_has_its_key_in_its_symbol_and_the_machine_code_it_had(
    rendered: Rendered, store: BuildStore, toolchain: Toolchain
) -> None:
    source = kernel("__shared__ float s[96]; s[threadIdx.x] = p[n]; __syncthreads(); p[n] = s[n];")
    one, other = (build_rendered(rendered(text), store=store) for text in (source, f"int more;{source}"))
    for built in (one, other):
        assert built.meta.entry == f"srelu24_kernel_{built.meta.key[:16]}"
        assert why_not_kernel(built.cubin, "sm_90a", built.meta.entry) is None
    assert "has no code of" in str(why_not_kernel(one.cubin, "sm_90a", other.meta.entry))
    plain = compile_source(source, "k", toolchain=toolchain).cubin
    assert machine_code(plain) == machine_code(one.cubin)


def test_a_cubin_swapped_for_another_kernels_is_a_miss(rendered: Rendered, store: BuildStore) -> None:
    one, other = (build_rendered(rendered(kernel(f"p[n] = {i};")), store=store) for i in range(2))
    assert one.folder
    meta = msgspec.structs.replace(one.meta, cubin_sha256=other.meta.cubin_sha256, cubin_bytes=other.meta.cubin_bytes)
    (one.folder / "kernel.cubin").write_bytes(other.cubin)
    (one.folder / "meta.json").write_bytes(encode_meta(meta))
    assert store.load(one.meta.key, one.meta.name), "it looks intact"
    again = build_rendered(rendered(kernel("p[n] = 0;")), store=store)
    assert (again.from_cache, again.cubin) == (False, one.cubin)
    assert build_rendered(rendered(kernel("p[n] = 0;")), store=store).from_cache


def test_a_compilation_without_end_is_ended(
    rendered: Rendered, store: BuildStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(compile_module.sys, "executable", str(script))
    monkeypatch.setattr(compile_module, "COMPILE_SECONDS", 0.2)
    with pytest.raises(CompileError, match=r"was ended after 0\.2 s"):
        build_rendered(rendered(), store=store)


def test_equal_sources_give_equal_binaries(toolchain: Toolchain) -> None:
    first, second = (compile_source(kernel(COPY_BODY), "k", toolchain=toolchain).cubin for _ in range(2))
    assert first == second


# ---- failures


def test_a_rejected_source_keeps_source_log_and_command(rendered: Rendered, store: BuildStore) -> None:
    source = "\n\n" + kernel("gone(p);")
    with pytest.raises(CompileError, match=r'kernel\.cu\(3\): error: identifier "gone" is undefined') as caught:
        build_rendered(rendered(source), store=store)
    error = caught.value
    assert error.folder
    assert error.folder.name.endswith(".failed")
    assert str(error.folder) in str(error)
    assert (error.folder / "kernel.cu").read_text() == source
    assert (error.folder / "compile.log").read_text() == error.log
    assert "gone" in error.log
    assert "--gpu-architecture=sm_90a" in (error.folder / "command.txt").read_text()
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.log, again.folder) == (str(error), error.log, error.folder)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (kernel(COPY_BODY, name="other"), r"test\.cu\.jinja defines no kernel .*srelu24_kernel"),
        ("", r"defines no kernel"),
        (kernel("__shared__ char s[300000]; s[n] = 1; __syncthreads(); p[n] = s[n + 1];"), "too much shared data"),
        (kernel('asm volatile("foo.bar;");'), "error.*foo|foo.*error|error.*bar"),
    ],
)
def test_other_failures_say_why(source: str, words: str, rendered: Rendered, store: BuildStore) -> None:
    with pytest.raises(CompileError, match=words):
        build_rendered(rendered(source), store=store)
    assert store.entries() == []


def test_an_unknown_architecture_is_a_compile_error(toolchain: Toolchain) -> None:
    with pytest.raises(CompileError, match="architecture"):
        compile_source(kernel(COPY_BODY), "k", arch="sm_1", toolchain=toolchain)


# ---- key and cache


def test_the_second_build_is_a_hit_with_the_same_answer(rendered: Rendered, store: BuildStore) -> None:
    first = build_rendered(rendered(), store=store)
    second = build_rendered(rendered(), store=store)
    assert second == dataclasses.replace(first, from_cache=True)
    assert first.folder == store.folder / f"{first.meta.name}-{first.meta.key[:16]}"
    assert [meta.key for meta in store.entries()] == [first.meta.key]


def test_everything_that_decides_the_binary_is_in_the_key(
    rendered: Rendered, toolchain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = tmp_path / "templates" / "include" / "srelu24"
    include.mkdir(parents=True)
    header = include / "a.cuh"
    header.write_text("int one;")
    (include / "through.cuh").write_text("#  include <srelu24/a.cuh>\n#include <srelu24/through.cuh>\n")
    (include / "other.cuh").write_text("int other;")
    monkeypatch.setattr(compile_module, "templates_dir", lambda: tmp_path / "templates")
    base = rendered()
    base = dataclasses.replace(base, source="#include <srelu24/through.cuh>\n" + base.source)
    keys = [compile_module._key(base, toolchain)]
    assert compile_module._key(base, toolchain) == keys[0]
    elsewhere = dataclasses.replace(toolchain, include_dirs=(tmp_path,))
    assert compile_module._key(base, elsewhere) == keys[0], "where headers lie does not matter"
    keys.append(compile_module._key(dataclasses.replace(base, source=base.source + "int more;"), toolchain))
    arch = dataclasses.replace(base, spec=dataclasses.replace(base.spec, arch="sm_100a"))
    keys.append(compile_module._key(arch, toolchain))
    keys.append(compile_module._key(base, dataclasses.replace(toolchain, nvrtc_version="13.0.1")))
    keys.append(compile_module._key(base, dataclasses.replace(toolchain, cutlass_version="4.3.0")))
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "ABI", compile_module.ABI + 1)
        keys.append(compile_module._key(base, toolchain))
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "FLAGS", (*compile_module.FLAGS, "-lineinfo"))
        keys.append(compile_module._key(base, toolchain))
    times = header.stat()
    header.write_text("int two;")  # as long as before
    os.utime(header, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    keys.append(compile_module._key(base, toolchain))
    (include / "other.cuh").write_text("int something_else;")
    assert compile_module._key(base, toolchain) == keys[-1], "a header that is not included does not matter"
    header.rename(include / "b.cuh")
    keys.append(compile_module._key(base, toolchain))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("file", ["kernel.cubin", "meta.json"])
def test_a_damaged_entry_is_built_again(file: str, rendered: Rendered, store: BuildStore) -> None:
    first = build_rendered(rendered(), store=store)
    assert first.folder
    path = first.folder / file
    path.write_bytes(path.read_bytes()[:-20])
    again = build_rendered(rendered(), store=store)
    assert not again.from_cache
    assert again.cubin == first.cubin
    assert build_rendered(rendered(), store=store).from_cache


def test_a_hit_takes_less_than_50_ms_including_rendering(store: BuildStore) -> None:
    spec = KernelSpec(Family(Op.SPARSIFY24, DType.BF16), KernelConfig())
    build(spec, store=store)
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        assert build(spec, store=store).from_cache
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 0.05


def test_an_unsafe_folder_is_refused(rendered: Rendered, store: BuildStore) -> None:
    build_rendered(rendered(), store=store)
    store.folder.chmod(0o777)
    with pytest.raises(CacheError, match="chmod go-w"):
        build_rendered(rendered(), store=store)


@pytest.mark.parametrize("fault", ["read-only", "full", "a file"])
def test_without_a_usable_folder_the_build_succeeds_in_memory(
    fault: str, rendered: Rendered, store: BuildStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        code = errno.ENOSPC if fault == "full" else errno.EROFS
        raise OSError(code, os.strerror(code))

    if fault == "a file":
        store.folder.write_text("in the way")
    else:
        monkeypatch.setattr(store_module.os, "fsync" if fault == "full" else "mkdir", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = build_rendered(rendered(), store=store)
        second = build_rendered(rendered(), store=store)
        with pytest.raises(CompileError, match="error") as failure:
            build_rendered(rendered("?"), store=store)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert "SRELU24_CACHE_DIR" in str(caught[0].message)
    assert first.cubin == second.cubin
    assert first.cubin.startswith(ELF)
    assert (first.folder, first.from_cache, second.from_cache) == (None, False, False)
    assert failure.value.folder is None
    assert "error" in failure.value.log


# ---- processes

CHILD = """
import pickle, sys, time
from pathlib import Path
from srelu24_gen.compile import build_rendered
rendered, store, go = pickle.load(sys.stdin.buffer)
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
print("cached" if build_rendered(rendered, store=store).from_cache else "built", flush=True)
"""


def start_child(rendered: RenderedKernel, store: BuildStore, go: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    assert child.stdin
    child.stdin.write(pickle.dumps((rendered, store, go)))
    child.stdin.close()
    child.stdin = None  # communicate() would flush it
    assert child.stdout
    assert child.stdout.readline() == b"ready\n"
    return child


def test_two_processes_build_a_kernel_once(rendered: Rendered, store: BuildStore, tmp_path: Path) -> None:
    kernel_of_both = rendered("#include <cute/arch/mma_sm90_gmma_sparse.hpp>\n" + kernel(COPY_BODY))
    children = [start_child(kernel_of_both, store, tmp_path / "go") for _ in range(2)]
    (tmp_path / "go").touch()
    said = sorted(child.communicate(timeout=60)[0].strip() for child in children)
    assert said == [b"built", b"cached"]
    assert build_rendered(kernel_of_both, store=store).from_cache
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".tmp")] == []


def test_ctrl_c_leaves_no_half_entry(rendered: Rendered, store: BuildStore, tmp_path: Path) -> None:
    slow = rendered("#include <cute/tensor.hpp>\n" + kernel(COPY_BODY))
    child = start_child(slow, store, tmp_path / "go")
    (tmp_path / "go").touch()
    time.sleep(0.3)  # well inside the seconds that this takes
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (-signal.SIGINT, b""), err
    assert b"KeyboardInterrupt" in err, "NVRTC on its own would have ended the process without a word"
    assert store.entries() == []
    assert [path.name for path in store.folder.iterdir()] == [".locks"]
    assert not build_rendered(slow, store=store).from_cache


FAMILY = Family(Op.GEMM, DType.BF16)


def fake_render(spec: KernelSpec) -> RenderedKernel:
    """Small kernels that differ with the number of stages; odd ones do not compile, 9 does not render."""
    stages = spec.config.stages
    if stages == 9:
        raise RenderError("test.cu.jinja, line 1: the variable 'x' is not bound")
    return RenderedKernel(spec, "test.cu.jinja", kernel(f"p[{stages}] = n;" if stages % 2 == 0 else "gone();"))


def test_build_many_reports_every_spec_and_failures_are_data(
    store: BuildStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "render", fake_render)
    specs = [KernelSpec(FAMILY, KernelConfig(stages=s)) for s in (2, 3, 4, 9)]
    twin = KernelSpec(FAMILY, KernelConfig(stages=2, raster_group=1))
    done: list[KernelSpec] = []
    outcomes = build_many([*specs, twin], jobs=2, store=store, on_done=lambda spec, outcome: done.append(spec))
    two, three, four, nine, two_again = outcomes
    assert isinstance(two, BuiltKernel)
    assert isinstance(four, BuiltKernel)
    assert isinstance(two_again, BuiltKernel)
    assert two.cubin != four.cubin
    assert [built.spec for built in (two, four, two_again)] == [specs[0], specs[2], twin]
    assert two_again.cubin == two.cubin
    assert isinstance(three, CompileError)
    assert three.folder
    assert "gone" in (three.folder / "compile.log").read_text()
    assert isinstance(nine, RenderError)
    assert sorted(done, key=hash) == sorted([*specs, twin], key=hash)
    assert len(store.entries()) == 2
    with monkeypatch.context() as patch:  # all from the store: no process is started
        patch.setattr(compile_module, "compile_source", None)
        hits = build_many([specs[0], specs[2], twin], store=store)
    assert [hit.from_cache for hit in hits if isinstance(hit, BuiltKernel)] == [True] * 3


def test_an_interrupted_build_many_keeps_what_is_done(store: BuildStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "render", fake_render)

    def interrupt(spec: KernelSpec, outcome: object) -> NoReturn:
        raise KeyboardInterrupt

    specs = [KernelSpec(FAMILY, KernelConfig(stages=2 * s)) for s in range(1, 7)]
    with pytest.raises(KeyboardInterrupt):
        build_many(specs, jobs=1, store=store, on_done=interrupt)
    assert 1 <= len(store.entries()) < len(specs), "what ran is kept, what waited is not started"


def test_a_compiler_process_that_dies_fails_its_own_kernel_only(
    store: BuildStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compile_module, "render", fake_render)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho out of luck >&2\nkill -9 $$\n")
    script.chmod(0o755)
    spec = KernelSpec(FAMILY, KernelConfig(stages=2))
    with monkeypatch.context() as patch:
        patch.setattr(compile_module.sys, "executable", str(script))
        (outcome,) = build_many([spec], store=store)
        assert isinstance(outcome, CompileError)
        assert "ended with status -9" in str(outcome)
        assert "out of luck" in outcome.log
        script.write_text("#!/bin/sh\necho not an answer\n")
        (outcome,) = build_many([spec], store=store)
        assert isinstance(outcome, CompileError)
        patch.setattr(compile_module.sys, "executable", str(tmp_path / "gone"))
        (outcome,) = build_many([spec], store=store)
        assert "could not be run: " in str(outcome)
        assert "gone" in str(outcome)
    (outcome,) = build_many([spec], store=store)
    assert isinstance(outcome, BuiltKernel)


def test_build_many_warns_once_where_nothing_can_be_kept(store: BuildStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "render", fake_render)
    store.folder.write_text("in the way")
    specs = [KernelSpec(FAMILY, KernelConfig(stages=s)) for s in (2, 4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcomes = build_many(specs, jobs=2, store=store)
    assert all(isinstance(outcome, BuiltKernel) and outcome.folder is None for outcome in outcomes)
    assert len(caught) == 1
