"""What a GPU executes of a cubin: the parts of the ELF file that decide what a kernel does, and only these.

Headers also leave constants and strings in a cubin that no instruction reads, and a table of symbols that counts them.
So sections are compared as the instructions see them: symbols by name, and of the table of addresses (constant bank 4)
the entries that instructions read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_RESERVED = 8
"""SHT_NOBITS: a section that occupies no bytes of the file, memory to reserve."""
_WHOLE = (".text.", ".nv.shared.", ".nv.local.", ".nv.constant0.", ".nv.constant2.", ".nv.constant3.")
"""Instructions, memory, and constants by their offsets."""
_BY_SYMBOL = {0x0A, 0x11, 0x12, 0x23, 0x2F}
"""Attributes of ``.nv.info`` that begin with the index of a symbol: constant bank, frame and stack sizes, registers."""
_INSTRUCTION_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    content: bytes
    """Of a reserved section its size, in eight bytes."""


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """What decides of a 64-bit ELF file, by the name of its section. Equal answers run alike.

    Raises:
        ValueError: it is no such file, is cut short, or holds no code.
    """
    try:
        if cubin[:5] != b"\x7fELF\x02":
            raise ValueError("not a 64-bit ELF file")
        sections = _sections(cubin)
        symbols = _symbols(sections)
        found = {s.name: s.content for s in sections if s.name.startswith(_WHOLE)}
        found |= {s.name: _info(s.content, symbols) for s in sections if s.name.startswith(".nv.info")}
        for section in sections:
            if section.name.startswith(".text."):
                found[f"addresses read by {section.name}"] = _addresses_read(section.content, sections, symbols)
            if section.name.startswith((".rela.text.", ".rel.text.")) and section.content:
                found[section.name] = section.content  # the loader changes instructions: nothing is known to be alike
    except (struct.error, IndexError) as error:
        raise ValueError(f"not a whole ELF file: {error}") from error
    if not any(name.startswith(".text.") for name in found):
        raise ValueError("the file holds no code")
    return found


def _sections(cubin: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<2I4Q", cubin, table + i * entry_bytes) for i in range(count)]
    names_at = headers[names_index][4]
    sections = []
    for name_offset, kind, _, _, offset, size in headers:
        name = _text_at(cubin, names_at + name_offset)
        content = struct.pack("<Q", size) if kind == _RESERVED else cubin[offset : offset + size]
        if kind not in (0, _RESERVED) and len(content) != size:
            raise ValueError(f"section {name} is cut short")
        sections.append(_Section(name, kind, content))
    return sections


def _text_at(content: bytes, start: int) -> str:
    return content[start : content.index(b"\0", start)].decode()


def _content(sections: list[_Section], name: str) -> bytes:
    return next((s.content for s in sections if s.name == name), b"")


def _symbols(sections: list[_Section]) -> list[tuple[str, bytes]]:
    """Name of every symbol, and what it stands for: its bytes, or only its name where it has none of its own."""
    names, table = _content(sections, ".strtab"), _content(sections, ".symtab")
    symbols = []
    for name_offset, info, _, index, value, size in struct.iter_unpack("<I2BH2Q", table):
        inside = info & 0xF == 1 and index < len(sections) and sections[index].kind != _RESERVED  # STT_OBJECT
        content = sections[index].content[value : value + size] if inside else b""
        own = sections[index].name if info & 0xF == 3 and index < len(sections) else ""  # STT_SECTION
        symbols.append((own or _text_at(names, name_offset), content))
    return symbols


def _info(content: bytes, symbols: list[tuple[str, bytes]]) -> bytes:
    """The attributes of a kernel, with names in place of symbols' indices. Format 4 has a length, others two bytes."""
    found, at = b"", 0
    while at + 4 <= len(content):
        form, attribute, short = content[at], content[at + 1], content[at + 2 : at + 4]
        at += 4
        value = short
        if form == 4:
            (length,) = struct.unpack("<H", short)
            value = content[at : at + length]
            at += length
            if attribute in _BY_SYMBOL:
                (index,) = struct.unpack_from("<I", value)
                value = symbols[index][0].encode() + b"\0" + value[4:]
        found += bytes((form, attribute)) + struct.pack("<H", len(value)) + value
    return found


def _addresses_read(text: bytes, sections: list[_Section], symbols: list[tuple[str, bytes]]) -> bytes:
    """What the entries of constant bank 4 stand for that instructions may read.

    An operand of a constant bank has its bank in bits 54 to 58 of an instruction, and its offset in words in bits 40
    to 53. Other instructions may have such bits by chance; then more is compared than decides.
    """
    entries = {}
    for offset, info, addend in struct.iter_unpack("<2Qq", _content(sections, ".rela.nv.constant4")):
        name, content = symbols[info >> 32]
        entries[offset] = (content or name.encode()) + struct.pack("<q", addend)
    words = (
        word for word, _ in struct.iter_unpack("<2Q", text[: len(text) // _INSTRUCTION_BYTES * _INSTRUCTION_BYTES])
    )
    read = {4 * (word >> 40 & 0x3FFF) for word in words if word >> 54 & 0x1F == 4}
    return b"".join(struct.pack("<Q", offset) + entries[offset] for offset in sorted(read & entries.keys()))
