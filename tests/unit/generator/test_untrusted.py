"""Files and JSON of others: each kind of trouble is one kind of error, and nothing waits or is read without end."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from srelu24_gen import untrusted

DEEP = b"[" * 100_000 + b"]" * 100_000


class Row(msgspec.Struct):
    a: int = 0
    b: object = None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"b": "\xff"}',
        b'{"b": "\xed\xa0\x80"}',
        DEEP,
        b'{"b": ' + DEEP + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1e999}',
        b'{"b": 1e999}',
        b'{"a": "x"}',
        b"[]",
        b"null",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_json_of_that_type_is_one_error(text: bytes) -> None:
    with pytest.raises(untrusted.Undecodable):
        untrusted.decode(text, Row)


def test_json_of_that_type_is_decoded() -> None:
    assert untrusted.decode(b'{"a": 3, "b": ["\xc3\xbc"]}', Row) == Row(3, ["ü"])


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    file, pipe, link = tmp_path / "file", tmp_path / "pipe", tmp_path / "link"
    file.write_bytes(b"12345")
    os.mkfifo(pipe)
    link.symlink_to(file)
    assert untrusted.read(file, most=5) == untrusted.read(link) == b"12345"
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"not a regular file|directory"):
            untrusted.read(path)
    with pytest.raises(OSError, match="5 bytes, and 4 are the most"):
        untrusted.read(file, most=4)
    with pytest.raises(FileNotFoundError):
        untrusted.read(tmp_path / "none")


def test_a_file_that_grows_while_it_is_read_is_bounded() -> None:
    with pytest.raises(OSError, match="more than 3 bytes"):
        untrusted.read(Path("/proc/self/status"), most=3)  # its size is 0 until it is read
