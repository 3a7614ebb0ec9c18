"""What attackers and broken disks put in the place of bytes, values and whole files."""

from __future__ import annotations

import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    -64,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e300,
    "",
    "h200",
    "../../outside",
    "/etc/passwd",
    "..",
    "[red]x[/red]",
    "\x00",
    "a\nb",
    "ü\u202e",
    "9999-01-01T00:00:00Z",
    "sm_80",
    "x" * 5000,
    [],
    [1],
    {},
    {"a": {"b": {}}},
)
TEXTS = (b"", b"{", b"null", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**4, b"\x00" * 100)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, bytes replaced, cut, repeated, or something else altogether."""
    kind = draw.randrange(8)
    if not content or kind == 0:
        return draw.choice(TEXTS)
    place = draw.randrange(len(content))
    if kind == 1:
        return content[:place]
    if kind == 2:
        end = min(len(content), place + draw.randrange(1, 200))
        return content[:place] + content[end:]
    if kind == 3:
        return content[:place] + content[place : place + 50] + content[place:]
    if kind == 4:
        length = draw.randrange(1, 64)
        return content[:place] + draw.randbytes(length) + content[place + length :]
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def twisted(text: bytes, draw: random.Random) -> bytes:
    """JSON with other values, names or fields at one to three places."""
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _twist(value, draw)
    return json.dumps(value).encode()


def _twist(value: Any, draw: random.Random) -> Any:
    """Walks down until it stops by chance or at a leaf, and replaces what is there."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        if draw.random() < 0.08:
            return {other: each for other, each in value.items() if other != name}
        if draw.random() < 0.08:
            return {**value, draw.choice(("newer", "../x", "tile_q", "op")): draw.choice(VALUES)}
        return {**value, name: _twist(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        return [*value[:place], _twist(value[place], draw), *value[place + 1 :]]
    return draw.choice(VALUES)
