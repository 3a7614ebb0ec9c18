"""torch.compile and torch.export"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import srelu24
from srelu24.nn.modules import SquaredReLUFFN

TOKEN_COUNTS = (7, 3, 16, 33, 64)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def converted(net: nn.Module) -> nn.Module:
    srelu24.convert(net)
    return net


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_full_graph_without_recompilation(converted: nn.Module, backend: str) -> None:
    """torch.compile(fullgraph=True, dynamic=True): one graph for five token counts, no recompilation."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(converted, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for m in TOKEN_COUNTS:
            x = torch.randn(1, m, 32).bfloat16()
            torch.testing.assert_close(compiled(x), converted(x), atol=0.05, rtol=0.02)
    assert counters["stats"]["unique_graphs"] == 1
    ops = [str(node.target) for node in counter.graphs[-1].graph.nodes if "srelu24" in str(node.target)]
    assert ops == ["srelu24.ffn", "srelu24.ffn"]


def test_automatic_dynamic_shapes(converted: nn.Module) -> None:
    """torch.compile without arguments: the second token count makes M dynamic, further ones recompile nothing."""
    compiled = torch.compile(converted, backend="aot_eager")
    with torch.no_grad():
        for m in TOKEN_COUNTS:
            compiled(torch.randn(1, m, 32).bfloat16())
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_training(net: nn.Module) -> None:
    """A compiled converted model trains, dense: gradients are those of the compiled dense model."""
    x = torch.randn(2, 5, 32).bfloat16()

    def gradients() -> list[Tensor]:
        net.zero_grad()
        torch.compile(net, fullgraph=True, backend="aot_eager")(x).float().square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    dense = gradients()
    srelu24.convert(net)
    torch.compiler.reset()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), dense, strict=True))


def test_export(converted: nn.Module) -> None:
    """torch.export with a dynamic token count gives the same outputs; the op stays one node."""
    m = torch.export.Dim("m", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(converted, (torch.randn(1, 8, 32).bfloat16(),), dynamic_shapes=({1: m},))
        assert sum(node.target is torch.ops.srelu24.ffn.default for node in program.graph.nodes) == 2
        for tokens in TOKEN_COUNTS:
            x = torch.randn(1, tokens, 32).bfloat16()
            assert torch.equal(program.module()(x), converted(x))


@pytest.mark.parametrize("f", [64, 72])
def test_opcheck_linear24(f: int) -> None:
    """torch.library.opcheck of linear24; tests/unit/ops/test_functions.py has it for the other ops."""
    a, w, bias = torch.randn(20, f).relu().bfloat16(), torch.randn(40, f).bfloat16(), torch.randn(40).bfloat16()
    torch.library.opcheck(torch.ops.srelu24.linear24.default, (a, w, bias))
    torch.library.opcheck(torch.ops.srelu24.linear24.default, (a, w, None))


def test_compiled_parametrization(mlp: nn.Module, x: Tensor) -> None:
    """A parametrized weight compiles into the graph."""
    ffn = SquaredReLUFFN.of(mlp.c_fc, mlp.c_proj, ("c_fc", "c_proj"))
    nn.utils.parametrizations.weight_norm(ffn.up)
    with torch.no_grad():
        compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), ffn(x), atol=0.02, rtol=0.02)
