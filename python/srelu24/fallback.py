"""What a call does that the kernels cannot take: it runs as dense PyTorch, with one warning per reason."""

from __future__ import annotations

import functools
import warnings


class FallbackWarning(UserWarning):
    """A call ran as dense PyTorch; the message says why."""


@functools.cache
def warn_dense(reason: str) -> None:
    """Once per process and reason."""
    warnings.warn(f"srelu24 runs dense: {reason}. srelu24.explain(...) says more.", FallbackWarning, stacklevel=3)
