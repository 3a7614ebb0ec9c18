"""A compiled kernel as it is kept in the build store and in bundles: its files, and the description."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from srelu24_gen import untrusted


class KernelMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about one binary; ``meta.json``. Sizes in bytes, per thread where not said otherwise."""

    name: str
    key: str
    """SHA-256 of all that went into the binary."""
    entry: str
    """Symbol of the kernel."""
    arch: str
    template: str
    family: dict[str, str | bool | None]
    config: dict[str, str | int | bool]
    """Fields of the KernelConfig, runtime fields at their defaults."""
    registers: int
    stack_bytes: int
    spill_bytes: int
    """Spill stores plus spill loads."""
    static_smem: int
    """Per block; dynamic shared memory comes on top."""
    warnings: list[str]
    """What ptxas said about lost performance, for example serialised wgmma (C75xx)."""
    compile_seconds: float
    nvrtc_version: str
    cutlass_version: str
    source_digest: str
    """SHA-256 of kernel.cu."""
    abi: int
    cubin_bytes: int
    """Size of the whole file, with cubin_sha256 the proof that it is intact."""
    cubin_sha256: str

    @property
    def fault(self) -> str:
        """Why the kernel is not worth running, in words; empty where nothing is wrong with it.

        A kernel that spills registers or whose MMAs ptxas serialised computes what it should, several times slower.
        """
        if self.spill_bytes or self.stack_bytes:
            return f"it spills registers: {self.spill_bytes} bytes, with {self.stack_bytes} bytes of stack"
        serialised = [warning for warning in self.warnings if "wgmma" in warning]
        return f"ptxas serialised its MMAs: {serialised[0]}" if serialised else ""


class _SealedMeta(KernelMeta, frozen=True, kw_only=True):
    """The text of ``meta.json``: a KernelMeta, and the proof that it is intact."""

    meta_sha256: str
    """SHA-256 of the other fields as compact JSON, in their order."""


def encode_meta(meta: KernelMeta) -> bytes:
    """The text of ``meta.json``."""
    fields = msgspec.structs.asdict(meta)
    sealed = _SealedMeta(**fields, meta_sha256=hashlib.sha256(msgspec.json.encode(meta)).hexdigest())
    return msgspec.json.format(msgspec.json.encode(sealed)) + b"\n"


def decode_meta(text: bytes) -> KernelMeta:
    """Inverse of :func:`encode_meta`.

    Raises:
        Undecodable: it is not what :func:`encode_meta` writes, to the byte.
    """
    sealed = untrusted.decode(text, _SealedMeta)
    meta = KernelMeta(**{name: getattr(sealed, name) for name in KernelMeta.__struct_fields__})
    if encode_meta(meta) != text:
        raise untrusted.Undecodable("it does not match its digest")
    return meta


@dataclass(frozen=True, slots=True)
class KeptKernel:
    """The files of one entry."""

    meta: KernelMeta
    source: str
    cubin: bytes
    log: str

    @property
    def files(self) -> dict[str, bytes]:
        """By file name."""
        return {
            "kernel.cu": self.source.encode(),
            "kernel.cubin": self.cubin,
            "compile.log": self.log.encode(),
            "meta.json": encode_meta(self.meta),
        }
