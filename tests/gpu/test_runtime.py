"""Launching: CUDA graphs, streams, threads, and the sanitizer."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import srelu24
from srelu24.measuring import workload
from srelu24.runtime import dispatch, launch
from srelu24_gen.compile import build_many
from srelu24_gen.errors import LaunchError
from srelu24_gen.spec import Activation, DType, Family, Op, Problem

D, F = 256, 2048
ROWS = (96, 256, 500, 1000)
GEMM1, GEMM2 = Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), Family(Op.SPGEMM, DType.BF16)
PROBLEMS = [problem for m in ROWS for problem in (Problem(GEMM1, m, F, D), Problem(GEMM2, m, D, F))]


@pytest.fixture(scope="module")
def data(device: torch.device) -> workload.FFNData:
    return workload.make_ffn(max(ROWS), D, F, DType.BF16, 0.3, device, seed=1)


def ffn(x: Tensor, data: workload.FFNData) -> Tensor:
    return srelu24.ffn(x, data.w1, data.w2, mode="sparse")


def forget_kernels() -> None:
    """As in a fresh process: nothing is loaded."""
    dispatch.clear_cache()
    launch.launcher_for.cache_clear()


def test_a_captured_graph_replays_with_new_inputs(data: workload.FFNData) -> None:
    x = data.x[:500].clone()
    ffn(x, data)  # load
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ffn(x, data)
    for seed in range(3):
        x.copy_(data.x[:500].roll(seed * 7, dims=0))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ffn(x, data))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_before_the_kernel_is_loaded_is_refused(data: workload.FFNData) -> None:
    forget_kernels()
    x = data.x[:256]
    with (
        pytest.raises(LaunchError, match="run the operation once before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ffn(x, data)
    # Nothing is broken: run once, then capture.
    expected = ffn(x, data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ffn(x, data)
    graph.replay()
    assert torch.equal(y, expected)


def test_two_streams_at_once(data: workload.FFNData, device: torch.device) -> None:
    inputs = [data.x[:500], data.x[500:]]
    expected = [ffn(x, data) for x in inputs]
    streams = [torch.cuda.Stream(device) for _ in inputs]
    torch.cuda.synchronize()
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(50):
        for stream, x, right in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((ffn(x, data), right))
    torch.cuda.synchronize()
    assert all(torch.equal(y, right) for y, right in results)


def test_the_current_stream_is_the_one_that_runs(data: workload.FFNData, device: torch.device) -> None:
    x = torch.zeros_like(data.x[:500])
    expected = ffn(data.x[:500], data)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(data.x[:500])  # comes late: a kernel on another stream would read zeros
        y = ffn(x, data)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "first use"])
def test_many_threads_at_once(loaded: bool, data: workload.FFNData, device: torch.device) -> None:
    expected = {m: ffn(data.x[:m], data) for m in ROWS}
    torch.cuda.synchronize()
    if not loaded:
        forget_kernels()
    start = threading.Barrier(8)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            start.wait()
            with torch.cuda.stream(torch.cuda.Stream(device)):
                for turn in range(25):
                    m = ROWS[(number + turn) % len(ROWS)]
                    if not torch.equal(ffn(data.x[:m], data), expected[m]):
                        wrong.append(f"thread {number}, turn {turn}, {m} rows")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_launches_before_it_touches_torch(data: workload.FFNData) -> None:
    # Its output comes from the allocator's free list, so nothing but our own calls of the driver needs the device's
    # context: the launch, and before it the description of an input at a new address.
    expected = ffn(data.x[:500], data)
    x = data.x[:500].clone()
    torch.cuda.synchronize()
    found: list[Tensor | Exception] = []

    def work() -> None:
        try:
            found.append(ffn(x, data))
        except Exception as error:
            found.append(error)

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    for y in found:
        assert isinstance(y, Tensor), y
        assert torch.equal(y, expected)


def test_addresses_that_come_back_with_other_sizes_are_described_anew(data: workload.FFNData) -> None:
    # The allocator hands out the same addresses again: a cached descriptor must not outlive its shape.
    expected = {m: ffn(data.x[:m], data) for m in ROWS}
    for turn in range(40):
        m = ROWS[turn % len(ROWS)]
        assert torch.equal(ffn(data.x[:m].clone(), data), expected[m])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_tensors_decide_the_gpu(data: workload.FFNData) -> None:
    assert torch.cuda.current_device() == 0
    there = workload.FFNData(*(t.to("cuda:1") for t in (data.x, data.w1, data.w2)))
    for _ in range(2):  # the first call loads
        y = ffn(there.x, there)
        assert y.device == there.x.device
        assert torch.equal(y.to(data.x.device), ffn(data.x, data))


SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    assert SANITIZER is not None
    program = Path(__file__).with_name("sanitize.py")
    build_many(runpy.run_path(str(program))["SPECS"])  # not under the sanitizer
    # Errors that API calls report are checked by the loader; PyTorch causes harmless ones while it looks around.
    options = ["--tool", tool, "--error-exitcode", "66", "--report-api-errors", "no"]
    options += ["--kernel-regex", "kns=srelu24_kernel"]
    child = subprocess.run(
        [SANITIZER, *options, sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert child.returncode == 0, child.stdout[-8000:]
    assert "ERROR SUMMARY: 0 errors" in child.stdout or "RACECHECK SUMMARY: 0 hazards" in child.stdout
    assert "kernels are right" in child.stdout
