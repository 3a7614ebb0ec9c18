"""Bundles: compiled kernels and tuning records in one zip file, for machines without a compiler or network.

    manifest.json                        what made it, for which GPU, and the SHA-256 of every other file
    kernels/<name>-<key>/<file>          entries of the build store
    records/<arch>/<gpu>/<family>.json   as in tuning_db

A bundle is read whole and checked before anything of it is installed. What it says of its kernels is compared with what
this version renders; that a cubin holds the instructions that its source compiles to is nothing that can be checked
without a compiler. Whoever made a bundle decides what the GPU runs (docs/reliability.md). It needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from srelu24 import whole_file
from srelu24.db.database import Database
from srelu24.db.records import TuningRecord, decode_file, encode_file
from srelu24.shipping import catalogue
from srelu24_gen import __version__, untrusted
from srelu24_gen import compile as compiler
from srelu24_gen.errors import BundleError, Srelu24Error, ToolchainError, Unsupported
from srelu24_gen.kept_kernel import KeptKernel, KernelMeta, encode_meta
from srelu24_gen.models import Pass, Shape
from srelu24_gen.render import render
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Problem
from srelu24_gen.store import BuildStore
from srelu24_gen.target import GpuTarget, Toolchain

FORMAT = 1
MANIFEST = "manifest.json"
_KERNEL_FILES = ("kernel.cu", "kernel.cubin", "compile.log", "meta.json")
_NAME = re.compile(
    r"kernels/[A-Za-z0-9_]+-[0-9a-f]{16}/(kernel\.cu|kernel\.cubin|compile\.log|meta\.json)"
    r"|records/[a-z0-9_]+/[a-z0-9-]+/[a-z0-9_]+\.json"
)
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){1,3}")
_MOST_BYTES = 1 << 30
"""Of a bundle, packed and unpacked; a kernel takes about 200 KB."""


class _File(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle says of itself."""

    format: int
    srelu24: str
    arch: str
    gpu: str
    nvrtc: str
    cutlass: str
    files: dict[str, _File]


@dataclass(frozen=True, slots=True)
class Contents:
    """What was packed or loaded."""

    path: str
    gpu: str
    kernels: int
    records: int
    """Packed, or taken: a record of the user's that is newer stays."""
    sha256: str
    """Of the file: who gets it by another way than the bundle can ask :func:`load` to insist on it."""


def pack(
    path: Path,
    shapes: Iterable[Shape],
    dtype: DType,
    target: GpuTarget,
    *,
    passes: Sequence[Pass] = (Pass.FORWARD,),
    bias: bool = False,
    activation: Activation = Activation.RELU2,
    db: Database | None = None,
    jobs: int | None = None,
    on_done: Callable[[int], None] = lambda total: None,
) -> Contents:
    """Write a bundle of every kernel that calls of FFNs of these widths launch on a GPU model, and of their records.

    It covers any number of tokens up to the largest given of those widths or, if that is more, recorded for them:

    - forward: ``ffn`` in every mode, sparse or dense and batch-invariant; ``linear24``; and ``sparsify24`` or
      ``gemm_relu2_24`` before ``matmul``. In e4m3 every recipe, and calibration, with X in bf16 and weights in e4m3.
    - backward: ``ffn`` with the layer of a :class:`srelu24.Recipe`, before and after its warm-up, and its backward
      pass, whether weight gradients are returned or added to buffers.

    It does not cover ``linear``, counts of non-zeros, residuals, nor records that the other machine has from elsewhere,
    since these may choose other kernels.

    Args:
        bias: with biases, too.
        activation: between the layers.
        on_done: called with the number of kernels as each is built.

    Raises:
        Unsupported: no kernel computes a shape on ``target``.
        CompileError, ToolchainError: a kernel cannot be built.
        BundleError: the file cannot be written.
    """
    db, shapes = db or Database.open(), list(shapes)

    def problems() -> list[Problem]:
        return [
            p for shape in shapes for p in catalogue.problems(shape, dtype, passes, bias=bias, activation=activation)
        ]

    records = {r.key: r for p in problems() for r in db.of_widths(p, target) if _readable(r)}
    shapes += dict.fromkeys(Shape.of(record.problem) for record in records.values())
    with _there(db, records.values()) as known:
        specs = catalogue.specs_up_to(problems(), target, known)
    outcomes = compiler.build_many(specs, jobs=jobs, on_done=lambda *_: on_done(len(specs)))
    files: dict[str, bytes] = {}
    for outcome in outcomes:
        if isinstance(outcome, Srelu24Error):
            raise outcome
        files |= _kernel_files(outcome)
    by_file: dict[str, list[TuningRecord]] = {}
    for record in records.values():
        by_file.setdefault(f"records/{record.arch}/{record.gpu}/{record.family.name}.json", []).append(record)
    files |= {name: encode_file(each) for name, each in by_file.items()}
    toolchain = Toolchain.find()
    manifest = Manifest(
        format=FORMAT,
        srelu24=__version__,
        arch=target.arch,
        gpu=target.key,
        nvrtc=toolchain.nvrtc_version,
        cutlass=toolchain.cutlass_version,
        files={name: _File(_sha256(content), len(content)) for name, content in sorted(files.items())},
    )
    digest = _write(path, {MANIFEST: msgspec.json.format(msgspec.json.encode(manifest)), **files})
    return Contents(str(path), target.key, len(specs), len(records), digest)


def load(
    path: Path, *, sha256: str | None = None, db: Database | None = None, store: BuildStore | None = None
) -> Contents:
    """Check a bundle and install it: its kernels into the build store, its records into the user's database. All of it
    is installed, or nothing is.

    Args:
        sha256: refuse any other file than the one with this digest, which :func:`pack` has told.

    Raises:
        BundleError: it is damaged, is not the file that is wanted, holds what a bundle does not, or was made by another
            version, whose kernels this one would never run.
        RecordError: the database cannot be written.
        CacheError: the build store cannot be written or trusted.
    """
    db, store = db or Database.open(), store or BuildStore()
    try:
        content = untrusted.read(path, _MOST_BYTES)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror or error}); give a file of `srelu24 pack`"
        ) from error
    digest = _sha256(content)
    if sha256 is not None and sha256.strip().lower() != digest:
        raise BundleError(f"{path} has SHA-256 {digest}, and {sha256} is wanted; get the bundle again from its maker")
    manifest, files = _read(path, content)
    kernels = _kernels(path, manifest, files)
    records = [r for name, text in files.items() if name.startswith("records/") for r in _records(path, name, text)]
    with store.installing(kernels, (manifest.nvrtc, manifest.cutlass)):
        taken = db.take(records)
    return Contents(str(path), manifest.gpu, len(kernels), taken, digest)


def _readable(record: TuningRecord) -> bool:
    """Whether this version can run what it holds; else it would only be in the way."""
    try:
        record.kernel_config()
    except Unsupported:
        return False
    return True


@contextlib.contextmanager
def _there(db: Database, records: Iterable[TuningRecord]) -> Iterator[Database]:
    """What a machine knows that has these records and those that ship: it chooses by them."""
    with tempfile.TemporaryDirectory() as folder:
        known = Database.open(db.shipped_folder, Path(folder) / "tuning.sqlite")
        known.take(records)
        yield known


def _kernel_files(built: compiler.BuiltKernel) -> dict[str, bytes]:
    """As :func:`load` wants them: of what is rendered today, where the cache may have a source with other comments."""
    source = render(built.spec).source
    meta = msgspec.structs.replace(built.meta, source_digest=_sha256(source.encode()))
    log = b""
    if built.folder is not None:
        with contextlib.suppress(OSError):
            log = untrusted.read(built.folder / "compile.log")
    kernel = KeptKernel(meta, source, built.cubin, log.decode(errors="replace"))
    return {f"kernels/{meta.name}-{meta.key[:16]}/{name}": content for name, content in kernel.files.items()}


def _write(path: Path, files: dict[str, bytes]) -> str:
    """At once, and the same bytes for the same contents; their SHA-256."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    try:
        whole_file.write(path, buffer.getvalue())
    except OSError as error:
        raise BundleError(f"{path} cannot be written ({error.strerror or error}); choose another path") from error
    return _sha256(buffer.getvalue())


def _read(path: Path, content: bytes) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and every file that it names, each as it says; nothing touches the disk."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if sum(info.file_size for info in infos) > _MOST_BYTES:
                raise BundleError(f"{path} would unpack to more than {_MOST_BYTES >> 20} MB; nothing was installed")
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
                raise BundleError(f"{path} is compressed as no bundle is; nothing was installed")
            manifest = _manifest(path, archive.read(MANIFEST) if MANIFEST in names else b"")
            if sorted(names) != sorted([MANIFEST, *manifest.files]):
                odd = sorted({*names, *manifest.files} - {MANIFEST} - ({*names} & {*manifest.files}))
                raise BundleError(f"{path} is damaged: its manifest and its files differ ({(odd or names)[0]!r})")
            for name in manifest.files:
                if not _NAME.fullmatch(name):
                    raise BundleError(f"{path} holds {name!r}, which no bundle does; nothing was installed")
            files = {name: archive.read(name) for name in manifest.files}
    except BundleError:
        raise
    except Exception as error:  # zipfile has no list of what it raises for a damaged file; nothing else runs here
        raise BundleError(f"{path} is no intact bundle ({str(error)[:200]}); copy it again") from error
    for name, expected in manifest.files.items():
        if (len(files[name]), _sha256(files[name])) != (expected.bytes, expected.sha256):
            raise BundleError(f"{path} is damaged: {name} is not what its manifest says; copy it again")
    return manifest, files


def _manifest(path: Path, text: bytes) -> Manifest:
    try:
        manifest = untrusted.decode(text, Manifest)
    except untrusted.Undecodable as error:
        raise BundleError(f"{path} is no bundle: {MANIFEST} cannot be read ({error})") from error
    if manifest.format != FORMAT:
        raise BundleError(f"{path} has format {manifest.format}, this version reads {FORMAT}; pack it again")
    for version in (manifest.nvrtc, manifest.cutlass):
        if not _VERSION.fullmatch(version):
            raise BundleError(f"{path} is no bundle: its manifest has {version[:100]!r} in the place of a version")
    return manifest


def _kernels(path: Path, manifest: Manifest, files: dict[str, bytes]) -> list[KeptKernel]:
    """Every kernel, if this version would make the very same ones."""
    packed = Toolchain(manifest.nvrtc, manifest.cutlass, ())
    try:
        here = Toolchain.find()
        if (here.nvrtc_version, here.cutlass_version) != (packed.nvrtc_version, packed.cutlass_version):
            raise BundleError(
                f"{path} was made with NVRTC {manifest.nvrtc} and CUTLASS {manifest.cutlass}; here are "
                f"{here.nvrtc_version} and {here.cutlass_version}, whose kernels are others; pack it with these"
            )
    except ToolchainError:
        pass  # no compiler: what the bundle is for
    entries: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        if name.startswith("kernels/"):
            _, entry, file = name.split("/")
            entries.setdefault(entry, {})[file] = content
    return [_kernel(path, manifest, packed, entry, parts) for entry, parts in entries.items()]


def _kernel(path: Path, manifest: Manifest, packed: Toolchain, entry: str, parts: dict[str, bytes]) -> KeptKernel:
    """What is installed is what this version renders, with the cubin and the compiler's report of the bundle."""
    try:
        meta = untrusted.decode(parts["meta.json"], KernelMeta)
        spec = KernelSpec(msgspec.convert(meta.family, Family), KernelConfig.from_dict(meta.config), meta.arch)
        rendered = render(spec)
        key = compiler.key_of(spec, toolchain=packed)
        kernel = KeptKernel(meta, parts["kernel.cu"].decode(), parts["kernel.cubin"], parts["compile.log"].decode())
    except (KeyError, ValueError, msgspec.MsgspecError, Srelu24Error) as error:
        raise BundleError(f"{path}: {entry} is no kernel of this version ({error}); pack it again") from error
    if key != meta.key or entry != f"{spec.name}-{key[:16]}":
        raise BundleError(
            f"{path} was made by srelu24 {manifest.srelu24[:20]!r} with other kernel sources than this {__version__}; "
            "pack it again with this version"
        )
    if (len(kernel.cubin), _sha256(kernel.cubin)) != (meta.cubin_bytes, meta.cubin_sha256):
        raise BundleError(f"{path} is damaged: the cubin of {entry} is not the one that was built")
    if kernel.source != rendered.source or meta.source_digest != _sha256(rendered.source.encode()):
        raise BundleError(f"{path}: the source of {entry} is not what this version compiles; pack it again")
    if (meta.nvrtc_version, meta.cutlass_version) != (packed.nvrtc_version, packed.cutlass_version):
        raise BundleError(f"{path}: {entry} was made with another compiler than its manifest says; pack it again")
    if reason := compiler.why_foreign(rendered, key, meta, kernel.cubin):
        raise BundleError(f"{path}: {entry} is not the kernel that it is called: {reason}; pack it again")
    if encode_meta(meta) != parts["meta.json"]:
        raise BundleError(f"{path} is damaged: the description of {entry} does not match its digest; copy it again")
    return kernel


def _records(path: Path, name: str, text: bytes) -> list[TuningRecord]:
    records = decode_file(text, f"{path}: {name}", strict=True)
    for record in records:
        if name != f"records/{record.arch}/{record.gpu}/{record.family.name}.json":
            raise BundleError(f"{path}: {name} holds a record of {record}, which has another place; pack it again")
    return records


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
