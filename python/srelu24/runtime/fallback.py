"""What a call does that the kernels cannot take: it runs in plain PyTorch, with one warning per reason, or in strict
mode raises an error."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from srelu24_gen.errors import Unsupported

STRICT = os.environ.get("SRELU24_STRICT", "0") not in ("", "0")
"""Every fallback of this process is an error: read once, so that a call does not pay for it."""


class FallbackWarning(UserWarning):
    """A call ran in plain PyTorch, dense or, in training, pruned; the message says why."""


class _Strict(threading.local):
    def __init__(self) -> None:  # in every thread
        self.layer: str | None = None


_strict = _Strict()


@contextmanager
def strictly(layer: str) -> Iterator[None]:
    """A fallback inside is an error that names ``layer``, in this thread."""
    before, _strict.layer = _strict.layer, layer
    try:
        yield
    finally:
        _strict.layer = before


def warn_dense(reason: str) -> None:
    """The call runs dense. Once per process and reason; while a graph is traced, a warning would break it.

    Raises:
        Unsupported: inside :func:`strictly`, or with SRELU24_STRICT set.
    """
    _refuse_if_strict(f"would run dense: {reason}")
    if not torch.compiler.is_compiling():
        _warn_once(f"srelu24 runs dense: {reason}. srelu24.explain(...) says more.")


def warn_reference(reason: str) -> None:
    """The training step runs on its reference. As :func:`warn_dense`."""
    _refuse_if_strict(f"would train with its reference in plain PyTorch: {reason}")
    if not torch.compiler.is_compiling():
        _warn_once(f"srelu24 trains with its reference in plain PyTorch, slower than dense: {reason}.")


def warn_again() -> None:
    """Forget what was warned of."""
    _warn_once.cache_clear()


def _refuse_if_strict(what: str) -> None:
    if STRICT or _strict.layer is not None:
        who = _strict.layer or "a call"
        raise Unsupported(f"{who} {what}; strict is set, so this is an error. srelu24.status(model) says more.")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)
