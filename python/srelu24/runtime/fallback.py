"""What a call does that the kernels cannot take: it runs in plain PyTorch, with one warning per reason."""

from __future__ import annotations

import functools
import warnings

import torch


class FallbackWarning(UserWarning):
    """A call ran in plain PyTorch, dense or, in training, pruned; the message says why."""


def warn_dense(reason: str) -> None:
    """The call runs dense. Once per process and reason; while a graph is traced, a warning would break it."""
    if not torch.compiler.is_compiling():
        _warn_once(f"srelu24 runs dense: {reason}. srelu24.explain(...) says more.")


def warn_reference(reason: str) -> None:
    """The training step runs on its reference. As :func:`warn_dense`."""
    if not torch.compiler.is_compiling():
        _warn_once(f"srelu24 trains with its reference in plain PyTorch, slower than dense: {reason}.")


def warn_again() -> None:
    """Forget what was warned of."""
    _warn_once.cache_clear()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)
