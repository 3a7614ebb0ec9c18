"""What a GPU executes of a cubin: the parts of the ELF file that decide what a kernel does, and what they are for."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_DECIDES = (".text.", ".nv.info", ".nv.constant", ".nv.shared", ".nv.global", ".nv.local")
"""Instructions; registers, parameters and barriers; constants; memory. The rest are names, notes and tables."""
_ENTRY = re.compile(r"srelu24_kernel(_[0-9a-f]{16})?$")
"""The symbol of a kernel of ours, which has the kernel's key in its name (:func:`srelu24_gen.compile.entry_of`)."""
_MACHINE_CUDA = 190
_NOBITS, _SYMTAB = 8, 2
_FUNCTION, _GLOBAL = 2, 1
_MOST_SECTIONS = 4096


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """The contents of the deciding sections of a 64-bit ELF file, by section name. Equal answers run alike.

    The key in the name of our kernel is left out of the section names, so that kernels of other keys can be compared.

    Raises:
        ValueError: it is no such file, or is cut short.
    """
    elf = _Elf.of(cubin)
    found = {
        _ENTRY.sub("srelu24_kernel", section.name): struct.pack("<Q", section.flags) + elf.content(section)
        for section in elf.sections
        if section.name.startswith(_DECIDES)
    }
    if not any(name.startswith(".text.") for name in found):
        raise ValueError("the file holds no code")
    return found


def why_not_kernel(cubin: bytes, arch: str, entry: str) -> str | None:
    """Why a file is no cubin for an architecture (``sm_90a``) with a kernel of that symbol and its code; None if it is.

    This tells a kernel from another one's and from what is no kernel. It cannot tell good instructions from bad ones.
    """
    try:
        elf = _Elf.of(cubin)
        if elf.machine != _MACHINE_CUDA:
            return f"it is made for machine {elf.machine}, not for CUDA"
        number = re.sub(r"\D", "", arch)
        if elf.arch != int(number):
            return f"it is made for sm_{elf.arch}, not for {arch}"
        if not any(section.name == f".text.{entry}" and elf.content(section)[:1] for section in elf.sections):
            return f"it has no code of {entry}"
        if entry not in elf.functions():
            return f"it has no kernel {entry}"
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True, slots=True)
class _Elf:
    """A 64-bit little-endian ELF file (System V ABI, "Object Files")."""

    file: bytes
    machine: int
    arch: int
    """The number in ``sm_90``: the second byte of the header's flags, in all that CUDA 13 makes."""
    sections: tuple[_Section, ...]

    @classmethod
    def of(cls, file: bytes) -> _Elf:
        """Raises ValueError where it is none, or is cut short."""
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
                _Section(_text(file, names_at + name), kind, flags, offset, size, link)
                for name, kind, flags, _, offset, size, link in rows
            )
        except (struct.error, IndexError, OverflowError) as error:
            raise ValueError(f"not a whole ELF file: {error}") from error
        return cls(file, machine, header_flags >> 8 & 0xFF, sections)

    def content(self, section: _Section) -> bytes:
        """Of what occupies no bytes of the file (SHT_NOBITS) only memory is reserved: its size decides."""
        if section.kind == _NOBITS:
            return struct.pack("<Q", section.size)
        content = self.file[section.offset : section.offset + section.size]
        if len(content) != section.size:
            raise ValueError(f"section {section.name} is cut short")
        return content

    def functions(self) -> set[str]:
        """Names of the global functions in the symbol table."""
        found = set()
        for table in self.sections:
            if table.kind != _SYMTAB or table.link >= len(self.sections):
                continue
            names = self.content(self.sections[table.link])
            content = self.content(table)
            for name, info, *_ in struct.iter_unpack("<IBBHQQ", content[: len(content) // 24 * 24]):
                if info & 0xF == _FUNCTION and info >> 4 == _GLOBAL:
                    found.add(_text(names, name))
        return found


def _text(table: bytes, start: int) -> str:
    """The string at that place; raises ValueError where none ends there."""
    return table[start : table.index(b"\0", start)].decode(errors="replace")
