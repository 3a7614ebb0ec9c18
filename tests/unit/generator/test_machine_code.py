"""What counts as the same machine code of two cubins."""

from __future__ import annotations

import random
import struct

import pytest

from made_up_cubin import cubin
from made_up_cubin import elf as cubin_of
from srelu24_gen.machine_code import machine_code, why_not_kernel

NOBITS = 8


def elf(sections: dict[str, bytes], reserved: int = 0) -> bytes:
    """A small 64-bit ELF file with these sections and one that only reserves memory."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*sections, ".nv.shared.k", ".names"))
    content, headers = b"", []
    kinds = {".symtab": 2, ".strtab": 3}
    link = list(sections).index(".strtab") if ".strtab" in sections else 0
    rows = [*((name, kinds.get(name, 1), data) for name, data in sections.items()), (".names", 3, names)]
    for name, kind, data in rows:
        headers.append((names.index(name.encode() + b"\0"), kind, 6, 0, 64 + len(content), len(data), link))
        content += data
    headers.append((names.index(b".nv.shared.k\0"), NOBITS, 3, 0, 64, reserved, 0))
    table = b"".join(struct.pack("<2I4QI20x", *header) for header in headers)
    head = struct.pack("<16s24xQ10x3H", b"\x7fELF\x02", 64 + len(content), 64, len(headers), len(headers) - 2)
    return head.ljust(64, b"\0") + content + table


REGISTERS = bytes((3, 0x1B, 0x10, 0))
CODE = {".text.k": b"\x01\x02", ".nv.info.k": REGISTERS, ".comment": b"names"}


def test_instructions_resources_and_memory_decide_and_names_do_not() -> None:
    same = machine_code(elf(CODE, 16))
    assert same == machine_code(elf({**CODE, ".comment": b"other", ".debug_line": b"x", ".nv.global.init": b"z"}, 16))
    for other in (
        elf({**CODE, ".text.k": b"\x01\x03"}, 16),
        elf({**CODE, ".nv.info.k": bytes((3, 0x1B, 0x20, 0))}, 16),
        elf(CODE, 32),
    ):
        assert machine_code(other) != same
    assert machine_code(elf({**CODE, ".nv.constant3.k": b"\x05"}, 16)) != same


@pytest.mark.parametrize(
    "damaged", [b"", b"\x7fELF", elf(CODE)[:-30], elf({".comment": b""}), elf(CODE)[:50] + elf(CODE)[120:]]
)
def test_a_damaged_file_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"ELF|cut short|no code"):
        machine_code(damaged)


def instruction(bank: int, offset: int) -> bytes:
    """Sixteen bytes with an operand of a constant bank."""
    return struct.pack("<2Q", bank << 54 | offset // 4 << 40, 0)


def with_table(*names: str, reads: int, bank: int = 4, info_of: int = 1) -> bytes:
    """A file whose constant bank 4 holds the addresses of these symbols, of which an instruction reads one."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    symbols = bytes(24) + b"".join(
        struct.pack("<I2BH2Q", strings.index(name.encode() + b"\0"), 0, 0, 0, 0, 0) for name in names
    )
    relocations = b"".join(struct.pack("<2Qq", 8 * i, (i + 1) << 32, 0) for i in range(len(names)))
    return elf(
        {
            ".text.k": instruction(bank, reads),
            ".nv.info.k": bytes((4, 0x2F)) + struct.pack("<H2I", 8, info_of, 96),
            ".strtab": strings,
            ".symtab": symbols,
            ".rela.nv.constant4": relocations,
        }
    )


def test_addresses_that_an_instruction_reads_decide_and_others_do_not() -> None:
    same = machine_code(with_table("a", "b", reads=0))
    assert machine_code(with_table("a", "c", reads=0)) == same
    assert machine_code(with_table("a", "b", "c", reads=0)) == same
    assert machine_code(with_table("x", "b", reads=0)) != same
    third = machine_code(with_table("x", "b", reads=0, bank=3))
    assert machine_code(with_table("y", "b", reads=0, bank=3)) != third, "only by the name that .nv.info has"
    assert machine_code(with_table("y", "b", reads=0, bank=3, info_of=2)) == machine_code(
        with_table("z", "b", reads=0, bank=3, info_of=2)
    )


def test_a_symbol_counts_by_its_name_and_not_by_its_place() -> None:
    assert machine_code(with_table("a", "b", reads=0, info_of=2)) == machine_code(
        with_table("a", "c", "b", reads=0, info_of=3)
    )


KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def test_the_key_in_a_kernels_name_is_no_machine_code() -> None:
    one, other = (cubin(f"srelu24_kernel_{key}", b"code") for key in (KEY, OTHER))
    assert one != other
    assert machine_code(one) == machine_code(other) == machine_code(cubin("srelu24_kernel", b"code"))
    assert machine_code(one) != machine_code(cubin(f"srelu24_kernel_{KEY}", b"edoc"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_a_cubin_is_of_its_architecture_and_its_kernel(arch: str) -> None:
    entry = f"srelu24_kernel_{KEY}"
    whole = cubin(entry, b"code", arch)
    assert why_not_kernel(whole, arch, entry) is None
    assert "not for sm_86" in str(why_not_kernel(whole, "sm_86", entry))
    assert "has no code of" in str(why_not_kernel(whole, arch, f"srelu24_kernel_{OTHER}"))
    assert "has no code of" in str(why_not_kernel(cubin(entry, b"", arch), arch, entry))
    nameless = cubin_of({f".text.{entry}": b"code"}, arch=arch)
    assert "has no kernel" in str(why_not_kernel(nameless, arch, entry))
    host = bytearray(whole)
    host[0x12] = 62
    assert "machine 62" in str(why_not_kernel(bytes(host), arch, entry))
    for file in (b"", b"\x7fELF", whole[:60], whole[:-1], random.Random(1).randbytes(2000)):
        assert why_not_kernel(file, arch, entry)
