"""KernelSpec -> BuiltKernel: the key of a binary, compiling, building once across processes, building many."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srelu24_gen.errors import CompileError, Srelu24Error, ToolchainError
from srelu24_gen.kept_kernel import KernelMeta
from srelu24_gen.machine_code import why_not_kernel
from srelu24_gen.nvrtc import Answer
from srelu24_gen.paths import templates_dir
from srelu24_gen.plain_code import without_comments
from srelu24_gen.render import RenderedKernel, render
from srelu24_gen.spec import KernelSpec
from srelu24_gen.store import BuildStore
from srelu24_gen.target import Toolchain

__all__ = [
    "ABI",
    "ENTRY",
    "BuildStore",
    "BuiltKernel",
    "KernelMeta",
    "Outcome",
    "build",
    "build_many",
    "build_rendered",
    "compile_source",
    "entry_of",
    "key_of",
    "why_foreign",
    "why_missing",
]

ENTRY = "srelu24_kernel"
"""Name of the kernel in every source; :func:`entry_of` is its symbol in the binary."""
COMPILE_SECONDS = 900.0
"""After so long a compilation is ended; the slowest kernel takes about a minute on a busy machine."""
ABI = 3
"""Raise it when the launcher passes parameters in another way: older binaries are then built anew."""
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"](srelu24/[^>"]+)[>"]', re.MULTILINE)
FLAGS = ("-std=c++20", "-default-device", "--ptxas-options=-v", "--no-cache")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What NVRTC makes of a source."""

    cubin: bytes
    log: str
    """Compiler and ptxas output, with its resource report."""
    seconds: float


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """A binary ready to load."""

    spec: KernelSpec
    cubin: bytes
    meta: KernelMeta
    folder: Path | None
    """Its entry in the build store; None where the store could not be written."""
    from_cache: bool


Outcome = BuiltKernel | Srelu24Error
"""Of one build among many: failures are data."""


def build(spec: KernelSpec, *, store: BuildStore | None = None, toolchain: Toolchain | None = None) -> BuiltKernel:
    """Render and compile a kernel, or take it from the store.

    Raises:
        ToolchainError, RenderError, CompileError, CacheError: as their names say.
    """
    return build_rendered(render(spec), store=store, toolchain=toolchain)


def build_rendered(
    rendered: RenderedKernel, *, store: BuildStore | None = None, toolchain: Toolchain | None = None
) -> BuiltKernel:
    """As :func:`build`, from a source.

    Raises:
        CompileError: NVRTC rejected it; source and log are kept in the folder that the error names.
        ToolchainError, CacheError: as their names say.
    """
    store = store or BuildStore()
    toolchains = [toolchain] if toolchain else _toolchains(store)
    if hit := _kept(rendered, toolchains, store):
        return hit
    toolchain, name = toolchains[0], rendered.spec.name
    key = _key(rendered, toolchain)
    entry = entry_of(key)
    with store.lock(key):
        if hit := _kept(rendered, [toolchain], store):  # built by another process while this one waited
            return hit
        try:
            compiled = compile_source(rendered.source, name, arch=rendered.spec.arch, entry=entry, toolchain=toolchain)
            meta = _describe(rendered, key, compiled, toolchain)
        except CompileError as error:
            command = shlex.join(["nvrtc", *_options(rendered.spec.arch, entry, toolchain), "kernel.cu"])
            folder = store.keep_failure(key, name, source=rendered.source, log=error.log, command=command)
            where = f"; source, log and command are in {folder}" if folder else ""
            raise CompileError(f"{error}{where}", error.log, folder) from None
        folder = store.publish(meta, source=rendered.source, cubin=compiled.cubin, log=compiled.log)
    return BuiltKernel(rendered.spec, compiled.cubin, meta, folder, from_cache=False)


def build_many(
    specs: Iterable[KernelSpec],
    *,
    jobs: int | None = None,
    on_done: Callable[[KernelSpec, Outcome], None] | None = None,
    store: BuildStore | None = None,
    toolchain: Toolchain | None = None,
) -> list[Outcome]:
    """Build kernels side by side, each compiled by a process of its own.

    Specs that differ in runtime fields only are compiled once. An interrupt lets running compilations end, so
    their results are kept.

    Args:
        jobs: processes at a time, by default the CPUs this process may use.
        on_done: called in this thread as each spec is done, in no particular order.

    Returns:
        In the order of ``specs``: the kernel, or the error that its build raised.

    Raises:
        ToolchainError, CacheError: nothing can be built at all.
    """
    store = store or BuildStore()
    toolchains = [toolchain] if toolchain else _toolchains(store)
    specs = list(specs)
    outcomes: dict[KernelSpec, Outcome] = {}
    wanted: dict[KernelSpec, list[KernelSpec]] = {}
    for spec in dict.fromkeys(specs):
        wanted.setdefault(dataclasses.replace(spec, config=spec.config.compiled()), []).append(spec)

    def done(binary: KernelSpec, outcome: Outcome) -> None:
        for spec in wanted[binary]:
            outcomes[spec] = dataclasses.replace(outcome, spec=spec) if isinstance(outcome, BuiltKernel) else outcome
            if on_done:
                on_done(spec, outcomes[spec])

    missing: list[RenderedKernel] = []
    for binary in wanted:
        try:
            rendered = render(binary)
        except Srelu24Error as error:
            done(binary, error)
            continue
        if hit := _kept(rendered, toolchains, store):
            done(binary, hit)
        else:
            missing.append(rendered)
    pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)))
    try:
        futures = {pool.submit(_attempt, rendered, store, toolchains[0]): rendered.spec for rendered in missing}
        for future in as_completed(futures):
            done(futures[future], future.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return [outcomes[spec] for spec in specs]


def compile_source(
    source: str, name: str, *, arch: str = "sm_90a", entry: str = ENTRY, toolchain: Toolchain | None = None
) -> Compiled:
    """CUDA C++ to a cubin, without the store, in a process of its own (:mod:`srelu24_gen.nvrtc` says why).

    Args:
        entry: symbol that the kernel named :data:`ENTRY` gets in the cubin.

    Raises:
        CompileError: NVRTC rejected it; ``log`` has all it printed.
        ToolchainError: NVRTC or headers are missing.
    """
    toolchain = toolchain or Toolchain.find()
    if not toolchain.include_dirs:
        raise ToolchainError(_not_packed(name))
    # The compiler finds what this process finds, however sys.path came about.
    paths = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), *sys.path]))
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "srelu24_gen.nvrtc"],
            input=json.dumps({"source": source, "options": _options(arch, entry, toolchain)}).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # the terminal's Ctrl-C is for the parent
            timeout=COMPILE_SECONDS,
            check=True,
        )
        head, _, cubin = child.stdout.partition(b"\n")
        answer: Answer = json.loads(head)
    except subprocess.CalledProcessError as error:
        ended = f"the process compiling {name} ended with status {error.returncode}"
        log = error.stderr.decode(errors="replace")
        raise CompileError(f"{ended}; if memory ran out, build with fewer jobs", log) from error
    except subprocess.TimeoutExpired as error:
        reason = f"the process compiling {name} was ended after {COMPILE_SECONDS:g} s; build with fewer jobs"
        raise CompileError(reason) from error
    except (OSError, ValueError) as error:
        raise CompileError(f"the process compiling {name} could not be run: {error}") from error
    if not cubin:
        first = re.search(r"^.*\berror\b.*$", answer["log"], re.MULTILINE)
        reason = first.group().strip() if first else answer["status"]
        raise CompileError(
            f"NVRTC {toolchain.nvrtc_version} rejected {name}: {reason}", answer["log"] or answer["status"]
        )
    return Compiled(cubin, answer["log"], answer["seconds"])


def why_missing(spec: KernelSpec) -> str | None:
    """Why :func:`build` has to fail here, without trying: nothing can compile, and no bundle brought the kernel. Else
    None.

    Raises:
        RenderError, CacheError: as their names say.
    """
    store = BuildStore()
    try:
        toolchains = _toolchains(store)
    except ToolchainError as error:
        return str(error)
    if toolchains[0].include_dirs:
        return None
    return None if _kept(render(spec), toolchains, store) else _not_packed(spec.name)


def _not_packed(name: str) -> str:
    return f"{name} is in no bundle that was loaded, and nothing here can compile it; pack it too"


def _toolchains(store: BuildStore) -> list[Toolchain]:
    """The compiler; without one, those of the bundles that were loaded, whose kernels are in the store under their
    keys."""
    try:
        return [Toolchain.find()]
    except ToolchainError:
        packed = [Toolchain(*versions, include_dirs=()) for versions in store.packed_with()]
        if not packed:
            raise
        return packed


def _options(arch: str, entry: str, toolchain: Toolchain) -> list[str]:
    folders = (templates_dir() / "include", *toolchain.include_dirs)
    named = [f"--define-macro={ENTRY}={entry}"] if entry != ENTRY else []
    return [f"--gpu-architecture={arch}", *FLAGS, *named, *(f"--include-path={folder}" for folder in folders)]


def entry_of(key: str) -> str:
    """Symbol of the kernel in the binary of that key: one kernel's binary cannot pass for another's. The compiler is
    told it by a macro, which is no part of the key."""
    return f"{ENTRY}_{key[:16]}"


def key_of(spec: KernelSpec, *, toolchain: Toolchain | None = None) -> str:
    """The key a build of ``spec`` has today, without building it: templates, headers, flags and compiler decide.

    Raises:
        ToolchainError, RenderError: as their names say.
    """
    return _key(render(spec), toolchain or Toolchain.find())


def _key(rendered: RenderedKernel, toolchain: Toolchain) -> str:
    """SHA-256 of all that decides what the binary is, and of nothing else: neither paths nor comments are in it."""
    code = without_comments(rendered.source)
    parts = {
        "abi": ABI,
        "source": code,
        "headers": _headers_digest(templates_dir() / "include", code),
        "flags": [rendered.spec.arch, *FLAGS],
        "nvrtc": toolchain.nvrtc_version,
        "cutlass": toolchain.cutlass_version,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _headers_digest(folder: Path, code: str) -> str:
    """SHA-256 of the code of every header of ours that ``code`` includes, directly or through others; of no other, so
    that a new kernel's header leaves the binaries and tuning records of the rest valid."""
    found: dict[str, bytes] = {}
    wanted = list(_INCLUDE.findall(code))
    while wanted:
        name = wanted.pop()
        path = folder / name
        if name in found or not path.is_file():  # of a missing one the compiler has more to say
            continue
        info = path.stat()
        found[name], includes = _read_header(path, info.st_mtime_ns, info.st_size)
        wanted += includes
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + found[name])
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _read_header(path: Path, _mtime_ns: int, _size: int) -> tuple[bytes, tuple[str, ...]]:
    """Digest of the code, and the includes of ours in it; a file is read again only when its time or size has
    changed."""
    code = without_comments(path.read_text(encoding="utf-8", errors="surrogateescape"))
    digest = hashlib.sha256(code.encode("utf-8", errors="surrogateescape")).digest()
    return digest, tuple(_INCLUDE.findall(code))


def why_foreign(rendered: RenderedKernel, key: str, meta: KernelMeta, cubin: bytes) -> str | None:
    """Why a binary and its description are not of this very kernel, as it is rendered and called here; None if they
    are. What a description says of itself is believed nowhere: all that is known here is compared."""
    expected = {**_identity(rendered, key), "cubin_bytes": len(cubin), "cubin_sha256": _sha256(cubin)}
    for name, value in expected.items():
        if getattr(meta, name) != value:
            return f"its {name} is {str(getattr(meta, name))[:100]!r}, and {str(value)[:100]!r} is needed"
    reason = why_not_kernel(cubin, rendered.spec.arch, entry_of(key))
    return f"its cubin is not this kernel's: {reason}" if reason else None


def _identity(rendered: RenderedKernel, key: str) -> dict[str, Any]:
    """The fields of a KernelMeta that follow from what is rendered."""
    spec = rendered.spec
    return {
        "name": spec.name,
        "key": key,
        "entry": entry_of(key),
        "arch": spec.arch,
        "template": rendered.template,
        "family": {k: v if isinstance(v, bool | None) else str(v) for k, v in dataclasses.asdict(spec.family).items()},
        "config": spec.config.compiled().to_dict(),
        "abi": ABI,
    }


def _kept(rendered: RenderedKernel, toolchains: Iterable[Toolchain], store: BuildStore) -> BuiltKernel | None:
    """The kernel that the first of these has made."""
    name = rendered.spec.name
    for key in (_key(rendered, toolchain) for toolchain in toolchains):
        if (found := store.load(key, name)) and not why_foreign(rendered, key, found[1], found[0]):
            return BuiltKernel(rendered.spec, *found, store.entry(key, name), from_cache=True)
    return None


def _describe(rendered: RenderedKernel, key: str, compiled: Compiled, toolchain: Toolchain) -> KernelMeta:
    """Read ptxas's report (``--ptxas-options=-v``); its lines for NVRTC 13.0 are in tests/compile."""
    spec, log = rendered.spec, compiled.log
    _, found, report = log.partition(f"Compiling entry function '{entry_of(key)}'")
    if not found:
        raise CompileError(f'{rendered.template} defines no kernel extern "C" __global__ {ENTRY}', log)
    report = report.partition("Compiling entry function")[0]
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    used = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", report)
    if not stack or not used:
        raise CompileError(
            f"NVRTC {toolchain.nvrtc_version} reports the registers of {spec.name} in an unknown form", log
        )
    return KernelMeta(
        **_identity(rendered, key),
        registers=int(used[1]),
        stack_bytes=int(stack[1]),
        spill_bytes=int(stack[2]) + int(stack[3]),
        static_smem=int(used[2] or 0),
        warnings=[line.strip() for line in re.findall(r"^ptxas\b[^(\n]*(\(C\d+\).*)$", log, re.MULTILINE)],
        compile_seconds=round(compiled.seconds, 3),
        nvrtc_version=toolchain.nvrtc_version,
        cutlass_version=toolchain.cutlass_version,
        source_digest=_sha256(rendered.source.encode()),
        cubin_bytes=len(compiled.cubin),
        cubin_sha256=_sha256(compiled.cubin),
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _attempt(rendered: RenderedKernel, store: BuildStore, toolchain: Toolchain) -> Outcome:
    try:
        return build_rendered(rendered, store=store, toolchain=toolchain)
    except CompileError as error:
        return error
