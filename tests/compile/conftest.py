"""A toolchain, a store of its own for every test, and sources small enough to compile in 50 ms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from srelu24_gen.compile import BuildStore
from srelu24_gen.render import RenderedKernel
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op
from srelu24_gen.target import Toolchain

COPY = 'extern "C" __global__ void srelu24_kernel(float* p) { p[threadIdx.x] = p[threadIdx.x + 32]; }\n'


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return Toolchain.find()


@pytest.fixture
def store(tmp_path: Path) -> BuildStore:
    return BuildStore(tmp_path / "cache")


@pytest.fixture
def rendered() -> Callable[..., RenderedKernel]:
    """``rendered(source)``: that source as the rendering of some spec."""

    def make(source: str = COPY) -> RenderedKernel:
        return RenderedKernel(KernelSpec(Family(Op.GEMM, DType.BF16), KernelConfig()), "test.cu.jinja", source)

    return make
