"""Files that are written whole: what is no plain file stays what it is, and a plain file keeps its mode and owner."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from srelu24 import whole_file


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        whole_file.write(tmp_path / "new" / "a", b"1")
    assert mode(tmp_path / "new" / "a") == 0o666 & ~mask
    assert os.listdir(tmp_path / "new") == ["a"]


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode_and_owner(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"old")
    if os.geteuid() == 0:
        os.chown(file, 54321, 54322)
    file.chmod(kept)
    before = file.stat()
    whole_file.write(file, b"new")
    after = file.stat()
    assert (file.read_bytes(), mode(file)) == (b"new", kept)
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino, "replaced at once, not written over"


def test_an_owner_that_cannot_be_kept_is_kept_by_writing_into_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    file = tmp_path / "a"
    file.write_bytes(b"longer than before")
    monkeypatch.setattr(whole_file, "_owner", lambda _: (-1, -1))
    monkeypatch.setattr(whole_file.os, "fchown", refuse)
    before = file.stat().st_ino
    whole_file.write(file, b"new")
    assert (file.read_bytes(), file.stat().st_ino, os.listdir(tmp_path)) == (b"new", before, ["a"])


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    for there in (True, False):
        link, file = tmp_path / f"link{there}", tmp_path / f"file{there}"
        if there:
            file.write_bytes(b"old")
        link.symlink_to(file.name)
        whole_file.check_writable(link)
        whole_file.write(link, b"new")
        assert link.is_symlink()
        assert file.read_bytes() == b"new"


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    master, slave = os.openpty()
    device = Path(os.ttyname(slave))
    before = device.stat()
    whole_file.check_writable(device)
    whole_file.write(device, b"to the device")
    assert os.read(master, 100) == b"to the device"
    assert (device.stat().st_rdev, device.stat().st_ino) == (before.st_rdev, before.st_ino)
    os.close(master)
    os.close(slave)


def test_dev_null_stays(tmp_path: Path) -> None:
    before = Path(os.devnull).stat()
    whole_file.write(Path(os.devnull), b"x")
    after = Path(os.devnull).stat()
    assert (after.st_mode, after.st_rdev) == (before.st_mode, before.st_rdev)
    assert stat.S_ISCHR(after.st_mode)


def test_a_full_device_says_so() -> None:
    with pytest.raises(OSError, match="No space left"):
        whole_file.write(Path("/dev/full"), b"x")


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    whole_file.check_writable(pipe)  # opens nothing: nobody reads yet
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    whole_file.write(pipe, b"x" * 200_000)
    reader.join(10)
    assert read == [b"x" * 200_000]
    assert pipe.is_fifo()


def test_a_folder_is_refused_before_and_when_it_is_written(tmp_path: Path) -> None:
    for use in (whole_file.check_writable, lambda path: whole_file.write(path, b"x")):
        with pytest.raises(IsADirectoryError):
            use(tmp_path)


def test_a_name_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    whole_file.write(tmp_path / ("n" * 255), b"x")
    with pytest.raises(OSError, match="too long"):
        whole_file.write(tmp_path / ("n" * 256), b"x")
    assert os.listdir(tmp_path) == ["n" * 255]


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    file = tmp_path / "a"
    file.write_bytes(b"old")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(whole_file.os, call, refuse)
            with pytest.raises(OSError, match="No space"):
                whole_file.write(file, b"new")
        assert (file.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])
