"""Standard output and standard error, whatever they are: closed, full, a pipe that nobody reads, of any encoding."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def of_any_kind() -> Iterator[None]:
    """In the body every text can be printed: what the encoding lacks is escaped, and a closed stream swallows it.

    At the end all that was printed is written. Where that fails the process exits with 1, after one line on standard
    error; without a line where the reader of a pipe has gone, as with other commands.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code: object = 0
    failure: OSError | None = None
    try:
        yield
    except SystemExit as exit_:
        code = exit_.code
    except OSError as error:
        failure = error
    failures = [failure, *map(_settle, (sys.stdout, sys.stderr))]
    if not any(failures):
        if code != 0:
            sys.exit(code)  # type: ignore[arg-type]
        return
    reason = next(filter(None, failures))
    if code == 0 and not isinstance(reason, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError):
            print(f"error: the output cannot be written ({reason.strerror or reason})", file=sys.stderr, flush=True)
    sys.exit(code or 1)  # type: ignore[arg-type]


def _settle(stream: TextIO) -> OSError | None:
    """Write what a stream still holds. Where that fails it goes nowhere: else the interpreter would try once more as it
    exits, and complain."""
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
        return error
    return None
