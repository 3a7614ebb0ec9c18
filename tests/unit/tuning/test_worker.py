"""The worker process with children that hang and crash, and what the child does."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from fake_gpu import DEFAULTS, GEMM1, GEMM2, H200
from srelu24.measuring import timing, verify
from srelu24.numerics import reference
from srelu24.tuning import session, worker
from srelu24.tuning.worker import (
    Candidate,
    Done,
    Failed,
    Job,
    Progressed,
    Reply,
    Started,
    Step,
    Timed,
    Verified,
    Worker,
)
from srelu24_gen import space
from srelu24_gen.errors import LaunchError
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, KernelConfig, KernelSpec, Op, Problem

# --- the worker process: the parent's end ---

CHILD = """
import json, os, signal, sys, time
send = lambda **fields: print(json.dumps(fields), flush=True)
send(type="Ready")
for line in sys.stdin:
    names = [c["name"] for c in json.loads(line)["candidates"]]
    alive = []
    for name in names:
        send(type="Started", name=name)
        if name.startswith("hangs"): time.sleep(60)
        if name.startswith("crashes"): print("CUDA error: illegal access", file=sys.stderr, flush=True); os.abort()
        if name.startswith("babbles"): print("warning: hello", flush=True)
        if name.startswith("breaks"):
            send(type="Failed", name=name, reason="illegal access", broken=True); sys.exit(1)
        if name.startswith("wrong"): send(type="Failed", name=name, reason="wrong result"); continue
        send(type="Verified", name=name); alive.append(name)
    for name in alive:
        if name.startswith("races"): time.sleep(60)
        if name.startswith("meets") and len(alive) > 1: os._exit(7)
    send(type="Progressed", fraction=1.0)
    for name in alive: send(type="Timed", name=name, ms=1.0, samples=[float(os.getpid())])
    send(type="Done")
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Worker]:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    with Worker("cpu", step_seconds=0.4, start_seconds=20, command=(sys.executable, "-S", str(script))) as found:
        yield found


def job(*names: str) -> Job:
    return Job(tuple(Candidate(name, (Step(GEMM2, DEFAULTS[1]),)) for name in names), 0.1, 1.0, 5)


def outcomes(child: Worker, *names: str) -> tuple[list[str], dict[str, str]]:
    """Who was timed, and why the others were not; each name must have exactly one end."""
    found = list(child.run(job(*names)))
    timed = [o.name for o in found if isinstance(o, Timed)]
    failed = {o.name: o.reason for o in found if isinstance(o, Failed)}
    ends = [o.name for o in found if isinstance(o, Timed | Failed)]
    assert sorted(ends) == sorted(names)
    return timed, failed


def test_candidates_that_fail_are_left_out_and_the_others_are_timed(children: Worker) -> None:
    timed, failed = outcomes(children, "a", "hangs 1", "b", "crashes", "wrong", "babbles", "breaks", "c", "hangs 2")
    assert timed == ["a", "b", "c"]
    assert "no answer within 0.4 s" in failed["hangs 1"]
    assert failed["hangs 2"] == failed["hangs 1"]
    assert failed["crashes"] == f"the worker ended by signal {signal.SIGABRT}: CUDA error: illegal access"
    assert failed["wrong"] == "wrong result"
    assert failed["breaks"] == "illegal access"
    assert "warning: hello" in failed["babbles"]


def test_one_child_serves_many_jobs(children: Worker) -> None:
    pids = {o.samples[0] for _ in range(3) for o in children.run(job("a")) if isinstance(o, Timed)}
    assert len(pids) == 1


def test_a_loss_while_timing_is_traced_by_timing_alone(children: Worker) -> None:
    timed, failed = outcomes(children, "a", "races", "b")
    assert timed == ["a", "b"]
    assert "hangs" in failed["races"]


def test_those_that_only_fail_together_are_given_up(children: Worker) -> None:
    timed, failed = outcomes(children, "meets", "a", "wrong")
    assert timed == []
    assert failed["meets"] == failed["a"] == "the worker ended with status 7"
    assert outcomes(children, "b") == (["b"], {})


def test_a_child_killed_between_jobs_is_replaced(children: Worker) -> None:
    (first,) = [o for o in children.run(job("a")) if isinstance(o, Timed)]
    os.kill(int(first.samples[0]), signal.SIGKILL)
    time.sleep(0.1)
    assert outcomes(children, "a") == (["a"], {})


def test_an_abandoned_job_does_not_answer_the_next_one(children: Worker) -> None:
    for outcome in children.run(job("wrong", "a")):
        assert isinstance(outcome, Failed)
        break
    assert outcomes(children, "b") == (["b"], {})


def test_a_child_that_cannot_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("raise SystemExit('no CUDA driver')")
    child = Worker("cpu", command=(sys.executable, str(script)))
    with pytest.raises(LaunchError, match=r"did not start: .*no CUDA driver"):
        list(child.run(job("a")))


def test_the_child_is_gone_after_close(children: Worker) -> None:
    (timed,) = [o for o in children.run(job("a")) if isinstance(o, Timed)]
    children.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(timed.samples[0]), 0)


# --- the worker process: the child's end ---


def test_the_child_verifies_then_times_and_chains_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    small1, small2 = (dataclasses.replace(GEMM1, m=64, n=256, k=64), dataclasses.replace(GEMM2, m=64, n=64, k=256))
    wrong = dataclasses.replace(DEFAULTS[1], stages=2)
    verified: list[tuple[Problem, KernelConfig]] = []
    launched: list[tuple[Op, object, object]] = []

    def fake_verify(
        problem: Problem, config: KernelConfig, operands: session.launch.Operands, arch: str
    ) -> verify.Check:
        verified.append((problem, config))
        return verify.Check(config != wrong, 0.5, "the first at row 3")

    monkeypatch.setattr(session, "verify", fake_verify)
    monkeypatch.setattr(session.launch, "run", lambda spec, o: launched.append((spec.family.op, o.a, o.out)))

    def fake_interleave(
        calls: dict[str, Callable[[], None]], *, on_progress: Callable[[timing.Progress], None], **_: object
    ) -> dict[str, timing.Timing]:
        launched.clear()
        for call in calls.values():
            call()
        on_progress(timing.Progress(1, 1.0))
        return {name: timing.Timing(2.0, [2.0, 2.0]) for name in calls}

    monkeypatch.setattr(session, "interleave", fake_interleave)
    replies: list[Reply] = []
    child = session.Session("cpu", replies.append)
    chain = (Step(small1, DEFAULTS[0]), Step(small2, DEFAULTS[1]))
    for _ in range(2):
        child.run(Job((Candidate("chain", chain), Candidate("bad", (Step(small2, wrong),))), 0.5, 1.0, 5))
    half = len(replies) // 2
    assert (
        replies[:half]
        == replies[half:]
        == [
            Started("chain"),
            Verified("chain"),
            Started("bad"),
            Failed("bad", "wrong result: the first at row 3"),
            Progressed(1.0),
            Timed("chain", 2.0, [2.0, 2.0]),
            Done(),
        ]
    )
    assert verified.count((small1, DEFAULTS[0])) == 1, "once is enough"
    (first, _, out1), (second, a2, _) = launched
    assert (first, second) == (Op.GEMM_RELU2_24, Op.SPGEMM)
    assert a2 is out1


def test_every_gemm_of_an_ffn_works_on_the_same_data_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(64, 64, 256)
    sparse, dense = shape.gemms(DType.BF16), shape.dense_gemms(DType.BF16)
    seen: dict[str, session.launch.Operands] = {}

    def kernel(spec: KernelSpec, o: session.launch.Operands) -> None:
        seen[f"{spec.family.op} {spec.family.activation}"] = o
        if spec.family.op is Op.GEMM:
            o.out.copy_(reference.gemm(o.a, o.b, activation=spec.family.activation))

    made: list[Shape] = []

    class Counted(session.SharedData):
        def __init__(self, shape: Shape, dtype: DType, density: float, device: str, seed: int) -> None:
            made.append(shape)
            super().__init__(shape, dtype, density, device, seed)

    monkeypatch.setattr(session, "SharedData", Counted)
    monkeypatch.setattr(session, "verify", lambda *_: verify.Check(True, 0.0, ""))
    monkeypatch.setattr(session.launch, "run", kernel)
    replies: list[Reply] = []
    child = session.Session("cpu", replies.append)
    steps = {
        "sparse": (Step(sparse[0], DEFAULTS[0]), Step(sparse[1], DEFAULTS[1])),
        "cublas": (Step(dense[0], None), Step(dense[1], None)),
        "mixed": (Step(dense[0], DEFAULTS[0]), Step(dense[1], None)),
        "gemm": (Step(dense[0], DEFAULTS[0]), Step(dense[1], DEFAULTS[1])),
        "second alone": (Step(dense[1], DEFAULTS[1]),),
    }
    for _ in range(2):
        candidates = tuple(Candidate(name, each) for name, each in steps.items())
        child.run(Job(candidates, 0.5, 0.0, 1, check="small"))
    assert [r for r in replies if isinstance(r, Failed)] == []
    assert {r.name for r in replies if isinstance(r, Timed)} == set(steps)
    assert made == [shape]
    gemm1, gemm2 = seen["gemm_relu2_24 relu2"], seen["gemm none"]
    assert gemm1.a is seen["gemm relu2"].a
    assert gemm1.b is seen["gemm relu2"].b
    assert seen["spgemm none"].b is gemm2.b
    # The dense way of cuBLAS is the reference on the same tensors.
    h = reference.gemm(gemm1.a, gemm1.b, activation=Activation.RELU2)
    expected = reference.gemm(h, gemm2.b)
    run = child._make_call(Candidate("cublas", steps["cublas"]), Job((), 0.5, 0.0, 1))
    run()
    assert isinstance(gemm2.out, torch.Tensor)
    assert torch.allclose(gemm2.out.float(), expected.float(), rtol=0.02, atol=0.02)


def test_small_problems_keep_what_decides_a_kernels_paths() -> None:
    for problem in (GEMM1, GEMM2, dataclasses.replace(GEMM1, m=100, n=1864, k=136)):
        found = verify.small(problem)
        assert found.family == problem.family
        assert (found.n - problem.n) % 256 == (found.k - problem.k) % 256 == 0
        assert found.m <= problem.m
        assert found.flops <= problem.flops
    big = verify.small(dataclasses.replace(GEMM1, m=2**17, n=2**15, k=2**14))
    assert big.m % 64, "rows end inside a warpgroup"
    for tile_m in {m for m, _ in space.tiles(H200) if m > 64}:
        assert -(-big.m // (2 * tile_m)) * (big.n // 256) > H200.sm_count // 2, "more than one wave"


def test_the_real_child_answers_survives_an_error_and_dies_with_its_parent() -> None:
    command = [*worker.COMMAND, "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=worker.child_environment(), **pipes) as child:
        assert child.stdin
        assert child.stdout
        assert msgspec.json.decode(child.stdout.readline(), type=Reply) == worker.Ready()
        for _ in range(2):
            impossible = msgspec.structs.replace(job("a"), density=2.0)  # no data has this density
            child.stdin.write(msgspec.json.encode(impossible) + b"\n")
            child.stdin.flush()
            replies = [msgspec.json.decode(child.stdout.readline(), type=Reply) for _ in range(3)]
            assert isinstance(replies[1], Failed)
            assert "density" in replies[1].reason
            assert replies[2] == Done()
        child.stdin.close()
        assert child.wait(timeout=10) == 0
