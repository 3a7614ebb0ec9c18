"""What counts as the same machine code of two cubins."""

from __future__ import annotations

import random

import pytest

from made_up_cubin import cubin, elf
from srelu24_gen.machine_code import machine_code, why_not_kernel

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
    nameless = elf({f".text.{entry}": b"code"}, arch=arch)
    assert "has no kernel" in str(why_not_kernel(nameless, arch, entry))
    host = bytearray(whole)
    host[0x12] = 62
    assert "machine 62" in str(why_not_kernel(bytes(host), arch, entry))
    for file in (b"", b"\x7fELF", whole[:60], whole[:-1], random.Random(1).randbytes(2000)):
        assert why_not_kernel(file, arch, entry)
