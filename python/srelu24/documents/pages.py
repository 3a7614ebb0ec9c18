"""Fills pages with tables from result files, so that no figure in a document is ever typed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from srelu24 import whole_file
from srelu24.bench.results import Result, load_results, of_recipes
from srelu24.documents import tables as report_tables
from srelu24_gen import untrusted
from srelu24_gen.errors import RecordError

NOTHING = "Not measured yet.\n"
"""What a page says in the place of an empty table."""
_MARKED = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- /results -->)", re.DOTALL)


def tables(results_dir: Path) -> dict[str, str]:
    """Markdown by name: ``ffn``, ``gemm``, ``memory``, ``overhead``, ``tuning``, ``fallback``, ``search``, ``sweep``,
    ``model``, ``cutlass``; ``fp8_ffn``, ``fp8_gemm``, ``fp8_memory``, ``fp8_figure`` of the 8-bit kernels; ``step``,
    ``step_parts``, ``split``, ``tuning_step``, ``fallback_step`` of training.

    Empty where nothing was measured.

    Raises:
        RecordError: a file is no result file.
    """
    results = load_results(results_dir)
    makers: dict[str, Callable[[list[Result]], str]] = {
        "ffn": report_tables.ffn_table,
        "gemm": report_tables.gemm_table,
        "memory": report_tables.memory_table,
        "overhead": report_tables.overhead_table,
        "step": report_tables.step_table,
        "step_parts": report_tables.step_parts_table,
        "split": report_tables.split_table,
        "tuning": lambda found: report_tables.ratio_table(found, "tuning", "default", "tuned"),
        "fallback": lambda found: report_tables.ratio_table(found, "fallback", "tuned", "without a record"),
        "tuning_step": lambda found: report_tables.ratio_table(found, "tuning_step", "default", "tuned"),
        "fallback_step": lambda found: report_tables.ratio_table(found, "fallback_step", "tuned", "without a record"),
        "search": report_tables.search_table,
        "sweep": report_tables.sweep_table,
        "model": report_tables.model_table,
        "cutlass": report_tables.cutlass_table,
    }
    narrow_figure = "![time of the parts of an 8-bit FFN](results/fp8.svg)\n" if of_recipes(results) else ""
    wide, narrow = ([r for r in results if r.row.dtype.startswith("fp8") == fp8] for fp8 in (False, True))
    return (
        {name: make(wide) for name, make in makers.items()}
        | {f"fp8_{name}": makers[name](narrow) for name in ("ffn", "gemm", "memory")}
        | {"fp8_figure": narrow_figure}
    )


def update_page(page: Path, results_dir: Path) -> bool:
    """Fills what lies between ``<!-- results:NAME -->`` and ``<!-- /results -->``; True if that changed the file.

    Raises:
        RecordError: a marker asks for a table that does not exist, or a file is no result file.
    """
    return refill(page, tables(results_dir))


def refill(page: Path, by_name: dict[str, str]) -> bool:
    """Fills the marked sections of a file with these tables; True if that changed it.

    Raises:
        RecordError: a marker asks for a table that does not exist, or the page cannot be read or written.
    """
    try:
        before = str(untrusted.read(page), "utf-8")
        after = filled(before, by_name, page.name)
        if after != before:
            whole_file.write(page, after.encode())
    except (OSError, UnicodeError) as error:
        raise RecordError(f"the page {page} cannot be filled ({error}); give a text file") from error
    return after != before


def filled(text: str, by_name: dict[str, str], where: str = "the text") -> str:
    """``text`` with every marked section replaced by its table; nothing else changes.

    Raises:
        RecordError: a marker asks for a table that does not exist.
    """

    def fill(section: re.Match[str]) -> str:
        name = section["name"]
        if name not in by_name:
            raise RecordError(f"{where} asks for results:{name}; there are {', '.join(by_name)}")
        return f"{section[1]}{by_name[name] or NOTHING}{section[4]}"

    return _MARKED.sub(fill, text)
