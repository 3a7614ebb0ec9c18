"""What becomes of a call that the kernels cannot take: it runs in plain PyTorch, with one warning for each reason, or
it is an error in strict mode."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

import torch

from srelu24_gen.errors import Unsupported

STRICT = os.environ.get("SRELU24_STRICT", "0") not in ("", "0")
"""Every fallback of this process is an error: read once, so that a call does not pay for it."""


class FallbackWarning(UserWarning):
    """A call ran in plain PyTorch, dense or, in training, pruned; the message says why.

    It points to the line of the caller's code from which the call came.
    """


class Reason(str):
    """Why the kernels cannot take a call, in words that may tell its number of tokens.

    Attributes:
        kind: the same for calls that differ in nothing but their numbers of tokens. There is one warning for each kind.
            A plain string is a kind of its own.
    """

    kind: str

    def __new__(cls, words: str, kind: str) -> Self:
        reason = super().__new__(cls, words)
        reason.kind = kind
        return reason


def reason_of(error: Exception) -> str:
    """The reason that an error was raised with, and its kind."""
    reason = error.args[0] if error.args else None
    return reason if isinstance(reason, Reason) else str(error)


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
    """Warn that the call runs dense, once per process and kind of reason. Not while a graph is traced: a warning would
    break it.

    Raises:
        Unsupported: inside :func:`strictly`, or with SRELU24_STRICT set.
    """
    _refuse_if_strict(f"would run dense: {reason}")
    if not torch.compiler.is_compiling():
        _warn_once("dense", reason, f"srelu24 runs dense: {reason}. srelu24.explain(...) says more.")


def warn_reference(reason: str) -> None:
    """Warn that the training step runs on its reference. As :func:`warn_dense`."""
    _refuse_if_strict(f"would train with its reference in plain PyTorch: {reason}")
    if not torch.compiler.is_compiling():
        message = f"srelu24 trains with its reference in plain PyTorch, slower than dense: {reason}."
        _warn_once("reference", reason, message)


def warn_again() -> None:
    """Forget what was warned of."""
    _warned.clear()


_warned: set[tuple[str, str]] = set()
"""What runs instead, and the kind of reason, of every warning so far. Kinds name no tokens, so they are few."""


def _warn_once(instead: str, reason: str, message: str) -> None:
    kind = (instead, reason.kind if isinstance(reason, Reason) else reason)
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, FallbackWarning, stacklevel=_frames_to_the_caller())


def _frames_to_the_caller() -> int:
    """``stacklevel``, for a ``warnings.warn`` in the function that calls this, of the first frame that is neither ours
    nor PyTorch's; of the outermost one where there is no such frame."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_back is not None and not _is_callers(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_callers(frame: FrameType) -> bool:
    """Whether code outside of srelu24 and PyTorch runs in it. What PyTorch's compilers generate has no module name."""
    package = str(frame.f_globals.get("__name__") or "torch").partition(".")[0]
    return package not in ("srelu24", "srelu24_gen", "torch")


def _refuse_if_strict(what: str) -> None:
    if STRICT or _strict.layer is not None:
        who = _strict.layer or "a call"
        raise Unsupported(f"{who} {what}; strict is set, so this is an error. srelu24.status(model) says more.")
