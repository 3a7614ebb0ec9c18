"""The oldest and the newest CUDA 13 that PyPI has: every default kernel compiles, without spills and serialised MMAs.

The wheels are installed into a virtual environment of their own. What is compiled are the sources that every other test
uses, so what the emulator of ``tests/compile`` says of their results holds for each of these compilers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from installs import CHECKOUT, environment, install, run

CCCL = "nvidia-cuda-cccl==13.0.*"

# Prints what every default kernel of these GPUs reports.
BUILD = """
import json, os, sys
from srelu24.shipping import catalogue
from srelu24_gen import space
from srelu24_gen.compile import BuiltKernel, build_many
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType, KernelSpec
from srelu24_gen.target import TARGETS, Toolchain

specs = {}
for key, dtypes in (("h200", (DType.BF16, DType.FP16, DType.E4M3)), ("a100", (DType.BF16,)), ("l40s", (DType.E4M3,))):
    target = TARGETS[key]
    for dtype in dtypes:
        passes = tuple(Pass) if key == "h200" and dtype is not DType.E4M3 else (Pass.FORWARD,)
        for problem in catalogue.problems(Shape(8192, 4096, 16384), dtype, passes):
            if space.supports_problem(problem, target).ok:
                spec = KernelSpec(problem.family, space.default(problem, target).compiled(), target.arch)
                specs[spec.digest] = spec
found = {}
for spec, built in zip(specs.values(), build_many(specs.values()), strict=True):
    good = isinstance(built, BuiltKernel)
    found[spec.name] = [built.meta.spill_bytes, built.meta.warnings] if good else str(built)
print(json.dumps([Toolchain.find().nvrtc_version, found]))
"""


def versions(wheel: str) -> list[tuple[int, ...]]:
    """Those of CUDA 13 that PyPI has, oldest first."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", wheel]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"Available versions: (.*)", said)
    found = [tuple(map(int, each.split("."))) for each in re.findall(r"\b13(?:\.\d+)+", line)]
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_default_kernels_compile(which: str, tmp_path: Path) -> None:
    minors = sorted(
        set.intersection(*({v[:2] for v in versions(f"nvidia-cuda-{name}")} for name in ("nvrtc", "runtime", "crt")))
    )
    minor = ".".join(map(str, minors[0 if which == "oldest" else -1]))
    env = environment(tmp_path / "venv", without="nvidia")
    wheels = [f"nvidia-cuda-{name}=={minor}.*" for name in ("nvrtc", "runtime", "crt")]
    install(env, *wheels, CCCL, index=True)
    install(env, "--editable", CHECKOUT)
    folders = {"SRELU24_CACHE_DIR": str(tmp_path / "cache"), "SRELU24_DATA_DIR": str(tmp_path / "data")}
    nvrtc, kernels = json.loads(run(env / "bin/python", "-I", "-c", BUILD, cwd=tmp_path, env=folders))
    print(f"NVRTC {nvrtc}: {len(kernels)} default kernels")
    assert nvrtc.startswith(f"{minor}.")
    assert len(kernels) > 40
    assert {name: report for name, report in kernels.items() if report != [0, []]} == {}
