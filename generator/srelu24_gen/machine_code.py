"""What a GPU executes of a cubin: the parts of the file that decide what a kernel does, and what they are for.

Headers also leave constants and strings in a cubin that no instruction reads, and a table of symbols that counts them.
So sections are compared as the instructions see them: symbols by name, and of the table of addresses (constant bank 4)
the entries that instructions read.
"""

from __future__ import annotations

import re
import struct

from srelu24_gen.elf import CUDA, Elf, Symbol

_WHOLE = (".text.", ".nv.shared.", ".nv.local.", ".nv.constant0.", ".nv.constant2.", ".nv.constant3.")
"""Instructions, memory, and constants by their offsets."""
_ENTRY = re.compile(r"srelu24_kernel(_[0-9a-f]{16})?$")
"""The symbol of a kernel of ours, which has the kernel's key in its name (:func:`srelu24_gen.compile.entry_of`)."""
_BY_SYMBOL = {0x0A, 0x11, 0x12, 0x23, 0x2F}
"""Attributes of ``.nv.info`` that begin with the index of a symbol: constant bank, frame and stack sizes, registers."""
_INSTRUCTION_BYTES = 16


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """What decides of a 64-bit ELF file, by the name of its section. Equal answers run alike.

    The key in the name of our kernel is left out of all names, so that kernels of other keys can be compared.

    Raises:
        ValueError: it is no such file, is cut short, or holds no code.
    """
    elf = Elf.of(cubin)
    symbols = elf.symbols()
    found: dict[str, bytes] = {}
    try:
        for section in elf.sections:
            name = _without_key(section.name)
            if section.name.startswith(_WHOLE):
                found[name] = elf.content(section)
            if section.name.startswith(".nv.info"):
                found[name] = _info(elf.content(section), symbols)
            if section.name.startswith(".text."):
                found[f"addresses read by {name}"] = _addresses_read(elf.content(section), elf, symbols)
            if section.name.startswith((".rela.text.", ".rel.text.")) and section.size:
                found[name] = elf.content(section)  # the loader changes instructions: nothing is known to be alike
    except (struct.error, IndexError) as error:
        raise ValueError(f"not a whole ELF file: {error}") from error
    if not any(name.startswith(".text.") for name in found):
        raise ValueError("the file holds no code")
    return found


def why_not_kernel(cubin: bytes, arch: str, entry: str) -> str | None:
    """Why a file is no cubin for an architecture (``sm_90a``) with a kernel of that symbol and its code; None if it is.

    This tells a kernel from another one's and from what is no kernel. It cannot tell good instructions from bad ones.
    """
    try:
        elf = Elf.of(cubin)
        if elf.machine != CUDA:
            return f"it is made for machine {elf.machine}, not for CUDA"
        number = re.sub(r"\D", "", arch)
        if elf.arch != int(number):
            return f"it is made for sm_{elf.arch}, not for {arch}"
        if not any(section.name == f".text.{entry}" and elf.content(section)[:1] for section in elf.sections):
            return f"it has no code of {entry}"
        if not any(symbol.is_kernel and symbol.name == entry for symbol in elf.symbols()):
            return f"it has no kernel {entry}"
    except ValueError as error:
        return str(error)
    return None


def _without_key(name: str) -> str:
    return _ENTRY.sub("srelu24_kernel", name)


def _info(content: bytes, symbols: list[Symbol]) -> bytes:
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
                value = _without_key(symbols[index].name).encode() + b"\0" + value[4:]
        found += bytes((form, attribute)) + struct.pack("<H", len(value)) + value
    return found


def _addresses_read(text: bytes, elf: Elf, symbols: list[Symbol]) -> bytes:
    """What the entries of constant bank 4 stand for that instructions may read.

    An operand of a constant bank has its bank in bits 54 to 58 of an instruction, and its offset in words in bits 40
    to 53. Other instructions may have such bits by chance; then more is compared than decides.
    """
    entries = {}
    for offset, info, addend in struct.iter_unpack("<2Qq", elf.content_of(".rela.nv.constant4")):
        symbol = symbols[info >> 32]
        entries[offset] = (symbol.content or _without_key(symbol.name).encode()) + struct.pack("<q", addend)
    whole = text[: len(text) // _INSTRUCTION_BYTES * _INSTRUCTION_BYTES]
    words = (word for word, _ in struct.iter_unpack("<2Q", whole))
    read = {4 * (word >> 40 & 0x3FFF) for word in words if word >> 54 & 0x1F == 4}
    return b"".join(struct.pack("<Q", offset) + entries[offset] for offset in sorted(read & entries.keys()))
