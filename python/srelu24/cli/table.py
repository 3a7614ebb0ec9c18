"""A table for the terminal that never breaks a word."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions
from rich.text import Text

GAP = 2
"""Blanks between columns."""
UNDER_HEADING = 2
"""Blanks before a row, where the table has headings."""
DETAIL = 4
"""Blanks before a detail, more than before its row."""

Cell = str | Text
"""A text, or one with a style of its own."""


@dataclass
class Table:
    """Rows of short cells; what is long stands in lines of its own, as wide as the table.

    A cell is wrapped at blanks where the table would be wider than the terminal. A line grows beyond the terminal
    rather than break a word, such as a path.

    Args:
        title: the line above the table.
        columns: the names of the columns.
        right: the numbers of the columns that hold numbers.
    """

    title: str
    columns: Sequence[str]
    right: Iterable[int] = ()
    _lines: list[str | _Row] = field(default_factory=list, init=False)

    def add_heading(self, text: str) -> None:
        """A line that says what the rows below it are of, unless it says what the last heading says."""
        if text != next((line for line in reversed(self._lines) if isinstance(line, str)), None):
            self._lines.append(text)

    def add_row(self, *cells: Cell, details: Iterable[Cell] = ()) -> None:
        """A row, and the lines below it; empty details are left out."""
        row = _Row(
            tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells),
            tuple(line if isinstance(line, Text) else Text(line) for line in details if line),
        )
        if len(row.cells) != len(self.columns):
            raise ValueError(f"a row of {len(row.cells)} cells was given; the table has {len(self.columns)} columns")
        self._lines.append(row)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The texts of the cells of every row."""
        return [tuple(cell.plain for cell in line.cells) for line in self._lines if isinstance(line, _Row)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self.lines(options.max_width):
            line.no_wrap, line.overflow = True, "ignore"
            yield line

    def lines(self, width: int) -> list[Text]:
        """The table as lines of text for a terminal of that many columns."""
        indent = UNDER_HEADING if any(isinstance(line, str) for line in self._lines) else 0
        head = tuple(Text(name, style="bold") for name in self.columns)
        widths = self._widths(head, width - indent)
        found = [Text(text, style="italic") for text in _wrapped(self.title, width)]
        found += self._laid_out(head, widths, indent)
        found.append(Text(" " * indent + "─" * (sum(widths) + GAP * (len(widths) - 1)), style="dim"))
        for line in self._lines:
            if isinstance(line, str):
                found += [Text(text, style="bold") for text in _wrapped(line, width)]
                continue
            found += self._laid_out(line.cells, widths, indent)
            for detail in line.details:
                inner = indent + DETAIL
                found += [
                    Text(" " * inner + text, style=detail.style) for text in _wrapped(detail.plain, width - inner)
                ]
        return found

    def _widths(self, head: Sequence[Text], room: int) -> list[int]:
        """Of every column: as wide as its widest cell where there is room for all, else at least its longest word."""
        rows = [head, *(line.cells for line in self._lines if isinstance(line, _Row))]
        columns = [[row[number].plain for row in rows] for number in range(len(self.columns))]
        wanted = [max(map(len, column)) for column in columns]
        widths = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
        left = room - sum(widths) - GAP * (len(widths) - 1)
        by_need = sorted(range(len(widths)), key=lambda number: wanted[number] - widths[number])
        for place, number in enumerate(by_need):
            more = max(0, min(wanted[number] - widths[number], left // (len(by_need) - place)))
            widths[number] += more
            left -= more
        return widths

    def _laid_out(self, cells: Sequence[Text], widths: Sequence[int], indent: int) -> list[Text]:
        """A row as lines of text; cells of several words may take more than one."""
        columns = [_wrapped(cell.plain, width) for cell, width in zip(cells, widths, strict=True)]
        found = []
        for number in range(max(map(len, columns))):
            line = Text(" " * indent)
            for place, (cell, texts, width) in enumerate(zip(cells, columns, widths, strict=True)):
                text = texts[number] if number < len(texts) else ""
                line.append(" " * GAP if place else "")
                line.append(text.rjust(width) if place in tuple(self.right) else text.ljust(width), style=cell.style)
            line.rstrip()
            found.append(line)
        return found


@dataclass(frozen=True, slots=True)
class _Row:
    cells: tuple[Text, ...]
    details: tuple[Text, ...]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of whole words; a word that is longer than the width has a line of its own."""
    return textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False) or [""]
