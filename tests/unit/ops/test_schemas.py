"""The operands that the ops take by name have the names and the order of the ops' schemas."""

from __future__ import annotations

import pytest
import torch

from srelu24.fp8 import plain
from srelu24.fp8.operands import FfnOperands, PlainOperands
from srelu24.training.ops import BackwardOperands, KeptOperands, RecipeOperands, TrainOperands

BUFFERS = {"w1_grad", "w2_grad"}


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("ffn_fp8", FfnOperands._fields),
        ("ffn_fp8_plain", PlainOperands._fields),
        ("ffn_recipe", RecipeOperands._fields),
        ("ffn_train", TrainOperands._fields),
        ("ffn_train_backward", tuple(name for name in BackwardOperands._fields if name not in BUFFERS)),
        ("ffn_train_into", BackwardOperands._fields),
        ("hidden_kept", KeptOperands._fields),
    ],
)
def test_names_are_those_of_the_schema(op: str, fields: tuple[str, ...]) -> None:
    assert plain  # defines the 8-bit ops
    schema = getattr(torch.ops.srelu24, op).default._schema
    assert tuple(argument.name for argument in schema.arguments) == fields
