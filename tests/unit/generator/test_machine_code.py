"""What counts as the same machine code of two cubins."""

from __future__ import annotations

import struct

import pytest

from srelu24_gen.machine_code import machine_code

NOBITS = 8


def elf(sections: dict[str, bytes], reserved: int = 0) -> bytes:
    """A small 64-bit ELF file with these sections and one that only reserves memory."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*sections, ".nv.shared.k", ".names"))
    content, headers = b"", []
    rows = [*((name, 1, data) for name, data in sections.items()), (".names", 3, names)]
    for name, kind, data in rows:
        headers.append((names.index(name.encode() + b"\0"), kind, 6, 0, 64 + len(content), len(data)))
        content += data
    headers.append((names.index(b".nv.shared.k\0"), NOBITS, 3, 0, 64, reserved))
    table = b"".join(struct.pack("<2I4Q24x", *header) for header in headers)
    head = struct.pack("<16s24xQ10x3H", b"\x7fELF\x02", 64 + len(content), 64, len(headers), len(headers) - 2)
    return head.ljust(64, b"\0") + content + table


CODE = {".text.k": b"\x01\x02", ".nv.info.k": b"\x03", ".symtab": b"names"}


def test_instructions_resources_and_memory_decide_and_names_do_not() -> None:
    same = machine_code(elf(CODE, 16))
    assert same == machine_code(elf({**CODE, ".symtab": b"other", ".debug_line": b"x"}, 16))
    for other in (elf({**CODE, ".text.k": b"\x01\x03"}, 16), elf({**CODE, ".nv.info.k": b"\x04"}, 16), elf(CODE, 32)):
        assert machine_code(other) != same
    assert machine_code(elf({**CODE, ".nv.constant3": b"\x05"}, 16)) != same


@pytest.mark.parametrize(
    "damaged", [b"", b"\x7fELF", elf(CODE)[:-30], elf({".symtab": b""}), elf(CODE)[:50] + elf(CODE)[120:]]
)
def test_a_damaged_file_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"ELF|cut short|no code"):
        machine_code(damaged)
