"""Small ELF files in the form of cubins."""

from __future__ import annotations

import re
import struct

NOBITS = 8
CUDA = 190


def elf(
    sections: dict[str, bytes], reserved: int = 0, *, arch: str = "sm_90a", functions: tuple[str, ...] = ()
) -> bytes:
    """A 64-bit ELF file with these sections, one that only reserves memory, and a symbol for each function."""
    symbol_names = b"\0" + b"".join(name.encode() + b"\0" for name in functions)
    symbols = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", symbol_names.index(name.encode() + b"\0"), 0x12, 0, 1, 0, 0) for name in functions
    )
    named = {**sections, ".symbols": symbols, ".symbol_names": symbol_names}
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*named, ".nv.shared.k", ".names"))
    content, headers = b"", []
    for name, data in (*named.items(), (".names", names)):
        kind, link = {".symbols": (2, len(named) - 1)}.get(name, (1, 0))
        headers.append((names.index(name.encode() + b"\0"), kind, 6, 0, 64 + len(content), len(data), link))
        content += data
    headers.append((names.index(b".nv.shared.k\0"), NOBITS, 3, 0, 64, reserved, 0))
    table = b"".join(struct.pack("<2I4QI20x", *header) for header in headers)
    flags = 0x6000004 | int(re.sub(r"\D", "", arch)) << 8
    start = 64 + len(content)
    sizes = (64, 0, 0, 64, len(headers), len(headers) - 2)
    head = struct.pack("<16s2HI3QI6H", b"\x7fELF\x02\x01", 2, CUDA, 1, 0, 0, start, flags, *sizes)
    return head + content + table


def cubin(entry: str, code: bytes, arch: str = "sm_90a") -> bytes:
    """Of one kernel."""
    return elf({f".text.{entry}": code, f".nv.info.{entry}": b"\1"}, arch=arch, functions=(entry,))
