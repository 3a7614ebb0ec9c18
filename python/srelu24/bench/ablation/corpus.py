"""Bytes to train on, without a download: source code and documentation of the Python that runs this."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srelu24_gen.errors import Unsupported

SUFFIXES = (".py", ".md", ".rst")
_LARGEST_FILE = 1 << 20
"""Larger ones are tables written as code."""
_VALIDATION = 50
"""One file in so many is kept for validation."""


@dataclass(frozen=True, eq=False, slots=True)
class Corpus:
    """Files one after another, a zero byte after each: uint8 [bytes]."""

    train: Tensor
    validation: Tensor
    digest: str
    """SHA-256 of both parts."""

    def to(self, device: torch.device) -> Corpus:
        """The same on a device."""
        return Corpus(self.train.to(device), self.validation.to(device), self.digest)


def load(limit: int = 64 << 20, roots: Iterable[Path] | None = None) -> Corpus:
    """Files in an order that their names decide, so that a part of them is a mixture, up to ``limit`` bytes.

    Args:
        roots: folders to search; the standard library and the installed packages by default.

    Raises:
        Unsupported: there is too little text for both parts.
    """
    if roots is None:
        roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files: dict[str, Path] = {}
    for root in roots:
        for path in root.rglob("*"):
            if path.suffix in SUFFIXES and path.is_file():
                files.setdefault(hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest(), path)
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    size = 0
    for name, path in sorted(files.items()):
        if size >= limit:
            break
        if path.stat().st_size <= _LARGEST_FILE:
            text = path.read_bytes() + b"\0"
            parts[int(name, 16) % _VALIDATION == 0].append(text)
            size += len(text)
    train, validation = (b"".join(part) for part in (parts[False], parts[True]))
    if min(len(train), len(validation)) < 4096:
        raise Unsupported(
            f"{len(train)} bytes to train on and {len(validation)} to validate with were found below "
            f"{', '.join(map(str, roots))}; at least 4096 of each are needed."
        )
    digest = hashlib.sha256(train + validation).hexdigest()
    return Corpus(_tensor(train), _tensor(validation), digest)


def batch(part: Tensor, size: int, context: int, random: torch.Generator) -> Tensor:
    """``size`` pieces at random places: int64 [size, context + 1], on the device of ``part``.

    Raises:
        Unsupported: the text is not longer than a piece.
    """
    if context >= len(part):
        raise Unsupported(f"a context of {context} bytes is longer than the text, which has {len(part)}; shorten it.")
    starts = torch.randint(len(part) - context, (size, 1), generator=random)
    places = starts + torch.arange(context + 1)
    return part[places.to(part.device, non_blocking=True)].long()


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
