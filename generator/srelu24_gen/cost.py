"""An analytic model of a GEMM's time: ranks configurations before anything is timed, and explains a ranking.

A kernel takes as long as the slowest of three things, plus what no load can hide:

- *steps*: k-blocks that the busiest cluster works through, one after the other. Whole waves of tiles count whole, a
  short last wave too; stream-K spreads it, and then sums up the parts of a tile one after the other. A step lasts as
  long as its MMAs, as its bytes need from L2, which one multiprocessor alone gets faster than all together, or as a
  load that was issued ``stages`` - 1 k-blocks ahead takes to arrive. A producer thread holds up its warpgroup's MMAs in
  every step, and needs a while for each.
- *memory*: bytes from DRAM. A band of ``raster_group`` cluster tiles stays in L2 while B streams past, so B is read
  once per band, and A once, as long as the band fits. Where all tiles are split along K, their clusters do not share B.
- *energy*: what the MMAs, reading L2, writing shared memory and DRAM cost, over the power limit. This is what bounds a
  large GEMM on real data. Multicast saves reads of L2, no writes.

The constants are fitted to the trials in ``docs/measurements/trials_h200.json`` and the shipped records, to which the
tests hold it: of what was tried for a problem, the configuration that it ranks first is 0.6 % behind the fastest in the
mean, and where that takes 100 us never 5 %; times are right to 9 %, root mean square. Rank with it; do not quote it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from srelu24_gen import space
from srelu24_gen.bindings import PACKING_OPS, SPARSE_OPS, footprint
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import (
    PRUNED_ACTIVATIONS,
    DType,
    Instructions,
    KernelConfig,
    Op,
    Problem,
    Producer,
    instructions_of,
)
from srelu24_gen.target import GpuTarget
from srelu24_gen.work_plan import WorkPlan, plan_work

FITTED = Instructions.WGMMA
"""The kernel family whose times the constants are fitted to. For another the model still ranks configurations, but what
it says of sparse against dense is worth nothing."""
LEAST_WIDTH = 768
"""Of D and F in the trials. Narrower layers gain nothing by this model, since nothing holds it to the truth there."""
FORWARD_GEMMS = (Op.GEMM, *PRUNED_ACTIVATIONS, Op.SPGEMM)
"""What the constants are fitted for."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What the model knows of the kernels on a GPU, besides the limits of its target: as fitted to the H200."""

    clock_share: float = 1500 / 1980
    """Of the highest clock of a multiprocessor: what it runs at on real data."""
    latency_cycles: float = 1700.0
    """From the issue of a load to its arrival under load."""
    stall_dense: float = 0.053
    """Of a step's MMAs: what it loses to loads that a producer thread issues between two groups of them..."""
    stall_sparse: float = 0.087
    """...and of sparse MMAs."""
    thread_step_cycles: float = 560.0
    """The shortest step of a producer thread, which takes part in the MMAs: small tiles wait for it."""
    l2_alone: float = 130.0
    """Bytes a clock that L2 gives one SM where it is the only one..."""
    l2_together: float = 42.0
    """...and where all of them read."""
    l2_share: float = 0.6
    """Of L2 that a band can hold on to while B and the output stream past."""
    read_again: float = 0.8
    """Of B by every further cluster of a band, where all tiles are split along K and B does not stay in L2: at a time,
    they are at different places of K."""
    dram_share: float = 0.81
    """Of the peak bandwidth that a kernel reaches."""
    pj_dense: float = 0.628
    """Picojoules of a dense-equivalent 16-bit operation (half in 8 bits)..."""
    pj_sparse: float = 0.356
    """...of the same by a sparse MMA..."""
    pj_l2: float = 3.9
    """...of a byte read from L2..."""
    pj_shared: float = 15.0
    """...written to shared memory (a multicast is read once and written by every CTA)..."""
    pj_dram: float = 12.0
    """...and moved to or from DRAM."""
    static_watts: float = 130.0
    fixed_us: float = 3.6
    """Launch, the first load, the last epilogue."""
    split_us: float = 8.8
    """More where tiles of up to 128 rows are split along K: waiting for one another..."""
    split_tall_us: float = 14.0
    """...and where taller ones are."""
    sums_gbps: float = 240.0
    """At which one SM adds the partial sums of a split tile, of all its parts in turn."""


CONSTANTS: dict[str, Constants] = {"h200": Constants()}
"""By the key of a target; others get the H200's. ``srelu24 db fit`` fits them to the trials of a GPU."""


def constants_of(target: GpuTarget) -> Constants:
    """What is known of this GPU, or else of the H200."""
    return CONSTANTS.get(target.key, CONSTANTS["h200"])


@dataclass(frozen=True, slots=True)
class Cost:
    """A prediction, in microseconds."""

    us: float
    steps_us: float
    memory_us: float
    energy_us: float
    fixed_us: float
    occupancy: float
    """Work over the room for it until the busiest cluster is done: 1 where all finish together."""

    @property
    def bound(self) -> str:
        """What holds the kernel back."""
        parts = {"steps": self.steps_us, "memory": self.memory_us, "energy": self.energy_us}
        longest = max(parts, key=parts.__getitem__)
        return longest if parts[longest] > self.fixed_us else "launch"


@functools.lru_cache(maxsize=65536)
def cost(problem: Problem, config: KernelConfig, target: GpuTarget) -> Cost:
    """The model's answer for a configuration that ``space.supports()`` accepts. Pruning and biases count as free."""
    return predict(problem, config, target, constants_of(target))


def predict(problem: Problem, config: KernelConfig, target: GpuTarget, known: Constants) -> Cost:
    """:func:`cost` with given constants."""
    problem = dataclasses.replace(problem, m=max(problem.m, 1))
    family = problem.family
    bandwidth = known.dram_share * 1e9 * target.dram_gbps
    clock_hz = known.clock_share * 1e6 * target.clock_mhz
    bytes_a, bytes_b, bytes_out = _operand_bytes(problem)
    if not family.op.multiplies:
        memory = 1e6 * (bytes_a + bytes_out) / bandwidth
        return Cost(known.fixed_us + memory, 0.0, memory, 0.0, known.fixed_us, 1.0)
    c, sparse = config, family.op in SPARSE_OPS
    size = footprint(family, c)
    plan = plan_work(c, problem.m, problem.n, problem.k, target.sm_count)
    clusters = target.sm_count // c.cluster_m
    steps, parts = _steps(plan, clusters)

    width = family.dtype.bytes / 2  # 8-bit operands go twice as fast, for half the energy
    mma = width * 2 * c.tile_m * c.tile_n * c.tile_k / target.dense_flops_per_clock / (2 if sparse else 1)
    fetched = size.stage_bytes_a + size.stage_bytes_b / c.cluster_m  # of a step, by one CTA
    l2 = fetched * max(1 / known.l2_alone, plan.clusters / clusters / known.l2_together)
    step = max(mma, l2, known.latency_cycles / max(1, c.stages - 1))
    stall = 0.0
    if c.producer is Producer.THREAD:
        step = max(step, known.thread_step_cycles)
        stall = (known.stall_sparse if sparse else known.stall_dense) * mma
    steps_us, stall_us = (1e6 * steps * cycles / clock_hz for cycles in (step, stall))

    band = plan.group * c.tile_m * c.cluster_m * bytes_a / problem.m
    kept = known.l2_share * target.l2_bytes
    passes_b = 1 if bytes_b <= kept else -(-plan.tiles_m // plan.group)
    across = max(1, clusters // plan.group)  # tiles of one wave along N
    passes_a = 1 if band <= kept else -(-plan.tiles_n // across)
    dram = bytes_a * passes_a + bytes_b * passes_b + bytes_out
    if plan.cuts and plan.first_tile == 0 and bytes_b > kept:
        dram += known.read_again * bytes_b * (plan.group - 1)
    memory_us = 1e6 * dram / bandwidth

    work = plan.tiles * c.cluster_m * plan.k_blocks  # steps of all CTAs
    flops = work * 2 * c.tile_m * c.tile_n * c.tile_k
    joules = 1e-12 * (width * flops * (known.pj_sparse if sparse else known.pj_dense) + dram * known.pj_dram)
    joules += 1e-12 * work * fetched * known.pj_l2
    joules += 1e-12 * work * (size.stage_bytes_a + size.stage_bytes_b) * known.pj_shared
    energy_us = 1e6 * joules / (target.watts - known.static_watts)

    occupancy = plan.tiles * plan.k_blocks / (steps * clusters)
    # Idle multiprocessors draw less, so the clock of the others rises and makes good a part of a short wave.
    even = steps_us * occupancy
    busy = max(even, energy_us) + (steps_us - even) + stall_us
    fixed = known.fixed_us
    if parts:
        fixed += known.split_us if c.tile_m <= 128 else known.split_tall_us
        fixed += 1e-3 * parts * 4 * c.tile_m * c.tile_n / known.sums_gbps
    return Cost(max(busy, memory_us) + fixed, steps_us + stall_us, memory_us, energy_us, fixed, occupancy)


def rank(problem: Problem, target: GpuTarget) -> list[KernelConfig]:
    """The candidates of ``space``, the fastest by this model first; of equals the one that ``space`` lists first.

    Raises:
        Unsupported: no kernel computes the problem.
    """
    return list(_ranked(problem, target))


@functools.lru_cache(maxsize=4096)
def _ranked(problem: Problem, target: GpuTarget) -> tuple[KernelConfig, ...]:
    return tuple(sorted(space.candidates(problem, target), key=lambda config: cost(problem, config, target).us))


def speaks_for(problem: Problem, target: GpuTarget) -> bool:
    """Whether the constants are fitted to kernels like the problem's: those of the forward pass, by wgmma."""
    family = problem.family
    fitted = instructions_of(target.arch) is FITTED and family.op in FORWARD_GEMMS
    return fitted and not family.tokens and not family.promote


def best(problem: Problem, target: GpuTarget) -> KernelConfig:
    """What runs where nothing was measured: of :func:`rank` the first whose tile has been timed, where the model speaks
    for the problem, else the default of ``space``. M counts as :func:`rounded`.

    Raises:
        Unsupported: no kernel computes the problem.
    """
    if not speaks_for(problem, target):
        return space.default(problem, target)
    ranked = _ranked(dataclasses.replace(problem, m=rounded(problem.m)), target)
    return next(config for config in ranked if space.is_timed(config, target))


def rounded(tokens: int) -> int:
    """The next multiple of 64, the rows of a warpgroup: what varies in between is not worth another answer."""
    return -(-max(tokens, 1) // 64) * 64


def library_us(problem: Problem, target: GpuTarget) -> float:
    """Microseconds of a vendor's GEMM: it has a tile and a way to split for every size, so its work lies evenly on all
    multiprocessors, and nothing of what a wave leaves idle or a split costs counts. ``problem`` is dense."""
    costs = (cost(problem, config, target) for config in space.candidates(problem, target))
    return constants_of(target).fixed_us + min(max(c.steps_us * c.occupancy, c.energy_us, c.memory_us) for c in costs)


def ffn_gain(shape: Shape, dtype: DType, target: GpuTarget) -> float:
    """How many times faster than the best dense FFN the sparse one is, by this model; 0 where no kernel computes it.

    The dense one is our GEMM with squared ReLU, and then ours or a library's, whichever is faster.
    1 below :data:`LEAST_WIDTH`. M counts as :func:`rounded`.
    """
    return _ffn_gain(shape._replace(m=rounded(shape.m)), dtype, target)


@functools.lru_cache(maxsize=8192)
def _ffn_gain(shape: Shape, dtype: DType, target: GpuTarget) -> float:
    try:
        sparse = sum(cost(p, best(p, target), target).us for p in shape.gemms(dtype))
        first, second = shape.dense_gemms(dtype)
        dense = cost(first, best(first, target), target).us
        dense += min(cost(second, best(second, target), target).us, library_us(second, target))
    except Unsupported:
        return 0.0
    return dense / sparse if min(shape.d, shape.f) >= LEAST_WIDTH else 1.0


def _steps(plan: WorkPlan, clusters: int) -> tuple[float, float]:
    """k-blocks of the busiest cluster, and in how many parts tiles are split along K: 0 where none is."""
    if not plan.cuts:
        return float(-(-plan.tiles // clusters) * plan.k_blocks), 0.0
    split = (plan.units + (plan.extra > 0)) * plan.k_blocks / plan.tile_units
    return plan.first_tile // clusters * plan.k_blocks + split, max(1.0, plan.clusters / plan.split)


def _operand_bytes(problem: Problem) -> tuple[float, float, float]:
    """A, B and the output in memory. A packed matrix has half the values and a bit of metadata per element."""
    element, result = problem.family.dtype.bytes, (problem.family.out or problem.family.dtype).bytes
    packed, packed_result = (bytes_ / 2 + 1 / 8 for bytes_ in (element, result))
    m, n, k, op = problem.m, problem.n, problem.k, problem.family.op
    if not op.multiplies:  # X and its copy in e4m3, or a matrix and its packed form
        return m * n * element, 0.0, m * n * (packed if op is Op.SPARSIFY24 else result)
    a = m * k * (packed if op in SPARSE_OPS else element)
    out = packed_result * (1 + problem.family.tokens) if op in PACKING_OPS else result * (1 + problem.family.accumulate)
    if op is Op.GEMM_DRELU2_24:  # S, which it reads
        out += packed
    return a, n * k * element, m * n * out
