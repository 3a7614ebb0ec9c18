"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Replace the file at once: a reader, or whoever comes after a crash, finds the old one or the new one.

    A link stays and what it points to is replaced, with the mode and the owner that it had; a new file gets the mode
    that the umask leaves. A device or a pipe, and a file whose owner cannot be kept, is written to instead.

    Raises:
        OSError: it cannot be written; the file that was there is still there.
    """
    before = _status(path)
    if before is not None and not stat.S_ISREG(before.st_mode):
        return _write_through(path, content)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".srelu24-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            if before is not None and (before.st_uid, before.st_gid) != _owner(stream.fileno()):
                try:
                    os.fchown(stream.fileno(), before.st_uid, before.st_gid)
                except OSError:
                    return _write_through(path, content)
            os.fchmod(stream.fileno(), 0o666 & ~_umask() if before is None else stat.S_IMODE(before.st_mode))
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)  # gone already after the rename


def check_writable(path: Path) -> None:
    """Make the file's folder, and raise OSError now where :func:`write` could not put it there."""
    before = _status(path)
    if before is None or stat.S_ISREG(before.st_mode):
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    elif stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _write_through(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY), "wb", buffering=0) as stream:
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            stream.truncate()
        view = memoryview(content)
        while view:
            view = view[stream.write(view) :]


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _owner(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_uid, status.st_gid


def _umask() -> int:
    """Of this process, whose only interface to it also sets it; Linux tells it in a file without setting it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration, ValueError):
        return 0o077
