"""What a switch of threads can do, tried at every place: another thread's work between any two lines of a function."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

Interrupted = Callable[[Callable[[], Any], Callable[[], object]], Any]


def at_every_line(function: Callable[..., object]) -> Iterator[Interrupted]:
    """For every line that ``function`` runs: what calls something, and something else just before that line; at last,
    something else after the call."""
    for line in itertools.count(1):
        interruption = _Interruption(function.__code__, line)
        yield interruption
        if not interruption.happened:
            assert line > 1, f"{function} was never called"
            return


class _Interruption:
    def __init__(self, code: CodeType, line: int) -> None:
        self.code, self.left, self.happened = code, line, False

    def __call__(self, call: Callable[[], Any], other: Callable[[], object]) -> Any:
        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code is not self.code:
                return None
            if event == "line":
                self.left -= 1
                if self.left == 0:
                    self.happened = True
                    other()  # which is not traced itself
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            result = call()
        finally:
            sys.settrace(before)
        if not self.happened:
            other()
        return result
