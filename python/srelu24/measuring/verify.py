"""Is a kernel's output right? Run it, then hold it to the numerics contract (docs/numerics.md) with plain PyTorch.

A kernel sums in another order than the reference, so its fp32 accumulator may differ by a little noise before it is
rounded. The check therefore works with intervals: from the reference accumulator, plus and minus a bound on that noise,
follow the lowest and the highest value the contract allows in storage precision. Rounding, relu and squaring are
monotone, so a right kernel lies inside, bit for bit; where the noise crosses no rounding boundary the interval is a
single value. NaN lies in no interval and passes only where the reference is NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from srelu24.measuring import verify_fp8
from srelu24.measuring.workload import poison
from srelu24.numerics import reference
from srelu24.numerics.activations import rule_of
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands
from srelu24_gen.errors import Unsupported
from srelu24_gen.space import trains
from srelu24_gen.spec import Activation, KernelConfig, KernelSpec, Op, Problem

ZERO_GROUP = 0x4
"""Nibble of a group without non-zeros: positions 0 and 1."""
BLOCK_ROWS = 64
BLOCK_COLUMNS = 256
"""What one block of fragment-order metadata covers."""
MMA_K = 16
"""K of the smallest MMA: the sum is rounded once per MMA."""
CHUNK_ELEMENTS = 1 << 25
"""Output elements checked at a time: bounds the memory of a check to about 2 GB."""


@dataclass(frozen=True, slots=True)
class Check:
    """Verdict on one output."""

    ok: bool
    max_error: float
    """Largest |output - reference| in units of the output; infinite where one of the two is not a number."""
    detail: str
    """What was compared, or the first thing that is wrong and where."""


def verify(problem: Problem, config: KernelConfig, operands: Operands, arch: str = "sm_90a") -> Check:
    """Poison the outputs, run the kernel once, and compare all it wrote with an independent reference.

    Args:
        problem: sizes that fit the operands.
        config: the configuration to run.
        operands: inputs and outputs on one CUDA device; the outputs are overwritten.
        arch: what to build for.

    Raises:
        CompileError, LaunchError, Unsupported: the kernel could not be built or started; a kernel that ran and is
            wrong is a Check that is not ok.
    """
    poison(operands.out)
    if operands.counts is not None:
        operands.counts.zero_()  # kernels add to it
    launch.run(KernelSpec(problem.family, config, arch), operands)
    return check(problem, operands)


def small(problem: Problem) -> Problem:
    """A problem of the same family that exercises the same paths of a kernel in milliseconds.

    Several waves of any tile, one of them short; M ends inside a tile; N and K end where the real ones do, counted from
    a multiple of 256 (a vector of metadata, four k-blocks).
    """
    family = problem.family
    # Inside a warpgroup too, but not where rows are features along tokens; in training they come in blocks of 16.
    ragged = 192 if family.op is Op.SPGEMM_TOKENS else 80 if trains(family) else 72
    return Problem(
        family,
        min(problem.m, 2048 + ragged),
        min(problem.n, 4096 + problem.n % BLOCK_COLUMNS),
        min(problem.k, 512 + problem.k % BLOCK_COLUMNS),
    )


@torch.no_grad()
def check(problem: Problem, operands: Operands) -> Check:
    """Compare outputs that are already there with the contract. Works on any device."""
    op = problem.family.op
    with exact_float32():
        if problem.family.scaled:
            try:
                error = verify_fp8.largest_error(problem, operands)
            except verify_fp8.Wrong as wrong:
                return Check(False, float("inf"), str(wrong))
            return Check(True, error, f"{problem.m * problem.n} values within the bounds of 8-bit sums")
        if op is Op.SPARSIFY24:
            return _check_sparsify24(problem, operands)
        if op.prunes:
            return check_packed(problem, operands)
        return check_dense(problem, operands)


class Wrong(Exception):
    """The first thing found wrong, in words."""


@dataclass(slots=True)
class Findings:
    """Collects the worst error over row chunks and stops at the first violation."""

    what: str
    max_error: float = 0.0
    off: int = 0
    """Values that differ from the reference, though within the bound."""
    total: int = 0

    def compare(self, got: Tensor, low: Tensor, high: Tensor, exact: Tensor, row0: int) -> None:
        """``low <= got <= high`` everywhere, or NaN where ``exact`` is; all [rows, N] in storage precision."""
        both_nan = got.isnan() & exact.isnan()
        same = (got == exact) | both_nan  # also equal infinities, whose difference is not a number
        error = (got.float() - exact.float()).abs()
        error = error.masked_fill(error.isnan(), float("inf")).masked_fill(same, 0.0)
        self.max_error = max(self.max_error, float(error.max()) if error.numel() else 0.0)
        self.off += int((~same).sum())
        self.total += got.numel()
        self.require(
            both_nan | ((got >= low) & (got <= high)), row0, lambda i: f"{got[i]:.6g}, expected {exact[i]:.6g}"
        )

    def require(self, fine: Tensor, row0: int, describe: Callable[[tuple[int, int]], str]) -> None:
        """Stop at the first False of ``fine`` [rows, columns]."""
        bad = int((~fine).sum())
        if bad:
            row, column = (int(i) for i in (~fine).nonzero()[0])
            where = f"row {row0 + row}, column {column}: {describe((row, column))}"
            raise Wrong(f"{self.what}: {bad} wrong, the first at {where}")


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What the contract allows for a chunk of rows before the last step of the activation, in the storage type [R, N]:
    what pruning selects by magnitude."""

    low: Tensor
    exact: Tensor
    high: Tensor


def accumulators(problem: Problem, operands: Operands) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Reference accumulators in row chunks: first row, fp32 [R, N], and the bound on their noise [R, N].

    Roundings of partial sums either cancel or add up. Those that cancel: sqrt(K) of them at the magnitude that
    Cauchy-Schwarz bounds by |a_row| |b_row|. Those that add up, since tensor cores round towards zero: one for each of
    K/16 MMAs, at the magnitude of what the sum starts from (bias, residual) and ends with. All times 2^-22.
    """
    assert operands.b is not None
    b = operands.b.float()
    b_norm = b.norm(dim=1)
    rows = max(CHUNK_ELEMENTS // max(problem.n, problem.k, 1) // BLOCK_ROWS, 1) * BLOCK_ROWS
    for row0 in range(0, problem.m, rows):
        if isinstance(operands.a, Sparse24):
            a = unpack(operands.a, row0, min(row0 + rows, problem.m)).dense.float()
        else:
            a = operands.a[row0 : row0 + rows].float()
        acc = a @ b.T
        magnitude = acc.abs()
        for start in (operands.bias, None if operands.residual is None else operands.residual[row0 : row0 + rows]):
            if start is not None:
                acc += start.float()
                magnitude = magnitude + start.float().abs()
        noise = a.norm(dim=1)[:, None] * b_norm * max(problem.k, 1) ** 0.5 + magnitude * max(problem.k / MMA_K, 1.0)
        # Where an operand is not finite neither is the accumulator, in any order of summing.
        yield row0, acc, (noise * 2.0**-22).nan_to_num(nan=0.0, posinf=0.0)


def _bounds(acc: Tensor, noise: Tensor, dtype: torch.dtype, activation: Activation) -> _Bounds:
    select = rule_of(activation).select
    return _Bounds(*(select(x, dtype) for x in (acc - noise, acc, acc + noise)))


def check_dense(problem: Problem, operands: Operands) -> Check:
    """gemm and spgemm: out [M, N]."""
    out = operands.out
    if not isinstance(out, Tensor) or tuple(out.shape) != (problem.m, problem.n):
        raise Unsupported(f"{problem} has no dense output of [{problem.m}, {problem.n}] to check; allocate one")
    findings = Findings("output")
    activation = problem.family.activation
    try:
        for row0, acc, noise in accumulators(problem, operands):
            low, exact, high = _storage(_bounds(acc, noise, out.dtype, activation), activation)
            findings.compare(out[row0 : row0 + acc.shape[0]], low, high, exact, row0)
    except Wrong as wrong:
        return Check(False, findings.max_error, str(wrong))
    return passed(findings)


def _storage(bounds: _Bounds, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    finish = rule_of(activation).finish
    return finish(bounds.low), finish(bounds.exact), finish(bounds.high)


def check_packed(problem: Problem, operands: Operands) -> Check:
    """A GEMM that prunes: packed [M, N] and, where asked for, the non-zero counts [N]."""
    out = operands.out
    if not isinstance(out, Sparse24) or out.shape != (problem.m, problem.n):
        raise Unsupported(f"{problem} has no packed output of {problem.m}x{problem.n} to check; allocate one")
    findings, activation = Findings("kept value"), problem.family.activation
    fewest = torch.zeros(problem.n, dtype=torch.int64, device=out.device)
    most = fewest.clone()
    try:
        for row0, acc, noise in accumulators(problem, operands):
            packed = unpack(out, row0, row0 + acc.shape[0])
            bounds = _bounds(acc, noise, out.dtype, activation)
            _check_selection(packed, bounds, row0)
            low, exact, high = (t.gather(1, packed.columns) for t in _storage(bounds, activation))
            findings.compare(packed.values, low, high, exact, row0)
            fewest += (bounds.low != 0).sum(0)  # NaN != 0: it counts
            most += (bounds.high != 0).sum(0)
        if operands.counts is not None:
            counts = operands.counts[None].long()
            Findings("non-zero count").require(
                (counts >= fewest) & (counts <= most),
                0,
                lambda i: f"{counts[i]}, expected {fewest[i[1]]}..{most[i[1]]}",
            )
    except Wrong as wrong:
        return Check(False, findings.max_error, str(wrong))
    return passed(findings)


def _check_selection(packed: Unpacked, bounds: _Bounds, row0: int) -> None:
    """Nothing dropped certainly comes before something kept, in the order NaN > Inf > finite, lower index first."""
    low, high = (_groups(_order_key(t)) for t in (bounds.low, bounds.high))
    position = torch.arange(4, device=low.device)
    kept = torch.zeros_like(low, dtype=torch.bool).scatter_(2, packed.positions, True)
    fine = torch.ones(low.shape[:2], dtype=torch.bool, device=low.device)
    for d in range(4):
        before = torch.where(position > d, low[..., d : d + 1] >= high, low[..., d : d + 1] > high)
        fine &= kept[..., d] | ~(before & kept).any(-1)
    Findings("2:4 selection").require(
        fine,
        row0,
        lambda i: f"group keeps {packed.positions[i].tolist()} of {_groups(bounds.exact)[i].tolist()}",
    )


def _groups(x: Tensor) -> Tensor:
    """[R, F] as [R, F/4, 4]."""
    return x.reshape(x.shape[0], x.shape[1] // 4, 4)


def _order_key(x: Tensor) -> Tensor:
    """int32 that orders non-negative values as the contract does: finite < Inf < NaN, all NaNs alike."""
    return torch.where(x.isnan(), 0x7FC00000, x.float().view(torch.int32))


def _check_sparsify24(problem: Problem, operands: Operands) -> Check:
    """sparsify24: every bit of values and metadata as the reference has it."""
    out, a = operands.out, operands.a
    if not isinstance(out, Sparse24) or not isinstance(a, Tensor):
        raise Unsupported(f"{problem} takes a dense input and a packed output; give both to check it")
    findings = Findings("kept value")
    rows = max(CHUNK_ELEMENTS // max(problem.n, 1) // BLOCK_ROWS, 1) * BLOCK_ROWS
    try:
        for row0 in range(0, problem.m, rows):
            expected = reference.sparsify24(a[row0 : row0 + rows], problem.family.activation)
            blocks = slice(row0 // BLOCK_ROWS, row0 // BLOCK_ROWS + expected.metadata.shape[0])
            same = (out.metadata[blocks] == expected.metadata).flatten(1)
            Findings("metadata, row counting blocks of 64,").require(
                same, blocks.start, lambda _: "differs from the reference"
            )
            got, exact = out.values[row0 : row0 + rows], expected.values
            findings.compare(got, exact, exact, exact, row0)
            bits = got.contiguous().view(torch.int16) == exact.contiguous().view(torch.int16)
            if problem.family.activation is not Activation.NONE:
                bits |= exact.isnan()  # the contract leaves open which NaN comes out of an activation
            findings.require(bits, row0, lambda _: "has the wrong sign of zero or NaN payload")
    except Wrong as wrong:
        return Check(False, findings.max_error, str(wrong))
    return passed(findings)


def passed(findings: Findings) -> Check:
    return Check(
        True, findings.max_error, f"{findings.total} values, {findings.off} off by rounding, all within bounds"
    )


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A row chunk of a packed matrix, decoded here from the layout in docs/architecture.md, not by Sparse24."""

    values: Tensor
    """[R, F/2], as stored."""
    positions: Tensor
    """int64 [R, F/4, 2]: kept positions of each group, ascending."""
    width: int

    @property
    def columns(self) -> Tensor:
        """int64 [R, F/2]: the column each value belongs to."""
        groups = torch.arange(self.positions.shape[1], device=self.positions.device)
        return (self.positions + 4 * groups[:, None]).flatten(1)

    @property
    def dense(self) -> Tensor:
        """[R, F] with the dropped values zero."""
        return self.values.new_zeros(self.values.shape[0], self.width).scatter_(1, self.columns, self.values)


def unpack(s: Sparse24, row0: int, row1: int) -> Unpacked:
    """Decode rows row0 (a multiple of 64) to row1, checking every nibble of their blocks, padding included."""
    f = s.shape[1]
    found = nibbles(s.metadata[row0 // BLOCK_ROWS : -(-row1 // BLOCK_ROWS)])
    real = found[: row1 - row0, : f // 4]
    positions = torch.stack((real & 3, real >> 2), -1).long()
    Findings("metadata nibble").require(
        positions[..., 0] < positions[..., 1], row0, lambda i: f"group holds {real[i].item():#x}, an illegal pair"
    )
    padding = found == ZERO_GROUP
    padding[: row1 - row0, : f // 4] = True
    Findings("metadata padding").require(padding, row0, lambda i: f"holds {found[i].item():#x} instead of 0x4")
    return Unpacked(s.values[row0:row1], positions, f)


def nibbles(metadata: Tensor) -> Tensor:
    """E in fragment order, [blocks, vectors, 128, 4], by place: [64 blocks, 64 vectors], a nibble a group."""
    blocks, across = metadata.shape[0], metadata.shape[1]
    words = metadata.view(blocks, across, 4, 8, 4, 4)  # block row, block column, warp, g, t, word q
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF))  # rows g and g + 8 of the warp's 16
    shifts = torch.arange(0, 16, 4, device=words.device, dtype=torch.int32)
    found = (halves[..., None] >> shifts) & 0xF  # half, block row, block column, warp, g, t, q, group
    return found.permute(1, 3, 0, 4, 2, 6, 5, 7).reshape(blocks * BLOCK_ROWS, across * BLOCK_COLUMNS // 4)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 in the reference products, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
