"""Reading what others may have written: only regular files of a bounded size, and JSON that is decoded or refused.

Everything that comes from disk passes here, so that a device, a pipe, an endless file, invalid UTF-8 and a thousand
nested brackets each end as one kind of error.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

T = TypeVar("T")
MOST_BYTES = 64 << 20
"""Of a file of records, measurements or descriptions; the largest that ships has 200 KB."""


class Undecodable(ValueError):
    """The text is not JSON of the wanted type; the message says where it is not."""


def open_regular(path: Path, most: int = MOST_BYTES) -> BinaryIO:
    """Open a file for reading, without waiting for anybody.

    Raises:
        OSError: it cannot be read, is a folder, a device or a pipe, or has more than ``most`` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for its writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        if status.st_size > most:
            raise OSError(f"it has {status.st_size} bytes, and {most} are the most that is read")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(path: Path, most: int = MOST_BYTES) -> bytes:
    """The contents of a file.

    Raises:
        OSError: as :func:`open_regular`; also where the file grows beyond ``most`` bytes while it is read.
    """
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most} bytes, and that is the most that is read")
    return content


def decode(text: bytes | str, kind: type[T]) -> T:
    """A value of ``kind`` from JSON.

    Raises:
        Undecodable: it is not; also for invalid UTF-8, nesting that is too deep and numbers that are too long.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError as error:
        raise Undecodable("it is nested too deeply") from error
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
        raise Undecodable(str(error)[:300]) from error  # it may repeat what it could not decode
