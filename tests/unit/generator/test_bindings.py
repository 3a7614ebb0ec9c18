"""What a spec occupies on a multiprocessor, worked out by hand, and what its template is told."""

from __future__ import annotations

import itertools
import re

import pytest

from srelu24_gen import space
from srelu24_gen.bindings import (
    CPP_TYPES,
    footprint,
    load_block,
    loads_ragged_n,
    names_for,
    template_for,
)
from srelu24_gen.paths import templates_dir
from srelu24_gen.spec import EPILOGUES, Activation, DType, Family, KernelConfig, KernelSpec, Op, Producer
from srelu24_gen.target import TARGETS

THREAD, WARPGROUP = Producer.THREAD, Producer.WARPGROUP


@pytest.mark.parametrize(
    ("op", "tile_m", "tile_n", "producer", "threads", "registers", "stage_bytes"),
    [
        # 384 threads: 168 each; the producer keeps 40 and the consumers get (3 * 168 - 40) / 2 = 232.
        (Op.GEMM, 128, 256, WARPGROUP, 384, (40, 232), (16384, 32768)),
        (Op.SPGEMM, 128, 256, WARPGROUP, 384, (40, 232), (8192, 32768)),
        (Op.GEMM_RELU2_24, 192, 256, THREAD, 384, (168, 168), (24576, 32768)),
        (Op.SPGEMM, 192, 256, THREAD, 384, (168, 168), (12288, 32768)),
        # 512 threads: 128 each; (4 * 128 - 40) / 3 = 157, in steps of 8.
        (Op.GEMM, 192, 128, WARPGROUP, 512, (40, 152), (24576, 16384)),
        # 256 threads: as many as an instruction can name; one consumer has nothing to gain.
        (Op.GEMM, 64, 256, WARPGROUP, 256, (255, 255), (8192, 32768)),
        (Op.GEMM, 64, 128, THREAD, 128, (255, 255), (8192, 16384)),
    ],
)
@pytest.mark.parametrize("stages", [2, 4])
def test_footprint(
    op: Op,
    tile_m: int,
    tile_n: int,
    producer: Producer,
    threads: int,
    registers: tuple[int, int],
    stage_bytes: tuple[int, int],
    stages: int,
) -> None:
    size = footprint(
        Family(op, DType.BF16), KernelConfig(tile_m=tile_m, tile_n=tile_n, producer=producer, stages=stages)
    )
    assert size.consumers == tile_m // 64
    assert size.threads == threads
    assert (size.producer_registers, size.consumer_registers) == registers
    assert (size.stage_bytes_a, size.stage_bytes_b) == stage_bytes
    # Operands, two 8-byte barriers a stage, and 1024 bytes for the rest.
    assert size.shared_bytes == stages * sum(stage_bytes) + 1024


def test_registers_and_shared_memory_are_within_the_multiprocessor() -> None:
    target = TARGETS["h200"]
    checked = 0
    for op, (tile_m, tile_n), producer in itertools.product(
        (Op.GEMM, Op.GEMM_RELU2_24, Op.SPGEMM), space.tiles(target), Producer
    ):
        family = Family(op, DType.FP16, Activation.RELU2 if op is Op.GEMM_RELU2_24 else Activation.NONE)
        config = KernelConfig(tile_m=tile_m, tile_n=tile_n, producer=producer)
        if not space.supports_config(family, config, target).ok:
            continue
        checked += 1
        size = footprint(Family(op, DType.FP16), config)
        producers = size.threads - 128 * size.consumers
        used = 128 * size.consumers * size.consumer_registers + producers * size.producer_registers
        assert used <= target.registers_per_sm
        if size.producer_registers != size.consumer_registers:  # setmaxnreg takes multiples of 8 from 24 to 256
            assert all(r % 8 == 0 and 24 <= r <= 256 for r in (size.producer_registers, size.consumer_registers))
        assert tile_n // 2 < size.consumer_registers
    assert checked > 20


def test_only_a_producer_warpgroup_loads_a_ragged_n() -> None:
    assert loads_ragged_n(KernelConfig(producer=WARPGROUP))
    assert not loads_ragged_n(KernelConfig(producer=THREAD))
    assert [load_block(op) for op in (Op.GEMM, Op.SPGEMM, Op.GEMM_RELU2_24)] == [32, 32, 64]


def test_names_of_a_sparse_kernel() -> None:
    spec = KernelSpec(Family(Op.SPGEMM, DType.FP16, residual=True), KernelConfig(tile_m=192, producer=THREAD))
    names = names_for(spec)
    assert template_for(spec) == "sm90/gemm.cu.jinja"
    assert (names["element"], names["output"], names["activation"]) == (
        "cutlass::half_t",
        "cutlass::half_t",
        "Identity",
    )
    assert names["mma"] == "SPARSE::GMMA_64x256x32_F32F16F16_SS"
    assert (names["sparse"], names["prune"], names["bias"], names["residual"]) == ("true", "false", "false", "true")
    assert (names["load_order"], names["ragged_n"], names["producer_warpgroup"]) == ("kOwn8", "false", "false")
    assert (names["consumers"], names["threads"]) == (3, 384)


def test_names_of_the_fused_kernel_and_of_sparsify24() -> None:
    fused = names_for(KernelSpec(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2, bias=True), KernelConfig()))
    assert fused["element"] == "cutlass::bfloat16_t"
    assert fused["mma"] == "MMA_64x256x16_F32BF16BF16_SS"
    assert (fused["sparse"], fused["prune"], fused["activation"], fused["bias"]) == ("false", "true", "Relu2", "true")
    assert (fused["load_order"], fused["ragged_n"]) == ("kOwn16", "true")
    spec = KernelSpec(Family(Op.SPARSIFY24, DType.BF16, Activation.NONE), KernelConfig())
    assert template_for(spec) == "sm90/sparsify24.cu.jinja"
    assert names_for(spec) == {"name": spec.name, "element": "cutlass::bfloat16_t", "activation": "Identity"}


def test_every_type_and_activation_has_a_c_plus_plus_name() -> None:
    assert set(CPP_TYPES) == set(DType)
    assert set(EPILOGUES) == set(Activation)
    header = (templates_dir() / "include" / "srelu24" / "activation.cuh").read_text()
    for row in EPILOGUES.values():
        assert re.search(rf"^struct {row.struct}\b", header, re.MULTILINE)
