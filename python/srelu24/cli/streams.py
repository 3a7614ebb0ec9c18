"""Standard output and standard error, whatever they are: closed, full, a pipe that nobody reads, of any encoding."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


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
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except OSError as error:
        _give_up()
        with contextlib.suppress(OSError, ValueError):
            if not isinstance(error, BrokenPipeError):
                print(f"error: the output cannot be written ({error.strerror or error})", file=sys.stderr, flush=True)
        sys.exit(1)


def _give_up() -> None:
    """Else the interpreter would write what is left once more as it exits, and fail once more."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
