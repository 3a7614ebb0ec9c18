"""Tables and plots from result files, so that no figure in a document is ever typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srelu24.results import BenchFile, Candidate, Row
from srelu24_gen.errors import RecordError, Srelu24Error

PEERS = {
    "torch_compile": "torch.compile",
    "dense_fused": "our dense, fused",
    "unfused": "our sparse, unfused",
    "cusparselt": "cuSPARSELt",
    "eager": "eager",
}
"""Candidates of a whole FFN besides our own, in the order and with the names of tables and plots."""

_MARKED = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- /results -->)", re.DOTALL)
_GEMMS = {"gemm_relu2_24": "GEMM1, fused", "spgemm": "GEMM2, sparse", "gemm": "GEMM1, dense"}


@dataclass(frozen=True, slots=True)
class Result:
    """A row and the run it comes from."""

    row: Row
    file: BenchFile

    @property
    def gpu(self) -> str:
        return str(self.file.env.get("gpu"))

    @property
    def date(self) -> str:
        return str(self.file.env.get("date"))

    @property
    def case(self) -> tuple[str, str, float, tuple[int, ...]]:
        """GPU, type, density and shape: the order of tables."""
        return self.gpu, self.row.dtype, self.row.density, tuple(int(size) for size in self.row.shape.split("x"))


def load_results(results_dir: Path) -> list[Result]:
    """All rows of all ``*.json`` under a folder, in the order of tables; of one case and op only the newest.

    Those named ``training_*`` hold training runs and have tables of their own (:mod:`srelu24.ablation.report`).

    Raises:
        RecordError: a file is no result file.
    """
    newest: dict[tuple[object, ...], Result] = {}
    for path in sorted(results_dir.rglob("*.json")):
        if path.name.startswith("training_"):
            continue
        file = BenchFile.load(path)
        for row in file.rows:
            result = Result(row, file)
            known = newest.get((*result.case, row.op))
            if known is None or known.date <= result.date:
                newest[*result.case, row.op] = result
    return sorted(newest.values(), key=lambda result: result.case)


def tables(results_dir: Path) -> dict[str, str]:
    """Markdown by name: ``ffn``, ``gemm``, ``memory``, ``overhead``; of training ``step``, ``step_parts``, ``split``.

    Empty where nothing was measured.

    Raises:
        RecordError: a file is no result file.
    """
    results = load_results(results_dir)
    makers: dict[str, Callable[[list[Result]], str]] = {
        "ffn": _ffn_table,
        "gemm": _gemm_table,
        "memory": _memory_table,
        "overhead": _overhead_table,
        "step": _step_table,
        "step_parts": _step_parts_table,
        "split": _split_table,
    }
    return {name: make(results) for name, make in makers.items()}


def update_readme(readme: Path, results_dir: Path) -> bool:
    """Fills what lies between ``<!-- results:NAME -->`` and ``<!-- /results -->``; True if that changed the file.

    Raises:
        RecordError: a marker asks for a table that does not exist, or a file is no result file.
    """
    before = readme.read_text(encoding="utf-8")
    after = filled(before, tables(results_dir), readme.name)
    if after != before:
        readme.write_text(after, encoding="utf-8")
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
        return f"{section[1]}{by_name[name]}{section[4]}"

    return _MARKED.sub(fill, text)


def plot(results_dir: Path, out_svg: Path) -> None:
    """Bars of the FFN's speed-up over each peer, one panel per GPU, type and density.

    Raises:
        RecordError: there is nothing to plot, or a file is no result file.
        Srelu24Error: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Srelu24Error("plots need matplotlib; install it with pip install 'srelu24[bench]'") from error
    panels: dict[tuple[str, str, float], list[Row]] = {}
    for result in _of_op(load_results(results_dir), "ffn_forward"):
        if result.row.speedup:
            panels.setdefault((result.gpu, result.row.dtype, result.row.density), []).append(result.row)
    if not panels:
        raise RecordError(f"{results_dir} has no FFN results to plot; run `srelu24 bench ffn` first")
    # A fixed salt and no date: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "srelu24", "font.size": 9}):
        figure = Figure(figsize=(10, 3.2 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, ((gpu, dtype, density), rows) in zip(axes, panels.items(), strict=True):
            _bars(axis, rows)
            axis.set_title(f"FFN forward on {gpu}, {dtype}, {density:.0%} non-zero activations")
        out_svg.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_svg, format="svg", metadata={"Date": None})


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    peers = [peer for peer in PEERS if any(peer in row.speedup for row in rows)]
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        places = [place for place, row in enumerate(rows) if peer in row.speedup]
        bars = axis.bar(
            [place + (index - (len(peers) - 1) / 2) * width for place in places],
            [rows[place].speedup[peer] for place in places],
            width,
            label=f"over {PEERS[peer]}",
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [row.shape for row in rows])
    axis.set_ylabel("times faster")
    axis.margins(y=0.12)
    axis.legend(fontsize=7, ncols=len(peers), loc="lower center")


def _ffn_table(results: list[Result]) -> str:
    results = _of_op(results, "ffn_forward")
    peers = [peer for peer in PEERS if any(peer in r.row.candidates for r in results)]
    head = ["dtype", "MxDxF", "density", "ms", "TFLOP/s", "J", *(f"over {PEERS[peer]}" for peer in peers), "of light"]

    def cells(result: Result) -> list[str]:
        row, ours = result.row, result.row.candidates["srelu24"]
        return [
            *_case_cells(row),
            _number(ours.ms, ".3f"),
            _number(ours.tflops, ".0f"),
            _number(ours.joules, ".2f"),
            *(_number(row.speedup.get(peer), ".2f", "x") for peer in peers),
            _number(row.speed_of_light, ".0%"),
        ]

    return _tables(results, head, cells)


def _gemm_table(results: list[Result]) -> str:
    peers = {"gemm": "our dense GEMM", "cublas": "cuBLAS", "cusparselt": "cuSPARSELt"}
    head = ["kernel", "dtype", "MxDxF", "density", "ms", "TFLOP/s", "J", "MHz", "of the tensor cores"]
    head += [f"over {name}" for name in peers.values()]

    def cells(result: Result) -> list[str]:
        row, ours = result.row, result.row.candidates["srelu24"]
        return [
            _GEMMS[row.op],
            *_case_cells(row),
            _number(ours.ms, ".3f"),
            _number(ours.tflops, ".0f"),
            _number(ours.joules, ".2f"),
            _number(ours.sm_mhz, ".0f"),
            _number(ours.utilisation if isinstance(ours.utilisation, float) else None, ".0%"),
            *(_number(row.speedup.get(peer), ".3f", "x") for peer in peers),
        ]

    return _tables([r for op in _GEMMS for r in _of_op(results, op)], head, cells)


def _memory_table(results: list[Result]) -> str:
    head = ["kernel", "dtype", "MxDxF", "density", "ms", "GB/s", "of a copy's GB/s"]

    def cells(result: Result) -> list[str]:
        row = result.row
        ours, copy = _gbps(row.candidates["srelu24"]), _gbps(row.candidates.get("copy"))
        return [
            row.op,
            *_case_cells(row),
            _number(row.candidates["srelu24"].ms, ".3f"),
            _number(ours, ".0f"),
            _number(ours / copy if ours and copy else None, ".0%"),
        ]

    return _tables(_of_op(results, "sparsify24"), head, cells)


def _overhead_table(results: list[Result]) -> str:
    newest: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: r.date):
        if isinstance(result.file.python_overhead_us, dict):
            newest[result.gpu] = result

    def cells(result: Result) -> list[str]:
        overhead = result.file.python_overhead_us
        by_name = overhead if isinstance(overhead, dict) else {}
        return [_number(by_name.get(name), ".0f") for name in ("srelu24", "eager")]

    return _tables(newest.values(), ["srelu24.ffn, host us per call", "eager PyTorch, host us per call"], cells)


def _step_table(results: list[Result]) -> str:
    head = ["dtype", "MxDxF", "density", "ms", "TFLOP/s", "J", "over torch.compile", "over eager", "saved, of eager's"]

    def cells(result: Result) -> list[str]:
        row, ours, eager = result.row, result.row.candidates["srelu24"], result.row.candidates.get("eager")
        saved = [c.saved_bytes for c in (ours, eager) if c is not None and isinstance(c.saved_bytes, int)]
        return [
            *_case_cells(row),
            _number(ours.ms, ".3f"),
            _number(ours.tflops, ".0f"),
            _number(ours.joules, ".2f"),
            _number(row.speedup.get("torch_compile"), ".2f", "x"),
            _number(row.speedup.get("eager"), ".2f", "x"),
            _number(saved[0] / saved[1] if len(saved) == 2 and saved[1] else None, ".2f", "x"),
        ]

    return _tables(_of_op(results, "ffn_step"), head, cells)


def _step_parts_table(results: list[Result]) -> str:
    def cells(result: Result) -> list[str]:
        row, ours = result.row, result.row.candidates["srelu24"]
        speed = _number(row.speedup.get("cublas"), ".2f", "x")
        name = row.op.removeprefix("step_").replace("_", " ")
        return [name, *_case_cells(row), _number(ours.ms, ".3f"), _number(ours.tflops, ".0f"), speed]

    parts = [result for result in results if result.row.op.startswith("step_")]
    return _tables(parts, ["part", "dtype", "MxDxF", "density", "ms", "TFLOP/s", "over cuBLAS"], cells)


def _split_table(results: list[Result]) -> str:
    def cells(result: Result) -> list[str]:
        row, ours = result.row, result.row.candidates["srelu24"]
        return [row.dtype, row.shape, f"{row.density:.0%}", _number(ours.ms, ".3f"), _number(ours.tflops, ".0f")]

    return _tables(_of_op(results, "split_gemm"), ["dtype", "MxDxF", "sparse share", "ms", "TFLOP/s"], cells)


def _of_op(results: Iterable[Result], op: str) -> list[Result]:
    return [result for result in results if result.row.op == op]


def _case_cells(row: Row) -> list[str]:
    return [row.dtype, row.shape, "zeros" if row.zeros is True else f"{row.density:.0%}"]


def _gbps(candidate: Candidate | None) -> float | None:
    return candidate.gbps if candidate is not None and isinstance(candidate.gbps, float) else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _tables(results: Iterable[Result], head: list[str], cells: Callable[[Result], list[str]]) -> str:
    """One table per run, under a line that says what it was measured with; empty without results."""
    by_run: dict[int, list[Result]] = {}
    for result in results:
        by_run.setdefault(id(result.file), []).append(result)
    texts = []
    for run in by_run.values():
        lines = [head, ["---"] * len(head), *(cells(result) for result in run)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        texts.append("\n\n".join([_measured_with(run[0].file.env), table, *_failures(run)]) + "\n")
    return "\n".join(texts)


def _failures(run: list[Result]) -> list[str]:
    """Why numbers are missing, one line per candidate without them."""
    lines = [
        f"- {result.row.op} {result.row.shape}, {result.row.density:.0%}: {name} has no time: {candidate.error}"
        for result in run
        for name, candidate in result.row.candidates.items()
        if isinstance(candidate.error, str)
    ]
    return ["\n".join(lines)] if lines else []


def _measured_with(env: dict[str, Any]) -> str:
    limit, commit = env.get("power_limit_watts"), env.get("commit")
    facts = [
        str(env.get("gpu")),
        f"{limit:.0f} W" if limit else None,
        *(f"{label} {env[key]}" for key, label in _VERSIONS.items() if env.get(key)),
        f"commit {str(commit)[:10]}{' with local changes' if env.get('dirty') else ''}" if commit else None,
        str(env.get("date"))[:10],
    ]
    return ", ".join(fact for fact in facts if fact) + ":"


_VERSIONS = {"driver": "driver", "cuda": "CUDA", "torch": "PyTorch", "cutlass": "CUTLASS", "srelu24": "srelu24"}
