"""A small byte-level transformer with squared-ReLU FFNs: RMS norm, rotary positions, no biases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, rms_norm, scaled_dot_product_attention

from srelu24.nn.modules import SquaredReLUFFN

BYTES = 256

FFNStep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [B, T, D], w1 [F, D], w2 [D, F] -> [B, T, D]."""


class FFN(nn.Module):
    """What :func:`srelu24.convert` finds; or another step on its two weights, where one is set."""

    step: FFNStep | None = None

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.up.weight, std=width**-0.5)
        nn.init.normal_(self.down.weight, std=(2 * layers * hidden) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.step is not None:
            return self.step(x, self.up.weight, self.down.weight)
        y: Tensor = self.down(self.up(x).relu().square())
        return y


class Block(nn.Module):
    """Attention, then the FFN, each added to the stream."""

    def __init__(self, width: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.out = nn.Parameter(torch.randn(width, width) * (2 * layers * width) ** -0.5)
        self.ffn = FFN(width, hidden, layers)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """x [B, T, D], angles [T, head / 2] -> [B, T, D]."""
        size, length, width = x.shape
        qkv = linear(_norm(x), self.qkv).view(size, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(_rotate(_norm(q), angles), _rotate(_norm(k), angles), v, is_causal=True)
        x = x + linear(attended.transpose(1, 2).reshape(size, length, width), self.out)
        y: Tensor = x + self.ffn(_norm(x))
        return y


class Transformer(nn.Module):
    """Bytes in, the mean loss of the next byte out."""

    def __init__(self, *, layers: int, width: int, hidden: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(BYTES, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, hidden, heads, layers) for _ in range(layers))
        self.head = nn.Parameter(torch.zeros(BYTES, width))
        head = width // heads
        frequencies = 10000.0 ** -(torch.arange(0, head, 2) / head)
        self.angles: Tensor
        self.register_buffer("angles", torch.outer(torch.arange(context), frequencies), persistent=False)

    @property
    def ffns(self) -> list[FFN | SquaredReLUFFN]:
        """The FFNs, first layer first, converted or not."""
        return [block.ffn for block in self.blocks]  # type: ignore[misc]

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T + 1] -> the loss in nats per byte, float32 []."""
        x = self.embedding[tokens[:, :-1]]
        for block in self.blocks:
            x = block(x, self.angles)
        logits = linear(_norm(x), self.head)
        return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _norm(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:])


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position: x [B, H, T, head]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
