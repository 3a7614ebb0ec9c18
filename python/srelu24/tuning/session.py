"""The child process that verifies and times kernels: ``python -m srelu24.tuning.session DEVICE``, driven by its parent.

What it reads and writes: :mod:`srelu24.tuning.worker`.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from srelu24.measuring import verify_step
from srelu24.measuring.timing import capture, interleave
from srelu24.measuring.verify import small, verify
from srelu24.measuring.workload import SharedData, operands_for
from srelu24.measuring.workload_step import StepData
from srelu24.runtime import launch
from srelu24.runtime.dense import library_gemm
from srelu24.training import kernels
from srelu24.training.kernels import TrainingOperands
from srelu24.training.packed import TokenSparse24
from srelu24.tuning.worker import Candidate, Done, Failed, Job, Progressed, Ready, Reply, Started, Timed, Verified
from srelu24_gen.errors import Srelu24Error
from srelu24_gen.models import Shape
from srelu24_gen.spec import KernelConfig, KernelSpec, Problem

AnyOperands = launch.Operands | TrainingOperands

_KEPT_ALONE = 8
"""Small problems whose data is kept."""


class DeviceBroken(Exception):
    """The CUDA context does not work any more; only a new process can go on."""


class Session:
    """The child's end: keeps the data of the last FFN or training step, and what was verified."""

    def __init__(self, device: str, send: Callable[[Reply], None]) -> None:
        self._device = device
        self._send = send
        self._shared: tuple[object, SharedData | StepData] | None = None
        self._alone: dict[object, AnyOperands] = {}
        self._verified: set[tuple[Problem, KernelConfig, float, int]] = set()

    def run(self, job: Job) -> None:
        """Verify, then time.

        Raises:
            DeviceBroken: a candidate, already reported, left a CUDA context that no longer works.
        """
        calls: dict[str, Callable[[], Any]] = {}
        for candidate in job.candidates:
            self._send(Started(candidate.name))
            try:
                wrong = self._verify(candidate, job)
                if wrong is None:
                    calls[candidate.name] = self._make_call(candidate, job)
            except (Srelu24Error, RuntimeError) as error:
                wrong = str(error).strip().partition("\n")[0] or type(error).__name__
            if wrong is None:
                self._send(Verified(candidate.name))
                continue
            self._send(Failed(candidate.name, wrong, broken := not self._check_device()))
            if broken:
                raise DeviceBroken
        timings = interleave(
            calls,
            device=self._device,
            seconds=job.seconds,
            min_rounds=job.min_rounds,
            sample_ms=job.sample_ms,
            on_progress=lambda progress: self._send(Progressed(progress.fraction)),
        )
        for name, t in timings.items():
            self._send(Timed(name, t.ms, t.samples, t.sm_mhz, t.watts, t.throttled))
        self._send(Done())

    def _verify(self, candidate: Candidate, job: Job) -> str | None:
        """What is wrong with a candidate; every step is held to the reference on data of its own."""
        for step in candidate.steps:
            if step.config is None:
                continue
            problem = small(step.problem) if job.check == "small" else step.problem
            key = (problem, step.config, job.density, job.seed)
            if key in self._verified:
                continue
            operands = self._operands(problem, job) if problem == step.problem else self._operands_alone(problem, job)
            if isinstance(operands, TrainingOperands):
                verdict = verify_step.verify(problem, step.config, operands, job.arch)
            else:
                verdict = verify(problem, step.config, operands, job.arch)
            if not verdict.ok:
                return f"wrong result: {verdict.detail}"
            self._verified.add(key)
        return None

    def _make_call(self, candidate: Candidate, job: Job) -> Callable[[], Any]:
        """The candidate as one call (a CUDA graph, so that the host costs no time).

        Each step of an FFN reads the one before. Those of a training step read what was made for them.
        """
        chain = [(step, self._operands(step.problem, job)) for step in candidate.steps]

        def run() -> None:
            out = chain[0][1].a
            for step, operands in chain:
                family = step.problem.family
                if isinstance(operands, TrainingOperands):
                    assert step.config is not None
                    kernels.run(KernelSpec(family, step.config, job.arch), operands)
                elif step.config is None:
                    assert isinstance(out, torch.Tensor)
                    assert operands.b is not None
                    out = library_gemm(out, operands.b, operands.bias, family.activation)
                else:
                    assert not isinstance(out, TokenSparse24)
                    launch.run(KernelSpec(family, step.config, job.arch), dataclasses.replace(operands, a=out))
                    out = operands.out

        return capture(run, device=self._device, calls=1).call

    def _operands(self, problem: Problem, job: Job) -> AnyOperands:
        """Operands of a problem. All GEMMs of an FFN or of a training step share tensors, which are made once."""
        kind = next((kind for kind in (StepData, SharedData) if kind.serves(problem.family)), None)
        if kind is None:
            return self._operands_alone(problem, job)
        shape, dtype = Shape.of(problem), problem.family.dtype
        key = (kind, shape, dtype, job.density, job.seed)
        if self._shared is None or self._shared[0] != key:
            self._shared = None  # first, so that the memory is there
            if self._device.startswith("cuda"):
                torch.cuda.empty_cache()
            self._shared = (key, kind(shape, dtype, job.density, self._device, job.seed))
        return self._shared[1].operands(problem.family)

    def _operands_alone(self, problem: Problem, job: Job) -> AnyOperands:
        key = (problem, job.density, job.seed)
        if key not in self._alone:
            while len(self._alone) >= _KEPT_ALONE:
                del self._alone[next(iter(self._alone))]
            self._alone[key] = self._make_operands(problem, job)
        return self._alone[key]

    def _make_operands(self, problem: Problem, job: Job) -> AnyOperands:
        family = problem.family
        if StepData.serves(family):
            step = StepData(Shape.of(problem), family.dtype, job.density, self._device, job.seed)
            return step.operands(family)
        return operands_for(problem, job.density, self._device, job.seed)

    def _check_device(self) -> bool:
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
        pass
    except Exception:
        traceback.print_exc()  # its last line is what the parent reports
    os._exit(1)  # the usual way out would wait for the device, and for the thread that reads stdin


if __name__ == "__main__":
    main()
