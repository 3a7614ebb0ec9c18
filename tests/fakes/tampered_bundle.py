"""Bundles as an attacker would change them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from srelu24_gen.kept_kernel import KernelMeta, encode_meta

Change = Callable[[dict[str, bytes], dict[str, Any]], object]
"""Of the files by name, and of the manifest."""


def rewritten(path: Path, change: Change, rehash: bool = False, name: str = "other.zip") -> Path:
    """A copy with changed files and manifest; ``rehash`` makes the manifest fit the files."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    change(files, manifest)
    if rehash:
        manifest["files"] = {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in files.items()
        }
    other = path.with_name(name)
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, content in files.items():
            archive.writestr(name, content)
    return other


def of_kind(files: dict[str, bytes], end: str, number: int = 0) -> str:
    """The name of one of the files that end so."""
    return [name for name in sorted(files) if name.endswith(end)][number]


def meta_with(number: int = 0, **changes: Any) -> Change:
    """Other fields in a kernel's description, which is sealed again."""

    def change(files: dict[str, bytes], _: dict[str, Any]) -> None:
        name = of_kind(files, "meta.json", number)
        files[name] = reseal(files[name], **changes)

    return change


def reseal(meta: bytes, **changes: Any) -> bytes:
    """The text of a ``meta.json`` with other fields, and the digest of these."""
    return encode_meta(msgspec.structs.replace(msgspec.json.decode(meta, type=KernelMeta), **changes))


def cubin_with(content: Callable[[bytes, bytes], bytes]) -> Change:
    """Another cubin, made of its own and of another kernel's, which its description describes."""

    def change(files: dict[str, bytes], _: dict[str, Any]) -> None:
        name = of_kind(files, ".cubin")
        new = files[name] = content(files[name], files[of_kind(files, ".cubin", 1)])
        meta = name.replace("kernel.cubin", "meta.json")
        files[meta] = reseal(files[meta], cubin_bytes=len(new), cubin_sha256=hashlib.sha256(new).hexdigest())

    return change


def source_with(content: Callable[[bytes], bytes]) -> Change:
    """Another source, which the description describes."""

    def change(files: dict[str, bytes], _: dict[str, Any]) -> None:
        name = of_kind(files, "kernel.cu")
        new = files[name] = content(files[name])
        meta = name.replace("kernel.cu", "meta.json")
        files[meta] = reseal(files[meta], source_digest=hashlib.sha256(new).hexdigest())

    return change


def file_with(end: str, content: Callable[[bytes], bytes]) -> Change:
    """Another text in a file of that kind."""
    return lambda files, _: files.update({of_kind(files, end): content(files[of_kind(files, end)])})
