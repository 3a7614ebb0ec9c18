"""Many processes that build and write at once, and are killed: nothing is half there, nothing acknowledged is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from attacks import Attack

from made_up_cubin import cubin
from rows import H200, PROBLEM, trial
from srelu24.db.database import Database
from srelu24_gen import compile as compiler
from srelu24_gen.render import render
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op
from srelu24_gen.store import BuildStore
from srelu24_gen.target import Toolchain

FORK = multiprocessing.get_context("fork")
BUILDERS, WRITERS = 24, 8
REPORT = """ptxas info    : Compiling entry function '{entry}' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 64 bytes smem
"""
TOOLCHAIN = Toolchain("13.0.88", "4.2.0", (Path("/nowhere"),))
SPECS = [
    KernelSpec(Family(op, DType.BF16), KernelConfig(stages=stages))
    for op in (Op.GEMM, Op.SPGEMM)
    for stages in range(2, 8)
]


def _compile(source: str, name: str, *, entry: str, **_: Any) -> compiler.Compiled:
    return compiler.Compiled(cubin(entry, source.encode() * 20), REPORT.format(entry=entry), 0.0)


def _build(folder: Path) -> None:
    compiler.compile_source = _compile  # type: ignore[assignment]
    rendered = [render(spec) for spec in SPECS]
    while True:
        for each in rendered:
            built = compiler.build_rendered(each, store=BuildStore(folder), toolchain=TOOLCHAIN)
            assert built.cubin == _compile(each.source, "", entry=built.meta.entry).cubin
        BuildStore(folder).clear()


def test_builders(tmp_path: Path) -> None:
    """All build the same kernels in the same cache, which one or another clears; some are killed. Where a cache is
    cleared while a kernel is written it is not kept, and runs all the same."""
    attack = Attack("builders of one cache", 0.12)
    folder = tmp_path / "cache"
    running = [FORK.Process(target=_build, args=(folder,)) for _ in range(BUILDERS)]
    for process in running:
        process.start()
    for draw in attack:
        time.sleep(0.03)
        place = draw.randrange(BUILDERS)
        assert running[place].exitcode is None, "no builder fails"
        running[place].kill()
        running[place].join()
        attack.counts["killed"] += 1
        running[place] = FORK.Process(target=_build, args=(folder,))
        running[place].start()
        if attack.counts["killed"] % 10 == 0:
            for meta in BuildStore(folder).entries():  # whole, or not there
                assert meta.entry == compiler.entry_of(meta.key)
                attack.counts["entries checked"] += 1
    for process in running:
        process.kill()
        process.join()
    compiler_of_tests = compiler.compile_source
    try:
        compiler.compile_source = _compile  # type: ignore[assignment]
        for spec in SPECS:
            built = compiler.build(spec, store=BuildStore(folder), toolchain=TOOLCHAIN)
            assert compiler.build(spec, store=BuildStore(folder), toolchain=TOOLCHAIN).cubin == built.cubin
    finally:
        compiler.compile_source = compiler_of_tests
    for path in folder.glob(".tmp-*"):
        os.utime(path, (0, 0))
    BuildStore(folder).sweep()
    assert not list(folder.glob(".tmp-*"))


def _write(file: Path, writer: int, acknowledged: int) -> None:
    db = Database.open(file.parent / "none", file)
    for i in range(10**6):
        db.add_trial(trial(writer * 10**6 + i))
        os.write(acknowledged, b"%d\n" % (writer * 10**6 + i))


def test_writers(tmp_path: Path) -> None:
    attack = Attack("writers of one store", 0.12)
    file = tmp_path / "tuning.sqlite"
    acknowledged = os.open(tmp_path / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    started = 0

    def start() -> Any:
        nonlocal started
        started += 1
        process = FORK.Process(target=_write, args=(file, started, acknowledged))
        process.start()
        return process

    running = [start() for _ in range(WRITERS)]
    for draw in attack:
        time.sleep(0.06)
        place = draw.randrange(WRITERS)
        assert running[place].exitcode is None, "no writer fails"
        os.kill(running[place].pid, signal.SIGKILL)
        running[place].join()
        attack.counts["killed"] += 1
        running[place] = start()
    for process in running:
        process.kill()
        process.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = [each.samples for each in Database.open(tmp_path / "none", file).trials(PROBLEM, H200)]
    told = [int(line) for line in (tmp_path / "acknowledged").read_text().split()]
    attack.counts["rows acknowledged"] = len(told)
    assert set(told) <= set(stored)
    assert len(stored) == len(set(stored)) <= len(told) + started
