"""An equal call finds everything from the one before: its launchers, its parameter blocks, its workspace.

The allocator here hands out the same memory for the same request, as torch's does on a GPU; kernels are not run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24, metadata_shape, row_stride
from srelu24.ops import library
from srelu24.runtime import dispatch, gemm, launch, workspace
from srelu24.runtime.arguments import Arguments, Operands
from srelu24.runtime.gemm import GemmLauncher
from srelu24.runtime.pair import Pair
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op
from srelu24_gen.target import TARGETS
from stubbed_gpu import stubbed

H200 = TARGETS["h200"]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often something was launched, encoded or allocated to be kept."""
    counts: Counter[str] = Counter()

    def counted(name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return result(*args) if callable(result) else result

        return call

    memory: dict[object, Tensor] = {}
    empty = torch.empty

    def same_memory(*size: Any, **kind: Any) -> Tensor:
        key = (size, *sorted(kind.items(), key=lambda item: item[0]))
        return memory.setdefault(key, empty(*size, **kind))

    monkeypatch.setattr(torch, "empty", same_memory)
    with stubbed(monkeypatch, H200, counted("built"), counted("launched")):
        monkeypatch.setattr(workspace, "allocate_kept", counted("kept", lambda make, device: make()))
        monkeypatch.setattr(gemm, "ArgumentBlock", counted("encoded", lambda content: SimpleNamespace(address=1)))
        yield counts


def test_an_equal_ffn_encodes_and_allocates_nothing_anew(done: Counter[str]) -> None:
    x, w1, w2 = (torch.zeros(size, dtype=torch.bfloat16) for size in ((64, 768), (3072, 768), (768, 3072)))
    library._ffn_cuda(x, w1, w2, None, None, "sparse")
    assert done - Counter(kept=1) == Counter(built=2, encoded=2, launched=2)
    before = Counter(done)
    for _ in range(20):
        library._ffn_cuda(x, w1, w2, None, None, "sparse")
    assert done - before == Counter(launched=40)
    assert dispatch.pair_of.cache_info().misses == 1


@pytest.mark.parametrize("m", [1, 64, 200])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("stream_k", [False, True])
def test_a_pair_gives_its_kernels_what_two_launches_would(
    m: int, biases: bool, stream_k: bool, done: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    d, f, dtype, cpu = 512, 648, torch.bfloat16, torch.device("cpu")
    x = torch.zeros(m, d + 8, dtype=dtype)[:, :d]
    w1, w2, *both = (torch.zeros(size, dtype=dtype) for size in ((f, d), (d, f), (f,), (d,)))
    b1, b2 = both if biases else (None, None)
    config = KernelConfig(tile_m=128, tile_n=128, cluster_m=1, stream_k=stream_k)
    families = (
        Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2, biases),
        Family(Op.SPGEMM, DType.BF16, bias=biases),
    )
    first, second = (launch.launcher_for(KernelSpec(family, config), 0) for family in families)
    given: list[Arguments] = []

    def record(launcher: GemmLauncher, arguments: Arguments) -> tuple[object, int]:
        given.append(arguments)
        return SimpleNamespace(address=1), 1

    monkeypatch.setattr(GemmLauncher, "encode", record)
    out = Pair(first, second, Shape(m, d, f), dtype, cpu)(x, w1, w2, b1, b2)
    # Again one by one, with the S that lies in the pair's memory: metadata, then values in padded rows.
    metadata_bytes, stride = 4 * math.prod(metadata_shape(m, f)), row_stride(f)
    memory = torch.empty(metadata_bytes + 2 * m * stride, dtype=torch.uint8, device=cpu)
    metadata = memory[:metadata_bytes].view(torch.int32).view(metadata_shape(m, f))
    s = Sparse24(memory[metadata_bytes:].view(dtype).view(m, stride)[:, : f // 2], metadata, (m, f))
    first(Operands(a=x, b=w1, bias=b1, out=s))
    second(Operands(a=s, b=w2, bias=b2, out=out))
    assert given[:2] == given[2:]
    assert [bool(arguments.partials) for arguments in given[:2]] == [stream_k, stream_k]
    assert done == Counter(built=2, launched=4) + Counter(kept=int(stream_k))


def test_kernels_that_split_tiles_do_not_take_the_workspace_from_each_other(done: Counter[str]) -> None:
    """One needs more room for sums, the other more flags: together they need the larger of both, once."""
    calls = []
    for tile_n, n in ((256, 768), (128, 640)):
        config = KernelConfig(tile_m=128, tile_n=tile_n, cluster_m=1, stream_k=True)
        launcher = launch.launcher_for(KernelSpec(Family(Op.GEMM, DType.BF16), config), 0)
        a, b, out = (torch.zeros(size, dtype=torch.bfloat16) for size in ((128, 4096), (n, 4096), (128, n)))
        calls.append((launcher, Operands(a=a, b=b, out=out)))
    for _ in range(10):
        for launcher, o in calls:
            launcher(o)
    assert done == Counter(built=2, launched=20, kept=2, encoded=3)
    (space,) = workspace._workspaces.values()
    assert (space.flags.numel(), space.partials.numel()) == (40, 24 * 128 * 128)
    assert not space.flags.any()
