"""Records keep naming the binary that was timed when its key changes and its machine code does not.

The key of a binary (:func:`srelu24_gen.compile.key_of`) covers the code of its template and headers. A change that
only tidies them gives every kernel another key, and the same instructions. Then a record's times are still true, and
:func:`rekey` proves it: it builds each kernel from the tree as it was and from the tree as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from srelu24.db.records import TuningRecord
from srelu24_gen.compile import BuiltKernel, build_many
from srelu24_gen.errors import RecordError, Srelu24Error, Unsupported
from srelu24_gen.machine_code import machine_code
from srelu24_gen.spec import Family, KernelSpec

_BUILD_BEFORE = """
import json, pathlib, sys
import msgspec
from srelu24_gen.compile import BuiltKernel, build_many
from srelu24_gen.spec import Family, KernelConfig, KernelSpec
place = {}
for i, each in enumerate(json.load(sys.stdin)):
    try:
        family, config = msgspec.convert(each["family"], Family), KernelConfig.from_dict(each["config"])
        place[KernelSpec(family, config, each["arch"])] = i
    except Exception as error:
        print(json.dumps([i, "", f"the earlier tree does not know it: {error}"]), flush=True)
def done(spec, built):
    i, found = place[spec], isinstance(built, BuiltKernel)
    if found:
        pathlib.Path(sys.argv[1], str(i)).write_bytes(built.cubin)
    print(json.dumps([i, built.meta.key if found else "", "" if found else str(built)]), flush=True)
build_many(place, on_done=done)
"""
"""Runs on the modules of the tree as it was, of which it asks no more than this."""


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """One record and what became of it."""

    record: TuningRecord
    """With today's key where the outcome is "same", else as it was."""
    outcome: Literal["current", "same", "changed", "stale", "failed"]
    """It names today's binary already; the binary it names has the machine code of today's; other machine code; it
    names neither binary, so nothing is known of the one that was timed; a kernel could not be built."""
    detail: str = ""


def rekey(
    records: Iterable[TuningRecord], before: Path, on_built: Callable[[int, int], None] = lambda done, of: None
) -> list[Rekeyed]:
    """Give records whose kernels have another key and the same machine code today's key.

    Args:
        records: of any GPU; nothing is run on one.
        before: a checkout of srelu24 in which the records were not stale.
        on_built: called with how many kernels of how many are built.

    Returns:
        In the order of ``records``.

    Raises:
        RecordError: ``before`` is no checkout, or nothing can be built from it.
        ToolchainError: nothing can be compiled here.
    """
    records = list(records)
    if not (before / "generator" / "srelu24_gen" / "compile.py").is_file():
        raise RecordError(f"{before} is no checkout of srelu24; give one in which the records are not stale")
    specs: dict[KernelSpec, None] = {}
    results: dict[int, Rekeyed] = {}
    of_record: dict[int, KernelSpec] = {}
    for place, record in enumerate(records):
        try:
            of_record[place] = KernelSpec(record.family, record.kernel_config().compiled(), record.arch)
            specs[of_record[place]] = None
        except Unsupported as error:
            results[place] = Rekeyed(record, "failed", str(error))
    total = 2 * len(specs)
    built = 0

    def advance() -> None:
        nonlocal built
        built += 1
        on_built(built, total)

    now = dict(zip(specs, build_many(specs, on_done=lambda spec, outcome: advance()), strict=True))
    then = _build_before(list(specs), before.absolute(), advance)
    for place, spec in of_record.items():
        results[place] = _compare(records[place], then[spec], now[spec])
    return [results[place] for place in range(len(records))]


@dataclass(frozen=True, slots=True)
class _Before:
    """A kernel as the earlier tree builds it."""

    key: str
    cubin: bytes
    failure: str


def _build_before(specs: list[KernelSpec], tree: Path, advance: Callable[[], None]) -> dict[KernelSpec, _Before]:
    """Build kernels by the modules of another checkout, in a process and a cache of its own."""
    wanted = [{"family": _fields(spec.family), "config": spec.config.to_dict(), "arch": spec.arch} for spec in specs]
    paths = os.pathsep.join(filter(None, [str(tree / "generator"), *sys.path]))
    found: dict[KernelSpec, _Before] = {}
    with tempfile.TemporaryDirectory(prefix="srelu24-before-") as folder:
        environment = {**os.environ, "PYTHONPATH": paths, "SRELU24_CACHE_DIR": str(Path(folder) / "cache")}
        with subprocess.Popen(
            [sys.executable, "-P", "-c", _BUILD_BEFORE, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        ) as child:
            assert child.stdin
            assert child.stdout
            json.dump(wanted, child.stdin)
            child.stdin.close()
            for line in child.stdout:
                place, key, failure = json.loads(line)
                cubin = b"" if failure else (Path(folder) / str(place)).read_bytes()
                found[specs[place]] = _Before(key, cubin, failure)
                advance()
    if child.returncode or len(found) != len(specs):
        raise RecordError(f"the kernels of {tree} could not be built; its errors are above")
    return found


def _fields(family: Family) -> dict[str, Any]:
    """Those that say something, so that an earlier tree with fewer of them can read them."""
    given: dict[str, Any] = msgspec.to_builtins(family)
    plain = msgspec.to_builtins(Family(family.op, family.dtype))
    return {name: value for name, value in given.items() if name in ("op", "dtype") or value != plain[name]}


def _compare(record: TuningRecord, then: _Before, now: BuiltKernel | Srelu24Error) -> Rekeyed:
    named = record.evidence.source_digest
    if isinstance(now, Srelu24Error):
        return Rekeyed(record, "failed", str(now))
    if named == now.meta.key:
        return Rekeyed(record, "current")
    if then.failure:
        return Rekeyed(record, "failed", then.failure)
    if named != then.key:
        return Rekeyed(record, "stale", "the kernel had changed before")
    if then.cubin != now.cubin and machine_code(then.cubin) != machine_code(now.cubin):
        return Rekeyed(record, "changed", "other machine code")
    evidence = msgspec.structs.replace(record.evidence, source_digest=now.meta.key)
    return Rekeyed(msgspec.structs.replace(record, evidence=evidence), "same")
