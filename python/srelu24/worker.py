"""Runs kernels that may hang or crash in a child process: both ends of the pipe.

The child (``python -m srelu24.worker``) takes a :class:`Job` per line of JSON on stdin, verifies every candidate, times
those that are right against each other, and answers with a line per event. The parent (:class:`Worker`) gives every
step a deadline; when the child hangs or dies it starts another without the candidate to blame, and goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Self

import msgspec
import torch

from srelu24 import launch
from srelu24.measure import capture, interleave
from srelu24.verify import verify
from srelu24.workload import operands_for
from srelu24_gen.errors import LaunchError, Srelu24Error
from srelu24_gen.spec import KernelConfig, KernelSpec, Problem

COMMAND = (sys.executable, "-m", "srelu24.worker")


class Step(msgspec.Struct, frozen=True):
    """One kernel of a candidate."""

    problem: Problem
    config: KernelConfig


class Candidate(msgspec.Struct, frozen=True):
    """One thing to time: a kernel, or two of which the second consumes the output of the first."""

    name: str
    """Unique within its job."""
    steps: tuple[Step, ...]


class Job(msgspec.Struct, frozen=True):
    """Candidates to verify, then to time against each other."""

    candidates: tuple[Candidate, ...]
    density: float
    """Share of non-zero activations in the data."""
    seconds: float
    """For the rounds of all candidates together."""
    min_rounds: int
    arch: str = "sm_90a"
    seed: int = 0


class Started(msgspec.Struct, frozen=True, tag=True):
    """The child begins to verify a candidate. Between the last of these and Done it times."""

    name: str


class Verified(msgspec.Struct, frozen=True, tag=True):
    name: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A candidate is out: it is wrong, could not be launched, hung or crashed."""

    name: str
    reason: str
    broken: bool = False
    """It broke the CUDA context: the child ends here."""


class Progressed(msgspec.Struct, frozen=True, tag=True):
    """Share of the rounds that are done."""

    fraction: float


class Timed(msgspec.Struct, frozen=True, tag=True):
    """Times of a right candidate; samples of equal index are of one round, for all candidates of a job."""

    name: str
    ms: float
    """Median of the samples."""
    samples: list[float]
    sm_mhz: float | None = None
    watts: float | None = None
    throttled: bool = False


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The child is up."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The job is over."""


Reply = Started | Verified | Failed | Progressed | Timed | Ready | Done
Outcome = Failed | Progressed | Timed


class _ChildLost(Exception):
    """The child died, hangs or cannot go on."""


class Worker:
    """The parent's end. Use as a context manager; the child is gone when it ends, whatever happened.

    Args:
        device: what the child works on, for example ``cuda:0``.
        step_seconds: the longest silence between two replies; a kernel that takes longer hangs.
        start_seconds: the longest start of a child.
        command: how to start one.
    """

    def __init__(
        self,
        device: str,
        *,
        step_seconds: float = 30.0,
        start_seconds: float = 180.0,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._command = (*command, device)
        self._step_seconds = step_seconds
        self._start_seconds = start_seconds
        self._child: _Child | None = None
        self._suspect: str | None = None
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the child."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def run(self, job: Job) -> Iterator[Outcome]:
        """Yields what happens. Every candidate ends in exactly one Timed or Failed.

        A candidate during whose verification the child is lost has failed. If it is lost while several are timed,
        each is timed alone, and those that survive once more together.

        Raises:
            LaunchError: no child can be started.
        """
        losses_together = 0
        candidates = list(job.candidates)
        while candidates:
            failed: set[str] = set()
            try:
                for outcome in self._attempt(msgspec.structs.replace(job, candidates=tuple(candidates))):
                    if isinstance(outcome, Failed):
                        failed.add(outcome.name)
                    yield outcome
                return
            except _ChildLost as lost:
                blamed = [c for c in candidates if c.name == self._suspect]
                candidates = [c for c in candidates if c.name not in failed and c not in blamed]
                if not blamed and not self._broken:  # it happened while they were timed
                    losses_together += 1
                    if len(candidates) == 1 or losses_together == 2:
                        blamed, candidates = candidates, []
                    else:
                        failures = self._alone(job, candidates)
                        yield from failures
                        candidates = [c for c in candidates if c.name not in {f.name for f in failures}]
                for candidate in blamed:
                    yield Failed(candidate.name, str(lost))

    def _alone(self, job: Job, candidates: list[Candidate]) -> list[Failed]:
        """Which of the candidates fail when nothing else runs."""
        failures: list[Failed] = []
        for candidate in candidates:
            alone = msgspec.structs.replace(job, candidates=(candidate,), seconds=0.0, min_rounds=1)
            failures += [outcome for outcome in self.run(alone) if isinstance(outcome, Failed)]
        return failures

    def _attempt(self, job: Job) -> Iterator[Outcome]:
        """One child, one job. Times are held back until all are there: a lost child leaves no half of them."""
        timed: list[Timed] = []
        finished = False
        self._suspect, self._broken = None, False
        child = self._ready_child()
        try:
            child.send(job)
            while not isinstance(reply := child.receive(self._step_seconds), Done):
                if isinstance(reply, Started):
                    self._suspect = reply.name
                elif isinstance(reply, Verified | Failed):
                    self._suspect = None
                if isinstance(reply, Timed):
                    timed.append(reply)
                elif isinstance(reply, Failed | Progressed):
                    yield reply
                if isinstance(reply, Failed) and reply.broken:
                    self._broken = True
                    raise _ChildLost(reply.reason)
            finished = True
        finally:
            if not finished:  # lost, or the caller went away: what it still says must not answer another job
                self.close()
        yield from timed

    def _ready_child(self) -> _Child:
        if self._child is not None and not self._child.alive:
            self.close()
        if self._child is None:
            self._child = _Child(self._command)
            try:
                self._child.receive(self._start_seconds)
            except _ChildLost as lost:
                self.close()
                raise LaunchError(f"the worker process did not start: {lost}") from lost
        return self._child


def child_environment() -> dict[str, str]:
    """This process's environment, with its import path, however that came about."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


class _Child:
    """A running child and its pipes."""

    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        # A session of its own: Ctrl-C reaches the parent only, which decides what happens.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env=child_environment(),
        )
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def _listen(self, stdout: IO[bytes]) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed by kill()
            for line in stdout:
                self._replies.put(line)
        self._replies.put(b"")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, job: Job) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(job) + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _ChildLost(self._obituary()) from error

    def receive(self, seconds: float) -> Reply:
        """The next reply; _ChildLost where none comes in time."""
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise _ChildLost(f"no answer within {seconds:g} s; the kernel hangs") from None
        if not line:
            raise _ChildLost(self._obituary())
        try:
            return msgspec.json.decode(line, type=Reply)  # type: ignore[no-any-return]
        except msgspec.DecodeError as error:
            raise _ChildLost(f"the worker answered {line[:200]!r} ({error})") from error

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _obituary(self) -> str:
        """How it ended, with the last line it wrote to stderr."""
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        self._log.seek(max(self._log.seek(0, os.SEEK_END) - 4000, 0))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        ended = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"the worker ended {ended}" + (f": {lines[-1].strip()}" if lines else "")


# --- the child's end -----------------------------------------------------------------------------------------------


class DeviceBroken(Exception):
    """Only a new process can go on."""


class Session:
    """The child's end: keeps the data of the last job and what was verified on it."""

    def __init__(self, device: str, send: Callable[[Reply], None]) -> None:
        self._device = device
        self._send = send
        self._operands: dict[tuple[Problem, float, int], launch.Operands] = {}
        self._verified: set[tuple[Step, float, int]] = set()

    def run(self, job: Job) -> None:
        """Verify, then time.

        Raises:
            DeviceBroken: a candidate, already reported, left a CUDA context that no longer works.
        """
        wanted = {(step.problem, job.density, job.seed) for c in job.candidates for step in c.steps}
        self._operands = {key: o for key, o in self._operands.items() if key in wanted}
        calls: dict[str, Callable[[], Any]] = {}
        for candidate in job.candidates:
            self._send(Started(candidate.name))
            try:
                wrong = self._verify(candidate, job)
                if wrong is None:
                    calls[candidate.name] = self._call(candidate, job)
            except (Srelu24Error, RuntimeError) as error:
                wrong = str(error).strip().partition("\n")[0] or type(error).__name__
            if wrong is None:
                self._send(Verified(candidate.name))
                continue
            self._send(Failed(candidate.name, wrong, broken := not self._device_works()))
            if broken:
                raise DeviceBroken
        timings = interleave(
            calls,
            device=self._device,
            seconds=job.seconds,
            min_rounds=job.min_rounds,
            on_progress=lambda progress: self._send(Progressed(progress.fraction)),
        )
        for name, t in timings.items():
            self._send(Timed(name, t.ms, t.samples, t.sm_mhz, t.watts, t.throttled))
        self._send(Done())

    def _verify(self, candidate: Candidate, job: Job) -> str | None:
        """What is wrong with a candidate; every step is held to the reference on data of its own."""
        for step in candidate.steps:
            if (step, job.density, job.seed) in self._verified:
                continue
            verdict = verify(step.problem, step.config, self._data(step, job), job.arch)
            if not verdict.ok:
                return f"wrong result: {verdict.detail}"
            self._verified.add((step, job.density, job.seed))
        return None

    def _call(self, candidate: Candidate, job: Job) -> Callable[[], Any]:
        """The candidate as one call (a CUDA graph, so that the host costs no time); each step reads the one before."""
        chain: list[tuple[KernelSpec, launch.Operands]] = []
        for step in candidate.steps:
            operands = self._data(step, job)
            if chain:
                operands = dataclasses.replace(operands, a=chain[-1][1].out)
            chain.append((KernelSpec(step.problem.family, step.config, job.arch), operands))

        def run() -> None:
            for spec, operands in chain:
                launch.run(spec, operands)

        return capture(run, device=self._device).call

    def _data(self, step: Step, job: Job) -> launch.Operands:
        key = (step.problem, job.density, job.seed)
        if key not in self._operands:
            self._operands[key] = operands_for(step.problem, job.density, self._device, job.seed)
        return self._operands[key]

    def _device_works(self) -> bool:
        if not self._device.startswith("cuda"):
            return True
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True


def main() -> None:
    """Serve jobs from stdin until it closes; then die at once, even if a kernel hangs."""
    device = sys.argv[1]
    # The pipe is for replies alone: whatever else prints goes to stderr.
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            jobs.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()

    def send(reply: Reply) -> None:
        pipe.write(msgspec.json.encode(reply) + b"\n")

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    session = Session(device, send)
    send(Ready())
    try:
        while True:
            session.run(msgspec.json.decode(jobs.get(), type=Job))
    except DeviceBroken:
        os._exit(1)  # the usual way out would wait for the device


if __name__ == "__main__":
    main()
