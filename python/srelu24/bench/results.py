"""Result files: what a benchmark measured, as JSON, and all that a folder of them holds.

``docs/results/<gpu>/<name>.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec import UNSET, Struct, UnsetType

from srelu24 import whole_file
from srelu24_gen import untrusted
from srelu24_gen.errors import RecordError

SCHEMA = 1


class ResultFile(Struct, kw_only=True):
    """What every result file has."""

    schema: int = SCHEMA
    env: dict[str, Any]
    """Of :func:`srelu24.measuring.machine.environment`."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises RecordError where the file cannot be read or is not of this kind and schema."""
        try:
            file = untrusted.decode(untrusted.read(path), cls)
        except (OSError, untrusted.Undecodable) as error:
            raise RecordError(f"{path} is no {cls.__name__} ({error}); measure again or name another file") from error
        if file.schema != SCHEMA:
            raise RecordError(f"{path} has schema {file.schema} and {SCHEMA} is needed; measure again or remove it")
        return file

    def save(self, path: Path) -> None:
        """Replaces the file at once. Raises RecordError where it cannot be written."""
        with _writing(path):
            whole_file.write(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


def check_writable(path: Path | None) -> None:
    """Raises RecordError before anything is measured where :meth:`ResultFile.save` could not write afterwards."""
    if path is not None:
        with _writing(path):
            whole_file.check_writable(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(f"{path} cannot be written ({error.strerror}); choose another path") from error


class Candidate(Struct, kw_only=True):
    """One candidate of a row; None where it could not be read or the candidate failed."""

    ms: float | None
    """Median per call."""
    tflops: float | None
    """Dense-equivalent: 2 M D F per GEMM. None for what does no arithmetic worth counting."""
    joules: float | None
    """Per call, of the whole GPU."""
    sm_mhz: float | None
    watts: float | None
    samples: int
    """Rounds that the medians are over."""
    gbps: float | UnsetType = UNSET
    """GB/s, every input read once and every output written once; for what only moves bytes."""
    utilisation: float | UnsetType = UNSET
    """Share of the tensor cores' rate at the clock it was measured at; for a GEMM alone."""
    tokens_per_s: float | UnsetType = UNSET
    """For a whole model."""
    peak_bytes: int | UnsetType = UNSET
    """Most GPU memory allocated during a call, weights included; for a whole model."""
    graphs: int | UnsetType = UNSET
    """Graphs that torch.compile made for all token counts of the run; 1 is no recompilation."""
    saved_bytes: int | UnsetType = UNSET
    """What a forward pass keeps for its backward pass besides its inputs."""
    throttled: bool | UnsetType = UNSET
    """True where heat or a power brake slowed the GPU: measure again."""
    note: str | UnsetType = UNSET
    error: str | UnsetType = UNSET
    """Why there are no numbers."""


class Row(Struct, kw_only=True):
    """One comparison on the same data in the same run."""

    op: str
    dtype: str
    shape: str
    """MxDxF of the FFN, also for a single kernel."""
    density: float
    """Asked for, before pruning."""
    zeros: bool | UnsetType = UNSET
    """True where all inputs are zero."""
    recipe: str | None = None
    activation: str | UnsetType = UNSET
    """Where it is another one than relu2."""
    candidates: dict[str, Candidate]
    speedup: dict[str, float]
    """Time of a peer over the time of ``srelu24``: the median of interleaved pairs."""
    speed_of_light: float | None = None
    """Achieved share of it: both GEMMs at the best dense and the best sparse rate of this case, over our time."""
    measured_density: float | UnsetType = UNSET


class BenchFile(ResultFile, kw_only=True):
    """The file of a benchmark."""

    rows: list[Row]
    python_overhead_us: dict[str, float] | UnsetType = UNSET
    """Host time per eager FFN call on a small shape, by candidate."""


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

    Those named ``training_*`` hold training runs and have tables of their own (:mod:`srelu24.documents.ablation`).

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
            what = (*result.case, row.op, row.recipe, row.activation or "relu2")
            known = newest.get(what)
            if known is None or known.date <= result.date:
                newest[what] = result
    return sorted(newest.values(), key=lambda result: result.case)


def of_op(results: Iterable[Result], op: str) -> list[Result]:
    """Those of one op, in their order."""
    return [result for result in results if result.row.op == op]


def of_recipes(results: Iterable[Result]) -> list[Result]:
    """The 8-bit FFNs that were timed beside the dense one."""
    return [r for r in of_op(results, "ffn_forward") if r.row.recipe is not None and "torch_compile" in r.row.speedup]
