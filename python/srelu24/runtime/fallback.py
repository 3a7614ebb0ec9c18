"""The warning that a call runs in plain PyTorch because the kernels cannot take it: one for each reason."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Self

import torch


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


def warn_dense(reason: str) -> None:
    """Warn that the call runs dense, once per process and kind of reason. Not while a graph is traced: a warning would
    break it."""
    if not torch.compiler.is_compiling():
        _warn_once("dense", reason, f"srelu24 runs dense: {reason}. srelu24.explain(...) says more.")


def warn_reference(reason: str) -> None:
    """Warn that the training step runs on its reference. As :func:`warn_dense`."""
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
