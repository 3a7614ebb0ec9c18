"""Runs kernels that may hang or crash in a child process: the messages, and the parent's end of the pipe.

The child (:mod:`srelu24.tuning.session`) takes a :class:`Job` per line of JSON on stdin, verifies every candidate,
times those that are right against each other, and answers with a line per event. The parent (:class:`Worker`) gives
every step a deadline; when the child hangs or dies it starts another without the candidate to blame, and goes on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Literal, Self

import msgspec

from srelu24_gen.errors import LaunchError
from srelu24_gen.spec import KernelConfig, Problem

COMMAND = (sys.executable, "-m", "srelu24.tuning.session")


class Step(msgspec.Struct, frozen=True):
    """One kernel of a candidate."""

    problem: Problem
    config: KernelConfig | None
    """None where cuBLAS computes it, which it does of dense GEMMs alone."""


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
    """Length of the rounds of all candidates together."""
    min_rounds: int
    check: Literal["whole", "small"] = "whole"
    """Verify on the problem itself, or on :func:`srelu24.measuring.verify.small`, once per family and configuration."""
    sample_ms: float = 20.0
    """About how long one sample lasts."""
    arch: str = "sm_90a"
    seed: int = 0


class Started(msgspec.Struct, frozen=True, tag=True):
    """The child begins to verify a candidate. After the last of these it times all candidates, until Done."""

    name: str


class Verified(msgspec.Struct, frozen=True, tag=True):
    name: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A candidate is out: it is wrong, could not be launched, hung or crashed."""

    name: str
    reason: str
    broken: bool = False
    """Whether it broke the CUDA context, which ends the child."""


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

    def start(self) -> None:
        """Start the child, if there is none yet; LaunchError where that fails."""
        self._ready_child()

    def close(self) -> None:
        """Kill the child."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def run(self, job: Job) -> Iterator[Outcome]:
        """Run a job and yield what happens. Every candidate ends in exactly one Timed or Failed.

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
                        failures = self._failures_alone(job, candidates)
                        yield from failures
                        candidates = [c for c in candidates if c.name not in {f.name for f in failures}]
                for candidate in blamed:
                    yield Failed(candidate.name, str(lost))

    def _failures_alone(self, job: Job, candidates: list[Candidate]) -> list[Failed]:
        """The failures of candidates each of which runs alone."""
        failures: list[Failed] = []
        for candidate in candidates:
            alone = msgspec.structs.replace(job, candidates=(candidate,), seconds=0.0, min_rounds=1)
            failures += [outcome for outcome in self.run(alone) if isinstance(outcome, Failed)]
        return failures

    def _attempt(self, job: Job) -> Iterator[Outcome]:
        """Give the job to one child. Times are held back until all have come: a lost child leaves no half of them."""
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
            if not finished:  # lost, or the caller went away: late replies must not be taken for those of another job
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
    """The environment of this process, with an import path from which a child imports the same modules."""
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
            raise _ChildLost(self._describe_end()) from error

    def receive(self, seconds: float) -> Reply:
        """The next reply; _ChildLost where none comes in time."""
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise _ChildLost(f"no answer within {seconds:g} s; the kernel hangs") from None
        if not line:
            raise _ChildLost(self._describe_end())
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

    def _describe_end(self) -> str:
        """How the child ended, with the last line that it wrote to stderr."""
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        self._log.seek(max(self._log.seek(0, os.SEEK_END) - 4000, 0))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        ended = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"the worker ended {ended}" + (f": {lines[-1].strip()}" if lines else "")
