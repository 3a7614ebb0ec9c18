"""Bundles: what is packed arrives, and what is damaged, foreign or of another version leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

import made_up_compiler
from made_up_compiler import machine, no_toolchain
from srelu24.cli import main
from srelu24.db.choice import answer
from srelu24.db.database import Database
from srelu24.db.records import Evidence, TuningRecord, encode_file
from srelu24.shipping import bundle
from srelu24_gen import compile as compiler
from srelu24_gen import space
from srelu24_gen.errors import BundleError, Srelu24Error, ToolchainError, Unsupported
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import PRUNED_ACTIVATIONS, DType, KernelConfig, KernelSpec, Op
from srelu24_gen.store import BuildStore
from srelu24_gen.target import TARGETS, Toolchain
from tampered_bundle import cubin_with, file_with, meta_with, of_kind, rewritten, source_with

H200 = TARGETS["h200"]
DEEP = b'{"x": ' + b"[" * 10**5
SHAPE = Shape(4096, 1024, 4096)
NEAR = Shape(512, 1024, 4096)
TUNED = KernelConfig(stages=3, raster_group=4)

OTHER_PRUNED = set(PRUNED_ACTIVATIONS) - {Op.GEMM_RELU2_24}
"""First GEMMs of other activations, which are packed where they are asked for."""


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler that makes cubins up, and the names of what it was asked for."""
    return made_up_compiler.install(monkeypatch)


def record(shape: Shape, config: KernelConfig = TUNED, when: str = "2026-01-01T00:00:00Z") -> TuningRecord:
    problem = shape.gemms(DType.BF16)[1]
    return TuningRecord(
        family=problem.family,
        m=problem.m,
        n=problem.n,
        k=problem.k,
        arch="sm_90a",
        gpu="h200",
        config=config.to_dict(),
        density=0.1,
        evidence=Evidence(ms=1.0, default_ms=1.1, samples=9, source_digest="d", when=when),
    )


_packed: list[bytes] = []


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one shape, made on another machine than the one the test is then on."""
    db = machine(tmp_path / "there", monkeypatch)
    db.put(record(SHAPE))
    db.put(record(NEAR, KernelConfig(stages=2)))
    path = tmp_path / "bundle.zip"
    if _packed:  # the same bytes every time, and seconds to make
        path.write_bytes(_packed[0])
    else:
        found = bundle.pack(path, [SHAPE], DType.BF16, H200, db=db)
        assert found.records == 2
        assert found.kernels >= 6, "two sparse, two dense GEMMs, sparsify24, and the neighbour's"
        _packed.append(path.read_bytes())
    machine(tmp_path / "here", monkeypatch)
    return path


def installed(db: Database) -> tuple[int, int]:
    return len(BuildStore().entries()), len(db.user_records())


def test_a_machine_without_a_compiler_runs_what_was_packed(
    packed: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    no_toolchain(monkeypatch)
    compiled.clear()
    db = Database.open()
    problem = SHAPE.gemms(DType.BF16)[1]
    spec = KernelSpec(problem.family, TUNED)
    with pytest.raises(ToolchainError):
        compiler.build(spec)
    found = bundle.load(packed)
    assert installed(db) == (found.kernels, found.records) == (found.kernels, 2)
    built = compiler.build(spec)
    assert built.from_cache
    assert built.cubin
    for each in SHAPE.gemms(DType.BF16):
        assert compiler.build(KernelSpec(each.family, space.default(each, H200))).from_cache
    match = db.find(problem, H200)
    assert match
    assert (match.how, match.config) == ("exact", TUNED)
    assert compiled == []
    assert bundle.load(packed).records == 0, "a second time nothing is new"


def test_what_was_not_packed_is_named_where_nothing_can_compile(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SRELU24_CACHE_DIR", str(packed.parent / "elsewhere"))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(packed.parent / "data"))
    no_toolchain(monkeypatch)
    bundle.load(packed)
    with pytest.raises(ToolchainError, match=r"c2_s2_wg.*is in no bundle that was loaded"):
        compiler.build(KernelSpec(SHAPE.gemms(DType.FP16)[1].family, KernelConfig(stages=2)))


def test_a_newer_record_of_the_users_stays(packed: Path) -> None:
    db = Database.open()
    db.put(record(SHAPE, KernelConfig(stages=4), when="2026-02-02T00:00:00Z"))
    assert bundle.load(packed, db=db).records == 1
    match = db.find(SHAPE.gemms(DType.BF16)[1], H200)
    assert match
    assert match.config == KernelConfig(stages=4)


def test_what_is_packed_is_what_the_other_machine_will_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of other widths stays here, so there something else answers."""
    db = machine(tmp_path / "there", monkeypatch)
    db.put(record(Shape(512, 1152, 4096), KernelConfig(stages=2)))
    bundle.pack(tmp_path / "b.zip", [SHAPE], DType.BF16, H200, db=db)
    here = machine(tmp_path / "here", monkeypatch)
    assert bundle.load(tmp_path / "b.zip").records == 0
    names = {entry.name for entry in BuildStore().entries()}
    for m in range(1, SHAPE.m, 97):
        for problem in SHAPE._replace(m=m).gemms(DType.BF16):
            assert KernelSpec(problem.family, answer(problem, H200, here).config).name in names, m


@pytest.mark.filterwarnings("ignore:.*unknown field.*tile_q")
def test_a_record_that_this_version_cannot_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = machine(tmp_path / "there", monkeypatch)
    shipped = tmp_path / "there" / "shipped" / "sm_90a" / "h200" / "spgemm_bf16.json"
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes(encode_file([msgspec.structs.replace(record(SHAPE), config={"tile_q": 1}), record(NEAR)]))
    assert bundle.pack(tmp_path / "b.zip", [SHAPE], DType.BF16, H200, db=db).records == 1
    machine(tmp_path / "here", monkeypatch)
    assert bundle.load(tmp_path / "b.zip").records == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (SHAPE, DType.E4M3, "a training step does not take e4m3"),
        (Shape(4096, 1000, 4096), DType.BF16, "a width of 1000 is not a multiple of 64"),
        (Shape(8, 1024, 4096), DType.BF16, "8 tokens are not a multiple of 16"),
    ],
)
def test_a_step_that_no_kernel_computes_is_not_packed(
    shape: Shape, dtype: DType, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = machine(tmp_path, monkeypatch)
    with pytest.raises(Unsupported, match=reason):
        bundle.pack(tmp_path / "b.zip", [shape], dtype, H200, passes=(Pass.BACKWARD,), db=db)
    assert not (tmp_path / "b.zip").exists()


def swap(end: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes], dict[str, Any]], None]:
    def change(files: dict[str, bytes], _: dict[str, Any]) -> None:
        name = of_kind(files, end)
        assert old in files[name]
        files[name] = files[name].replace(old, new, 1)

    return change


def append(end: str) -> Callable[[dict[str, bytes], dict[str, Any]], None]:
    return lambda files, _: files.update({of_kind(files, end): files[of_kind(files, end)] + b"x"})


BAD: dict[str, tuple[Callable[[dict[str, bytes], dict[str, Any]], None], bool, str]] = {
    "a changed cubin": (append(".cubin"), False, "kernel.cubin is not what its manifest says"),
    "a changed record": (append("spgemm_bf16.json"), False, "is not what its manifest says"),
    "a changed cubin, rehashed": (append(".cubin"), True, "is not the one that was built"),
    "a record that is none": (
        lambda f, _: f.update({of_kind(f, "spgemm_bf16.json"): b"{}"}),
        True,
        "not a tuning record",
    ),
    "a missing file": (lambda f, _: f.pop(of_kind(f, ".cubin")) and None, False, "differ"),
    "a missing file, rehashed": (lambda f, _: f.pop(of_kind(f, ".cubin")) and None, True, "is no kernel"),
    "a file too many": (lambda f, _: f.update({"kernels/more": b""}), False, "differ"),
    "a way out of the folder": (lambda f, _: f.update({"kernels/../../../evil": b""}), True, "which no bundle does"),
    "an absolute path": (lambda f, _: f.update({"/etc/evil": b""}), True, "which no bundle does"),
    "a foreign file": (lambda f, _: f.update({"records/run.py": b""}), True, "which no bundle does"),
    "another format": (lambda _, m: m.update(format=2), False, "format 2"),
    "another NVRTC": (lambda _, m: m.update(nvrtc="12.9.1"), False, "NVRTC 12.9.1"),
    "no manifest": (lambda _, m: m.clear(), False, "manifest.json cannot be read"),
    "other sources": (swap("meta.json", b'"key": "', b'"key": "0'), True, "other kernel sources"),
    "a kernel named out of the cache": (meta_with(name="../outside/x"), True, "its name is '../outside/x'"),
    "a kernel of another name": (meta_with(name="gemm_bf16"), True, "its name is 'gemm_bf16'"),
    "another entry": (meta_with(entry="srelu24_kernel"), True, "its entry is"),
    "another ABI": (meta_with(abi=1), True, "its abi is '1'"),
    "another template": (meta_with(template="/etc/passwd"), True, "its template is '/etc/passwd'"),
    "another architecture": (meta_with(arch="sm_80"), True, "of this version|other kernel sources"),
    "no architecture": (meta_with(arch="../sm_90a"), True, "no kernels are made for"),
    "another compiler": (meta_with(nvrtc_version="13.1.2"), True, "another compiler than its manifest"),
    "a description with a flipped bit": (swap("meta.json", b'"registers": 168', b'"registers": 169'), True, "digest"),
    "another kernel's cubin": (cubin_with(lambda own, other: other), True, "its cubin is not this kernel's"),
    "a cubin of random bytes": (
        cubin_with(lambda own, _: random.Random(1).randbytes(len(own))),
        True,
        "not a 64-bit ELF",
    ),
    "an empty cubin": (cubin_with(lambda *_: b""), True, "not a 64-bit ELF"),
    "a cubin that is cut": (cubin_with(lambda own, _: own[:-1]), True, "cut short"),
    "a program of the host": (cubin_with(lambda own, _: own[:0x12] + b"\x3e" + own[0x13:]), True, "not for CUDA"),
    "a cubin for another GPU": (cubin_with(lambda own, _: own[:0x31] + b"\x50" + own[0x32:]), True, "made for sm_80"),
    "a foreign source": (source_with(lambda _: b"int main() {}"), True, "is not what this version compiles"),
    "a source with a comment more": (source_with(lambda s: s + b"// hello"), True, "is not what this version compiles"),
    "a log that is no text": (file_with("compile.log", lambda _: b"\xff"), True, "is no kernel of this version"),
    "a description that is no text": (file_with("meta.json", lambda _: b"\xff\xfe{"), True, "is no kernel"),
    "a description nested deeply": (file_with("meta.json", lambda _: DEEP), True, "nested too deeply"),
    "records nested deeply": (file_with("spgemm_bf16.json", lambda _: DEEP), True, "nested too deeply"),
    "records that are no text": (
        file_with("spgemm_bf16.json", lambda s: s.replace(b"h200", b"h2\xff0")),
        True,
        "not a tuning record|cannot be read",
    ),
    "a record of a GPU that is a path": (
        file_with("spgemm_bf16.json", lambda s: s.replace(b'"h200"', b'"../../x"')),
        True,
        "cannot be read",
    ),
    "a record in another one's place": (
        file_with("spgemm_bf16.json", lambda s: s.replace(b'"h200"', b'"h100"')),
        True,
        "which has another place",
    ),
    "a version that is none": (lambda _, m: m.update(nvrtc="../../x"), False, "in the place of a version"),
    "an unknown field": (swap("meta.json", b'"tile_m"', b'"tile_q"'), True, "unknown field"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_refused_whole(what: str, packed: Path) -> None:
    change, rehash, reason = BAD[what]
    other = rewritten(packed, change, rehash)
    db = Database.open()
    with pytest.raises(Srelu24Error, match=reason) as error:
        bundle.load(other)
    assert str(other) in str(error.value)
    assert "\n" not in str(error.value)
    assert installed(db) == (0, 0)
    assert not BuildStore().packed_with()
    assert not BuildStore().folder.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -30])
def test_a_torn_file_is_refused(keep: int, packed: Path) -> None:
    torn = packed.with_name("torn.zip")
    torn.write_bytes(packed.read_bytes()[: keep or None] if keep else b"")
    if keep == 0:
        torn.write_bytes(b"")
    with pytest.raises(BundleError):
        bundle.load(torn)
    assert installed(Database.open()) == (0, 0)


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_a_flipped_byte_is_refused_or_changes_nothing(place: int, packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[place * len(content) // 100] ^= 0x55
    flipped = packed.with_name("flipped.zip")
    flipped.write_bytes(content)
    try:
        bundle.load(flipped)
    except Srelu24Error:
        assert installed(Database.open()) == (0, 0)
    else:  # in what the archive keeps beside the files, such as their dates
        entries = {meta.name: meta.cubin_sha256 for meta in BuildStore().entries()}
        bundle.load(packed)
        assert {meta.name: meta.cubin_sha256 for meta in BuildStore().entries()} == entries


def test_the_same_contents_give_the_same_file(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = machine(tmp_path / "there", monkeypatch)
    again = tmp_path / "again.zip"
    bundle.pack(again, [SHAPE], DType.BF16, H200, db=db)
    assert again.read_bytes() == packed.read_bytes()


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path / "there", monkeypatch)
    file = tmp_path / "b.zip"
    run = CliRunner()
    made = run.invoke(
        main.app, ["pack", "--gpu", "nvidia-h200", "--shape", str(SHAPE), "--bias", "--pass", "all", "-o", str(file)]
    )
    assert made.exit_code == 0, made.output
    machine(tmp_path / "here", monkeypatch)
    loaded = run.invoke(main.app, ["load", str(file)])
    assert loaded.exit_code == 0, loaded.output
    assert "new records for h200" in loaded.stderr
    families = [entry.family for entry in BuildStore().entries()]
    assert {family["bias"] for family in families} == {True, False}
    assert {family["op"] for family in families} == set(Op) - {Op.QUANTIZE_ROWS, Op.SQUARE_ROWS, *OTHER_PRUNED}
    assert run.invoke(main.app, ["load", str(tmp_path / "none.zip")]).exit_code == 1


def test_a_bundle_can_be_pinned(packed: Path) -> None:
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    with pytest.raises(BundleError, match=rf"has SHA-256 {digest}, and {'0' * 64} is wanted"):
        bundle.load(packed, sha256="0" * 64)
    assert installed(Database.open()) == (0, 0)
    assert bundle.load(packed, sha256=digest.upper()).sha256 == digest


def test_what_is_packed_tells_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.zip"
    db = machine(tmp_path / "there", monkeypatch)
    found = bundle.pack(path, [Shape(64, 320, 832)], DType.BF16, H200, db=db)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path / "here", monkeypatch)
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(BundleError, match="cannot be read"):
            bundle.load(path)


def test_a_bomb_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = rewritten(packed, file_with("compile.log", lambda _: bytes(32 << 20)), rehash=True)
    assert bomb.stat().st_size < 1 << 20
    monkeypatch.setattr(bundle, "_MOST_BYTES", 16 << 20)
    with pytest.raises(BundleError, match="would unpack to more"):
        bundle.load(bomb)


@pytest.mark.filterwarnings("ignore:the tuning store")
def test_records_that_cannot_be_stored_leave_no_kernel(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = Database.open()
    db.user_file.parent.mkdir(parents=True)
    db.user_file.mkdir()
    with pytest.raises(Srelu24Error, match="cannot be written"):
        bundle.load(packed, db=db)
    assert BuildStore().entries() == []
    assert not BuildStore().packed_with()
    db.user_file.rmdir()
    assert bundle.load(packed, db=db).records == 2


def test_a_second_bundle_leaves_the_first_one_on(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was made with another NVRTC, on a machine without any."""
    here = packed.parent / "here"
    machine(packed.parent / "third", monkeypatch)
    other = packed.with_name("newer.zip")
    with monkeypatch.context() as patch:
        find = Toolchain.find()
        patch.setattr(Toolchain, "find", lambda: Toolchain("13.5.37", find.cutlass_version, find.include_dirs))
        bundle.pack(other, [Shape(64, 320, 832)], DType.BF16, H200)
    machine(here, monkeypatch)
    no_toolchain(monkeypatch)
    bundle.load(packed)
    bundle.load(other)
    for shape in (SHAPE, Shape(64, 320, 832)):
        for problem in shape.gemms(DType.BF16):
            spec = KernelSpec(problem.family, answer(problem, H200, Database.open()).config)
            assert compiler.build(spec).from_cache
            assert compiler.why_missing(spec) is None
    assert len(compiler.build_many([spec, spec])) == 2
