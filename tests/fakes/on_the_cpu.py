"""The tuner's own worker process on a CPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import cpu_session
from fake_gpu import FakeGpu
from srelu24.tuning.worker import Job, Outcome, Worker


class OnTheCpu(FakeGpu):
    """The real worker, session, data, verification and clock; only kernels and compiler are made up."""

    def __init__(self) -> None:
        super().__init__(build_seconds=0.0)
        self.child = Worker("cpu", command=(sys.executable, str(cpu_session.__file__)))

    def start(self) -> None:
        self.child.start()

    def run(self, job: Job) -> Iterator[Outcome]:
        return self.child.run(job)

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        self.child.close()
