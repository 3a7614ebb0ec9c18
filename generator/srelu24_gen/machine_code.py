"""What a GPU executes of a cubin: the parts of the ELF file that decide what a kernel does."""

from __future__ import annotations

import struct

_DECIDES = (".text.", ".nv.info", ".nv.constant", ".nv.shared", ".nv.global", ".nv.local")
"""Instructions; registers, parameters and barriers; constants; memory. The rest are names, notes and tables."""


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """The contents of the deciding sections of a 64-bit ELF file, by section name. Equal answers run alike.

    Raises:
        ValueError: it is no such file, or is cut short.
    """
    try:
        if cubin[:5] != b"\x7fELF\x02":
            raise ValueError("not a 64-bit ELF file")
        (table,) = struct.unpack_from("<Q", cubin, 0x28)
        entry_bytes, count, names_index = struct.unpack_from("<3H", cubin, 0x3A)
        headers = [struct.unpack_from("<2I4Q", cubin, table + i * entry_bytes) for i in range(count)]
        names_at = headers[names_index][4]
        found: dict[str, bytes] = {}
        for name_offset, kind, flags, _, offset, size in headers:
            start = names_at + name_offset
            name = cubin[start : cubin.index(b"\0", start)].decode()
            if name.startswith(_DECIDES):
                # What occupies no bytes of the file (SHT_NOBITS) is memory to reserve: its size decides.
                content = struct.pack("<Q", size) if kind == 8 else cubin[offset : offset + size]
                if kind != 8 and len(content) != size:
                    raise ValueError(f"section {name} is cut short")
                found[name] = struct.pack("<Q", flags) + content
    except (struct.error, IndexError) as error:
        raise ValueError(f"not a whole ELF file: {error}") from error
    if not any(name.startswith(".text.") for name in found):
        raise ValueError("the file holds no code")
    return found
