"""What a call does that the kernels cannot take: it runs as dense PyTorch, with one warning per reason."""

from __future__ import annotations

import functools
import warnings

import torch


class FallbackWarning(UserWarning):
    """A call ran as dense PyTorch; the message says why."""


def warn_dense(reason: str) -> None:
    """Once per process and reason; while a graph is traced, a warning would break it."""
    if not torch.compiler.is_compiling():
        _warn_once(reason)


def warn_again() -> None:
    """Forget what was warned of."""
    _warn_once.cache_clear()


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"srelu24 runs dense: {reason}. srelu24.explain(...) says more.", FallbackWarning, stacklevel=4)
