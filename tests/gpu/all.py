"""All of tests/gpu in one call: ``python tests/gpu/all.py [--family sm80] [--only NAME ...] [--log FILE]``.

Modules run side by side, each in a process of its own, for most of their time is the host's; what measures host time or
tunes runs alone after them. The kernels that they share are built first. Ends with 1 when a test failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ALONE = ("test_tuning", "test_runtime")
"""They time, or look at what happens on the GPU in the meantime."""
SUMMARY = re.compile(r"^(?:=+ )?(\d+ (?:passed|failed|error|skipped|deselected|no tests).*?)(?: =+)?$", re.MULTILINE)


def run(module: str, extra: list[str], log: Path | None) -> int:
    """Run one module and say at once what became of it; its exit status."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", str(HERE / f"{module}.py"), *extra]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=os.environ | {"CI": ""})
    seconds, output = time.monotonic() - started, done.stdout + done.stderr
    if log is not None:
        with log.open("a") as file:
            file.write(f"######## {module}\n{output}\n\n")
    said = SUMMARY.findall(output)
    if done.returncode not in (0, 5):
        failures = "\n".join(line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "E  ")))
        print(failures[:3000] or output[-3000:])
    verdict = "ok" if done.returncode in (0, 5) else "FAILED"
    print(f"{module:28} {verdict:6} {seconds:6.0f} s  {said[-1] if said else ''}", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("sm90", "sm80"), default="sm90")
    parser.add_argument("--only", nargs="*", help="Modules, such as test_ops.")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--log", type=Path, help="Where the output of all modules goes.")
    options = parser.parse_args()
    extra = ["--family", options.family]
    modules = options.only or sorted(path.stem for path in HERE.glob("test_*.py"))
    together = [module for module in modules if module not in ALONE]
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(lambda module: run(module, extra, options.log), together))
    statuses += [run(module, extra, options.log) for module in modules if module in ALONE]
    return int(any(status not in (0, 5) for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
