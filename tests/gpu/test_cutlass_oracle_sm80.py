"""Our packed S through CUTLASS's sparse GEMM for Ampere: the same Y as from our mma.sync kernel of that tile."""

from __future__ import annotations

import pytest
import torch
from tests.gpu.oracle import MMA_SYNC
from tests.gpu.oracle.sm80 import CONFIGS, CutlassSpgemmSm80, our_spec

from srelu24.numerics import reference
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands
from srelu24_gen.spec import Activation

SPECS = [our_spec(name) for name in CONFIGS]


@pytest.fixture(scope="session")
def cutlass() -> CutlassSpgemmSm80:
    if not MMA_SYNC.available:
        pytest.skip(f"no nvcc to build CUTLASS's sparse GEMM with, and no {MMA_SYNC.path} built elsewhere")
    return CutlassSpgemmSm80()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("m", "n", "f"), [(1, 8, 8), (65, 264, 264), (1001, 2688, 1856), (777, 512, 15680)])
def test_integers_bit_for_bit(cutlass: CutlassSpgemmSm80, name: str, m: int, n: int, f: int) -> None:
    """CUTLASS, our kernel and float64 agree in every bit where no sum is rounded."""
    seed = torch.Generator("cuda").manual_seed(m + f)

    def integers(low: int, high: int, rows: int, columns: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (rows, columns), device="cuda", generator=seed).bfloat16()

    s = reference.sparsify24(integers(-3, 3, m, f), Activation.RELU2)
    w2 = integers(-2, 2, n, f)
    exact = (s.to_dense().double() @ w2.double().T).float().bfloat16()
    assert exact.count_nonzero() > exact.numel() // 8, "the data must say something"
    ours = torch.full_like(exact, torch.nan)
    launch.run(our_spec(name), Operands(a=s, b=w2, out=ours))
    assert torch.equal(cutlass.prepared(name, s, w2)(), exact)
    assert torch.equal(ours, exact)
