"""Shapes by the names of models: widths of non-gated squared-ReLU FFNs, and the token counts they are tuned at."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import EPILOGUES, Activation, DType, Family, Op, Problem, pruning_op

TOKENS: tuple[int, ...] = (512, 2048, 4096, 8192, 16384, 32768)
"""The standard token counts."""
LARGEST = (8192, 32768)
"""D and F up to which ``--all-models`` goes: what one GPU holds next to the rest of such a model."""


class Pass(StrEnum):
    """Which GEMMs of an FFN belong together."""

    FORWARD = "forward"
    """Inference: :meth:`Shape.gemms`."""
    BACKWARD = "backward"
    """A training step, its own forward GEMMs among them: :meth:`Shape.step_gemms`."""


class Shape(NamedTuple):
    """Sizes of an FFN: M tokens, model width D, hidden width F."""

    m: int
    d: int
    f: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``MxDxF``, for example ``16384x4096x16384``.

        Raises:
            Unsupported: anything else.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip().lower())
        if match is None:
            raise Unsupported(
                f"shape {text!r} is not MxDxF (tokens, model width, hidden width), such as 16384x4096x16384"
            )
        return cls(*map(int, match.groups()))

    def gemms(
        self, dtype: DType, b1: bool = False, b2: bool = False, activation: Activation = Activation.RELU2
    ) -> tuple[Problem, Problem]:
        """The two GEMMs of the sparse FFN: X W1^T with pruning (N = F, K = D), then S W2^T (N = D, K = F).

        In e4m3 S is e4m3 too, and the result bf16.
        """
        s, y = (DType.E4M3, DType.BF16) if dtype is DType.E4M3 else (None, None)
        first = Family(pruning_op(activation), dtype, activation, b1, out=s)
        second = Family(Op.SPGEMM, dtype, bias=b2, out=y)
        return Problem(first, self.m, self.f, self.d), Problem(second, self.m, self.d, self.f)

    def recipe_kernels(self, b1: bool = False) -> tuple[Problem, ...]:
        """What the 8-bit recipes (docs/fp8.md) launch besides :meth:`gemms`: X quantised, and for ``rowwise`` GEMM1 to
        bf16 and the squares of that."""
        first, _ = self.gemms(DType.E4M3, b1)
        return (
            Problem(Family(Op.QUANTIZE_ROWS, DType.BF16, out=DType.E4M3), self.m, self.d),
            dataclasses.replace(first, family=dataclasses.replace(first.family, out=DType.BF16)),
            Problem(Family(Op.SQUARE_ROWS, DType.BF16, out=DType.E4M3), self.m, self.f),
        )

    def dense_gemms(
        self, dtype: DType, b1: bool = False, b2: bool = False, activation: Activation = Activation.RELU2
    ) -> tuple[Problem, Problem]:
        """The two GEMMs of the dense FFN, the activation in the first one's epilogue."""
        first, second = Family(Op.GEMM, dtype, activation, b1), Family(Op.GEMM, dtype, bias=b2)
        return Problem(first, self.m, self.f, self.d), Problem(second, self.m, self.d, self.f)

    def step_gemms(self, dtype: DType, b1: bool = False, b2: bool = False) -> tuple[Problem, ...]:
        """The GEMMs of a sparse training step (docs/training.md), in the order in which they run: the hidden
        activations, a product with them, their gradient, dW1 and dW2. Y and dX are the same product, but for a bias."""
        m, d, f = self
        hidden = Family(Op.GEMM_RELU2_24, dtype, Activation.RELU2, b1, count_nonzeros=True, tokens=True, permuted=True)
        return (
            Problem(hidden, m, f, d),
            Problem(Family(Op.SPGEMM, dtype, bias=b2, permuted=True), m, d, f),
            Problem(Family(Op.GEMM_DRELU2_24, dtype, tokens=True, permuted=True), m, f, d),
            Problem(Family(Op.SPGEMM_TOKENS, dtype), f, d, m),
            Problem(Family(Op.SPGEMM_TOKENS, dtype, transposed=True), f, d, m),
        )

    def step_kernels(self, dtype: DType, b1: bool = False) -> tuple[Problem, ...]:
        """What a training step launches besides :meth:`step_gemms`: weight gradients that are added to a buffer, in
        fp32 or in ``dtype``; GEMM1 of a dense step; and what only moves 16 bits, which has no other type."""
        *_, dw1, dw2 = self.step_gemms(dtype)
        return (
            *(
                dataclasses.replace(dw, family=dataclasses.replace(dw.family, out=out, accumulate=True))
                for dw in (dw1, dw2)
                for out in (DType.FP32, None)
            ),
            self.dense_gemms(dtype, b1)[0],
            Problem(Family(Op.TRANSPOSE, DType.BF16), self.f, self.d),
            Problem(Family(Op.DENSE_COLUMNS, DType.BF16), self.m, self.f),
        )

    def unfused_kernels(self, dtype: DType, activation: Activation = Activation.RELU2) -> tuple[Problem, ...]:
        """Pruning on its own, before the second GEMM: with the activation, and of what is activated already."""
        return tuple(Problem(Family(Op.SPARSIFY24, dtype, a), self.m, self.f) for a in (activation, Activation.NONE))

    def gemms_of(
        self,
        which: Pass,
        dtype: DType,
        b1: bool = False,
        b2: bool = False,
        activation: Activation = Activation.RELU2,
    ) -> tuple[Problem, ...]:
        """The GEMMs of a pass, each once.

        Raises:
            Unsupported: no kernels train with the activation.
        """
        if which is Pass.FORWARD:
            return self.gemms(dtype, b1, b2, activation)
        if not EPILOGUES[activation].trains:
            raise Unsupported(f"the kernels of a training step have no gradient of {activation.value}; give relu2")
        return self.step_gemms(dtype, b1, b2)

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """The FFN that one of these GEMMs is part of."""
        op, (n, k) = problem.family.op, problem.widths
        if op is Op.SPGEMM_TOKENS:
            return cls(problem.tokens, d=k, f=n)
        return cls(problem.tokens, *((k, n) if problem.family.first else (n, k)))

    def __str__(self) -> str:
        return f"{self.m}x{self.d}x{self.f}"


@dataclass(frozen=True, slots=True)
class Model:
    """The FFN of a model, by the name that ``--model`` takes."""

    key: str
    name: str
    d_model: int
    d_ff: int
    note: str = ""

    def __str__(self) -> str:
        return self.key


# Widths are those of the models' published configurations, except where a note says otherwise.
MODELS: dict[str, Model] = {
    model.key: model
    for model in (
        Model("paper-1b", "arXiv 2503.16672, 1B", 2048, 8192, "the paper's accuracy table"),
        Model("paper-7b", "arXiv 2503.16672, 7B", 4096, 16384),
        Model("paper-tp1", "arXiv 2503.16672, kernel figure", 8192, 32768, "F inferred from its timings"),
        Model("paper-tp8", "arXiv 2503.16672, kernel figure", 8192, 4096, "F/8 per GPU"),
        Model("persimmon-8b", "Persimmon-8B", 4096, 16384),
        Model("nemotron-3-8b", "Nemotron-3-8B", 4096, 16384),
        Model("minitron-4b", "Minitron-4B", 3072, 9216),
        Model("nemotron-h-8b", "Nemotron-H 8B", 4096, 21504),
        Model("nemotron-4-15b", "Nemotron-4 15B", 6144, 24576),
        Model("nemotron-h-47b", "Nemotron-H 47B", 8192, 30720),
        Model("nemotron-h-56b", "Nemotron-H 56B", 8192, 32768),
        Model("nemotron-nano-v2-9b", "Nemotron Nano v2 9B", 4480, 15680, "F is not a multiple of 128"),
        Model("nemotron-nano-v2-12b", "Nemotron Nano v2 12B", 5120, 20480),
        Model("nemotron-3-nano-30b-a3b-expert", "Nemotron 3 Nano 30B-A3B", 2688, 1856, "expert"),
        Model("nemotron-3-nano-30b-a3b-shared", "Nemotron 3 Nano 30B-A3B", 2688, 3712, "shared expert"),
        Model("nemotron-4-340b", "Nemotron-4 340B", 18432, 73728),
        Model("rwkv-7-1.5b", "RWKV-7 1.5B", 2048, 8192, "channel mix"),
        Model("nanochat", "nanochat, modded-nanogpt", 768, 3072, "small: launch overhead shows"),
        Model("torchao-bench", "torchao's own benchmark", 8192, 8192, "its numbers are public"),
    )
}


def model(key: str) -> Model:
    """The model of that key, in any case.

    Raises:
        Unsupported: no such key; the message names the nearest ones, or all where none is near.
    """
    found = MODELS.get(key.strip().lower())
    if found is None:
        near = difflib.get_close_matches(key.strip().lower(), MODELS, n=3, cutoff=0.55)
        hint = f"the nearest are {', '.join(near)}" if near else f"known are {', '.join(MODELS)}"
        raise Unsupported(f"there is no model {key!r}; {hint}")
    return found


def all_models() -> list[Model]:
    """The models whose FFN is at most :data:`LARGEST`."""
    return [m for m in MODELS.values() if m.d_model <= LARGEST[0] and m.d_ff <= LARGEST[1]]


def shapes(model: Model, tokens: Sequence[int] = TOKENS) -> list[Shape]:
    """The model's FFN at each of these token counts."""
    return [Shape(m, model.d_model, model.d_ff) for m in tokens]
