"""Tables from the rows of result files, as markdown; each is empty where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import geometric_mean
from typing import Any

from srelu24.bench.results import Candidate, Result, Row, of_op, of_recipes
from srelu24_gen.spec import PRUNED_ACTIVATIONS

PEERS = {
    "torch_compile": "torch.compile",
    "dense_fused": "our dense, fused",
    "unfused": "our sparse, unfused",
    "cusparselt": "cuSPARSELt",
    "eager": "eager",
}
"""Candidates of a whole FFN besides our own, in the order and with the names of tables and plots."""

_MOVERS = ("sparsify24", "quantize_rows", "square_rows")
_GEMMS = {**{op.value: "GEMM1, fused" for op in PRUNED_ACTIVATIONS}, "spgemm": "GEMM2, sparse", "gemm": "GEMM1, dense"}


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table without a final newline."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def ffn_table(results: list[Result]) -> str:
    """Our whole FFN, and its speed over every peer."""
    results = of_op(results, "ffn_forward")
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


def gemm_table(results: list[Result]) -> str:
    """Each GEMM alone, and its speed over those of others."""
    peers = {"gemm": "our dense GEMM", "cublas": "cuBLAS", "cusparselt": "cuSPARSELt"}
    if any("promoted" in r.row.candidates for r in results):
        peers["promoted"] = "promoted sums"
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

    return _tables([r for op in _GEMMS for r in of_op(results, op)], head, cells)


def memory_table(results: list[Result]) -> str:
    """The kernels that only move bytes, against a copy."""
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

    return _tables([r for op in _MOVERS for r in of_op(results, op)], head, cells)


def overhead_table(results: list[Result]) -> str:
    """Host time of a call on a small shape; the newest of every GPU."""
    newest: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: r.date):
        if isinstance(result.file.python_overhead_us, dict):
            newest[result.gpu] = result

    def cells(result: Result) -> list[str]:
        overhead = result.file.python_overhead_us
        by_name = overhead if isinstance(overhead, dict) else {}
        return [_number(by_name.get(name), ".0f") for name in ("srelu24", "eager")]

    return _tables(newest.values(), ["srelu24.ffn, host us per call", "eager PyTorch, host us per call"], cells)


def ratio_table(results: list[Result], *, op: str, other: str, ours: str) -> str:
    """Ours against one other, and over all shapes of a GPU the geometric mean and the worst."""
    results = [result for result in of_op(results, op) if other in result.row.speedup]
    texts = []
    for gpu in dict.fromkeys(result.gpu for result in results):
        of_gpu = [result for result in results if result.gpu == gpu]
        ratios = [(result.row.speedup[other], result.row.shape) for result in of_gpu]
        worst, where = min(ratios)
        mean = geometric_mean(ratio for ratio, _ in ratios)
        texts.append(f"{gpu}, {len(ratios)} shapes: geometric mean {mean:.3f}x, worst {worst:.3f}x ({where}).\n")

    def cells(result: Result) -> list[str]:
        row = result.row
        times = [_number(row.candidates[name].ms, ".3f") for name in ("srelu24", other)]
        return [*_case_cells(row), *times, _number(row.speedup[other], ".3f", "x")]

    head = ["dtype", "MxDxF", "density", f"{ours}, ms", f"{other}, ms", f"over {other}"]
    table = _tables(results, head, cells)
    return "\n".join([*texts, table]) if table else ""


def search_table(results: list[Result]) -> str:
    """How long tuning takes on the clock, and what it finds."""

    def cells(result: Result) -> list[str]:
        row = result.row
        searches = [row.candidates[name] for name in _SEARCHES]
        times = [_number(search.ms and search.ms / 1000, ".0f", " s") for search in searches]
        found = [_number(row.speedup[name], ".3f", "x") for name in _SEARCHES]
        tried = [str(search.samples) for search in searches]
        what = "training step" if row.op == "search_step" else "FFN"
        return [what, row.dtype, row.shape, *(text for each in zip(times, tried, found, strict=True) for text in each)]

    head = [
        "what",
        "dtype",
        "MxDxF",
        "from nothing",
        "candidates",
        "over default",
        "warm",
        "candidates",
        "over default",
    ]
    return _tables([*of_op(results, "search"), *of_op(results, "search_step")], head, cells)


_SEARCHES = ("from_nothing", "warm")


def sweep_table(results: list[Result]) -> str:
    """Sparse, dense and chosen over numbers of tokens, and their plot."""

    def cells(result: Result) -> list[str]:
        row = result.row
        chosen = row.candidates["srelu24"]
        ratios = [_number(over_compile(row, name), ".2f", "x") for name in ("sparse", "dense", "srelu24")]
        return [*_case_cells(row), _number(chosen.ms, ".3f"), *ratios, str(chosen.note)]

    head = ["dtype", "MxDxF", "density", "ms", "sparse", "dense, the best way", "chosen", "which is"]
    table = _tables(of_op(results, "sweep"), head, cells)
    figure = "![sparse, dense and chosen over numbers of tokens](results/sweep.svg)"
    return f"Times as fast as torch.compile's dense FFN:\n\n{table}\n{figure}\n" if table else ""


_NO_DENSE_WAY = ("srelu24", "sparse", "torch_compile")


def over_compile(row: Row, name: str) -> float | None:
    """Speed of a candidate of a sweep over torch.compile's; "dense" is the fastest of the dense ways."""
    names = [n for n in row.candidates if n not in _NO_DENSE_WAY] if name == "dense" else [name]
    times = [ms for n in names if (ms := row.candidates[n].ms) is not None]
    compiled = row.candidates["torch_compile"].ms
    return compiled / min(times) if times and compiled else None


def recipes_figure(results: list[Result]) -> str:
    """The plot of where the time of 8-bit FFNs goes (:func:`srelu24.documents.plots.plot_recipes`)."""
    return "![time of the parts of an 8-bit FFN](results/fp8.svg)\n" if of_recipes(results) else ""


def model_table(results: list[Result]) -> str:
    """Prefill of a decoder stack, dense against converted."""
    head = ["stack", "mode", "dtype", "tokens", "density", "dense, tokens/s", "srelu24, tokens/s", "faster"]
    head += ["dense, peak GB", "srelu24, peak GB", "graphs"]

    def cells(result: Result) -> list[str]:
        row, model = result.row, result.file.env.get("model", {})
        dense, ours = row.candidates["dense"], row.candidates["srelu24"]
        return [
            f"{model.get('name')}, {model.get('layers')} layers",
            row.op.removeprefix("prefill_"),
            row.dtype,
            row.shape.split("x")[0],
            f"{row.density:.0%}",
            *(_number(c.tokens_per_s or None, ".0f") for c in (dense, ours)),
            _number(row.speedup.get("dense"), ".2f", "x"),
            *(_number(c.peak_bytes / 1e9 if c.peak_bytes else None, ".1f") for c in (dense, ours)),
            _number(ours.graphs or None, "d"),
        ]

    return _tables([r for mode in ("eager", "compiled") for r in of_op(results, f"prefill_{mode}")], head, cells)


def step_table(results: list[Result]) -> str:
    """Forward and backward of our FFN, and its speed over every peer."""
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

    return _tables(of_op(results, "ffn_step"), head, cells)


def step_parts_table(results: list[Result]) -> str:
    """The kernels of a training step, and its overheads."""

    def cells(result: Result) -> list[str]:
        row, ours = result.row, result.row.candidates["srelu24"]
        speed = _number(row.speedup.get("cublas"), ".2f", "x")
        name = row.op.removeprefix("step_").replace("_", " ")
        return [name, *_case_cells(row), _number(ours.ms, ".3f"), _number(ours.tflops, ".0f"), speed]

    parts = [result for result in results if result.row.op.startswith("step_")]
    return _tables(parts, ["part", "dtype", "MxDxF", "density", "ms", "TFLOP/s", "over cuBLAS"], cells)


def split_table(results: list[Result]) -> str:
    """The weight gradient whose dense features are split off."""

    def cells(result: Result) -> list[str]:
        row, ours = result.row, result.row.candidates["srelu24"]
        return [row.dtype, row.shape, f"{row.density:.0%}", _number(ours.ms, ".3f"), _number(ours.tflops, ".0f")]

    return _tables(of_op(results, "split_gemm"), ["dtype", "MxDxF", "sparse share", "ms", "TFLOP/s"], cells)


def cutlass_table(results: list[Result]) -> str:
    """Our portable sparse GEMM against CUTLASS's of the same tile."""
    found = [r for r in results if "cutlass" in r.row.candidates]
    head = ["tile and stages", "dtype", "MxDxF", "density", "ms", "TFLOP/s", "over CUTLASS"]

    def cells(result: Result) -> list[str]:
        row, ours = result.row, result.row.candidates["srelu24"]
        return [
            row.op.removeprefix("spgemm_sm80_"),
            *_case_cells(row),
            _number(ours.ms, ".3f"),
            _number(ours.tflops, ".0f"),
            _number(row.speedup.get("cutlass"), ".3f", "x"),
        ]

    return _tables(found, head, cells)


def _case_cells(row: Row) -> list[str]:
    return [
        f"{row.dtype} {row.recipe}" if row.recipe else row.dtype,
        row.shape,
        "zeros" if row.zeros is True else f"{row.density:.0%}",
    ]


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
        table = markdown_table(head, [cells(result) for result in run])
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
