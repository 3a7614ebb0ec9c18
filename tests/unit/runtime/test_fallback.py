"""FallbackWarning: it points to the caller's line, and comes once for each kind of reason, however many tokens."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import srelu24
from srelu24.runtime import fallback
from srelu24.runtime.fallback import FallbackWarning, Reason
from srelu24.runtime.operands import kernel_reason
from srelu24_gen.target import TARGETS
from stubbed_gpu import OnGpu, stubbed

D, F = 16, 32


@pytest.fixture(autouse=True)
def fresh_warnings() -> Iterator[None]:
    fallback.warn_again()
    yield
    fallback.warn_again()


def tensors(m: int, f: int = F, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(m, D).to(dtype), torch.randn(f, D).to(dtype), torch.randn(D, f).to(dtype)


def the_line_of(call: str) -> int:
    """Where it stands in this file."""
    lines = inspect.getsource(inspect.getmodule(the_line_of)).splitlines()  # type: ignore[arg-type]
    (line,) = [at for at, text in enumerate(lines, 1) if text.strip().startswith(call)]
    return line


class Ours(nn.Module):
    """A model of a user, with one of our modules in it."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.inner = nn.Sequential(srelu24.SquaredReLUFFN(D, 12, dtype=torch.bfloat16, **options))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def of_ffn() -> None:
    x, w1, w2 = tensors(4, 12)
    srelu24.ffn(x, w1, w2)  # F is no multiple of 8


def of_gradients() -> None:
    x, w1, w2 = tensors(4)
    srelu24.ffn(x, w1.requires_grad_(), w2)


def of_linear() -> None:
    x, w1, _ = tensors(4)
    srelu24.linear(x, w1.requires_grad_(), activation="relu2")


def of_linear24() -> None:
    x, _, w2 = tensors(4, 12)
    srelu24.linear24(torch.randn(4, 12).bfloat16(), w2)
    assert x.shape == (4, D)


def of_fp8() -> None:
    x, w1, w2 = tensors(4, 12)
    srelu24.ffn(x, w1, w2, recipe="rowwise")


@torch.no_grad()
def of_module() -> None:
    model = Ours()
    model(torch.randn(2, 3, D).bfloat16())


@torch.no_grad()
def of_compiled() -> None:
    model = torch.compile(Ours(), backend="aot_eager")
    model(torch.randn(5, D).bfloat16())


def warned(call: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [warning for warning in caught if warning.category is FallbackWarning]


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (of_ffn, "srelu24.ffn(x, w1, w2)  #"),
        (of_gradients, "srelu24.ffn(x, w1.requires_grad_(), w2)"),
        (of_linear, "srelu24.linear(x, w1.requires"),
        (of_linear24, "srelu24.linear24("),
        (of_fp8, 'srelu24.ffn(x, w1, w2, recipe="rowwise")'),
        (of_module, "y: Tensor = self.inner(x)"),
        (of_compiled, "y: Tensor = self.inner(x)"),
    ],
)
def test_it_points_to_the_callers_line(call: Callable[[], None], line: str) -> None:
    (warning,) = warned(call)
    assert warning.filename == __file__
    if call is not of_compiled:  # there it is the line where the compiled part of the function begins
        assert warning.lineno == the_line_of(line)


def test_a_training_step_points_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w1, w2 = (t.as_subclass(OnGpu) for t in tensors(4))
    state = srelu24.Recipe(kernels=False).layer("a", w1)
    with stubbed(monkeypatch, TARGETS["h200"], lambda _: None):
        (warning,) = warned(lambda: step(x, w1, w2, state))
    assert (warning.filename, warning.lineno) == (__file__, the_line_of("srelu24.ffn(x, w1, w2, recipe=state)"))


def step(x: Tensor, w1: Tensor, w2: Tensor, state: object) -> None:
    srelu24.ffn(x, w1, w2, recipe=state)  # type: ignore[arg-type]


def test_one_warning_for_all_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(m: int) -> None:
        x, w1, w2 = tensors(m)
        srelu24.ffn(torch.randn(D, m).bfloat16().T, w1, w2)  # not contiguous in its last dimension
        assert x.shape == (m, D)

    assert len(warned(lambda: [run(m) for m in range(2, 40)])) == 1
    assert len(fallback._warned) == 1
    (again,) = warned(lambda: srelu24.ffn(*tensors(4, 12)))  # another reason
    assert "width of 12" in str(again.message)
    assert not warned(lambda: [srelu24.ffn(*tensors(m, 12)) for m in range(1, 20)])


def test_kinds_name_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()
    for m in (2, 3, 5):
        reason = kernel_reason(torch.zeros(64, m, dtype=torch.bfloat16).T)
        assert isinstance(reason, Reason)
        assert f"[{m}, 64]" in reason
        kinds.add(reason.kind)
    assert len(kinds) == 1


def test_a_reason_without_a_caller_is_told_all_the_same() -> None:
    (warning,) = warned(lambda: eval("warn('x')", {"warn": fallback.warn_dense, "__name__": "torch.made_up"}))
    assert warning.filename == __file__
