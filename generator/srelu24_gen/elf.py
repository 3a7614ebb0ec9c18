"""Reads the sections and symbols of a 64-bit little-endian ELF file (System V ABI, "Object Files"), such as a cubin."""

from __future__ import annotations

import struct
from dataclasses import dataclass

RESERVED = 8
"""SHT_NOBITS: a section that occupies no bytes of the file, memory to reserve."""
CUDA = 190
"""The machine of cubins."""
_SYMTAB, _OBJECT, _FUNCTION, _SECTION, _GLOBAL = 2, 1, 2, 3, 1
_MOST_SECTIONS = 4096


@dataclass(frozen=True, slots=True)
class Section:
    """One row of the section table."""

    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name, and the bytes that it stands for: none where it has none of its own in the file."""

    name: str
    content: bytes
    is_kernel: bool
    """Whether it is a global function."""


@dataclass(frozen=True, slots=True)
class Elf:
    """A file that was read."""

    file: bytes
    machine: int
    arch: int
    """The number in ``sm_90``: the second byte of the header's flags, in all that CUDA 13 makes."""
    sections: tuple[Section, ...]

    @classmethod
    def of(cls, file: bytes) -> Elf:
        """Read the header and the section table.

        Raises:
            ValueError: it is no such file, or is cut short.
        """
        try:
            if file[:5] != b"\x7fELF\x02":
                raise ValueError("not a 64-bit ELF file")
            machine = struct.unpack_from("<H", file, 0x12)[0]
            (table,) = struct.unpack_from("<Q", file, 0x28)
            (header_flags,) = struct.unpack_from("<I", file, 0x30)
            entry_bytes, count, names_index = struct.unpack_from("<3H", file, 0x3A)
            if count > _MOST_SECTIONS or names_index >= count:
                raise ValueError(f"not a whole ELF file: {count} sections, names in number {names_index}")
            if table + count * entry_bytes > len(file):
                raise ValueError("not a whole ELF file: its table of sections is cut short")
            rows = [struct.unpack_from("<2I4QI", file, table + i * entry_bytes) for i in range(count)]
            names_at = rows[names_index][4]
            sections = tuple(
                Section(_text(file, names_at + name), kind, flags, offset, size, link)
                for name, kind, flags, _, offset, size, link in rows
            )
        except (struct.error, IndexError, OverflowError) as error:
            raise ValueError(f"not a whole ELF file: {error}") from error
        return cls(file, machine, header_flags >> 8 & 0xFF, sections)

    def content(self, section: Section) -> bytes:
        """The bytes of a section; of what occupies none of the file its size, in eight bytes.

        Raises:
            ValueError: the file ends before them.
        """
        if section.kind == RESERVED:
            return struct.pack("<Q", section.size)
        content = self.file[section.offset : section.offset + section.size]
        if len(content) != section.size:
            raise ValueError(f"section {section.name} is cut short")
        return content

    def content_of(self, name: str) -> bytes:
        """The bytes of the section of that name; none where there is no such section."""
        return next((self.content(section) for section in self.sections if section.name == name), b"")

    def symbols(self) -> list[Symbol]:
        """The symbol table in its order. A symbol that stands for a whole section has the section's name."""
        return [
            self._symbol(names, *row)
            for table in self.sections
            if table.kind == _SYMTAB and table.link < len(self.sections)
            for names in (self.content(self.sections[table.link]),)
            for row in struct.iter_unpack("<I2BH2Q", self.content(table)[: table.size // 24 * 24])
        ]

    def _symbol(self, names: bytes, name: int, info: int, _other: int, index: int, value: int, size: int) -> Symbol:
        kind, inside = info & 0xF, index < len(self.sections)
        if kind == _SECTION and inside:
            return Symbol(self.sections[index].name, b"", False)
        stored = kind == _OBJECT and inside and self.sections[index].kind != RESERVED
        content = self.content(self.sections[index])[value : value + size] if stored else b""
        return Symbol(_text(names, name), content, kind == _FUNCTION and info >> 4 == _GLOBAL)


def _text(table: bytes, start: int) -> str:
    """The string at that place; raises ValueError where none ends there."""
    return table[start : table.index(b"\0", start)].decode(errors="replace")
