"""Fills pages with tables, so that no measured figure in a document is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from srelu24 import whole_file
from srelu24_gen import untrusted
from srelu24_gen.errors import RecordError

NOTHING = "Not measured yet.\n"
"""What a page says in the place of an empty table."""
_MARKED = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- /results -->)", re.DOTALL)


def fill(page: Path, tables: Mapping[str, str]) -> bool:
    """Write tables between their markers ``<!-- results:NAME -->`` and ``<!-- /results -->``; nothing else changes.

    Args:
        tables: markdown by name (:mod:`srelu24.documents.registry`); those without a marker are left out.

    Returns:
        Whether the page changed.

    Raises:
        RecordError: a marker names a table that is not given; the page stays as it is.
    """

    def table(section: re.Match[str]) -> str:
        name = section["name"]
        if name not in tables:
            raise RecordError(f"{page.name} asks for results:{name}; there are {', '.join(tables)}")
        return f"{section[1]}{tables[name] or NOTHING}{section[4]}"

    try:
        before = str(untrusted.read(page), "utf-8")
        after = _MARKED.sub(table, before)
        if after != before:
            whole_file.write(page, after.encode())
    except (OSError, UnicodeError) as error:
        raise RecordError(f"the page {page} cannot be filled ({error}); give a text file") from error
    return after != before
