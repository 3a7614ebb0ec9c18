"""Small problems over all kernels, for compute-sanitizer: one or two tiles, ragged ends, both producers.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Without PyTorch's memory pool every tensor is an allocation of its own, and what is written past its end shows.
All else happens on the CPU, so that only our kernels are slowed down.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

import srelu24
import srelu24.fp8.ops  # registers the operation
from srelu24.fp8 import kernels
from srelu24.fp8.operands import FfnOperands
from srelu24.measuring import verify, workload
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime import dispatch, launch
from srelu24.runtime.launch import Launcher, Operands, launcher_for
from srelu24.training import kernels as step_kernels
from srelu24.training import reference, step
from srelu24.training.reference import Needed, Pruning
from srelu24_gen import space
from srelu24_gen.models import Shape
from srelu24_gen.spec import (
    Activation,
    DType,
    Family,
    Instructions,
    KernelConfig,
    KernelSpec,
    Op,
    Problem,
    Producer,
    instructions_of,
)
from srelu24_gen.target import target_by_key

TARGET = target_by_key("h200")
NATIVE = instructions_of(TARGET.arch) is Instructions.WGMMA

FAMILIES = (
    Family(Op.GEMM, DType.BF16, bias=True),
    Family(Op.GEMM_RELU2_24, DType.FP16, Activation.RELU2, bias=True, count_nonzeros=True),
    Family(Op.SPGEMM, DType.BF16),
    Family(Op.SPGEMM, DType.BF16, bias=True, residual=True),
    Family(Op.SPARSIFY24, DType.FP16, Activation.RELU2),
)
TRAINING_CONFIGS = (
    KernelConfig(tile_m=192, producer=Producer.THREAD, stages=4),
    KernelConfig(tile_m=128, producer=Producer.WARPGROUP, stages=4, stream_k=True),
)
FP8_CONFIGS = (
    KernelConfig(tile_m=192, tile_k=128, producer=Producer.THREAD, stages=3, stream_k=True),
    KernelConfig(tile_m=128, tile_k=128, producer=Producer.WARPGROUP, stages=4),
    KernelConfig(tile_m=128, tile_k=128, producer=Producer.WARPGROUP, stages=4, stream_k=True),
)
GEMM_CONFIGS = (
    KernelConfig(tile_m=192, producer=Producer.THREAD, stages=4, stream_k=True),
    KernelConfig(tile_m=192, producer=Producer.THREAD, stages=3),
    KernelConfig(tile_m=128, producer=Producer.WARPGROUP, stages=3),
    KernelConfig(tile_m=128, producer=Producer.WARPGROUP, stages=4, stream_k=True),
    KernelConfig(tile_m=64, cluster_m=1, producer=Producer.WARPGROUP, stages=2),
    KernelConfig(tile_m=128, cluster_m=1, producer=Producer.ALL, stages=3),
    KernelConfig(tile_m=64, tile_n=128, cluster_m=1, producer=Producer.ALL, stages=2),
)


def runs() -> list[tuple[KernelSpec, Problem]]:
    """Each kernel on less than a tile and on two tiles, both with ragged ends of rows, columns and K."""
    found = []
    for family in FAMILIES:
        configs = (KernelConfig(),) if family.op is Op.SPARSIFY24 else GEMM_CONFIGS
        for config in configs:
            for m, n, k in ((1, 24, 8), (config.tile_m * config.cluster_m + 65, 328, 600)):
                if config.producer is Producer.THREAD:
                    n = 64 * -(-n // 64)
                problem = Problem(family, m, n, 0 if family.op is Op.SPARSIFY24 else k)
                if space.supports(problem, config, TARGET).ok:
                    found.append((KernelSpec(family, config, TARGET.arch), problem))
    return found


def fp8_spec(family: Family, config: KernelConfig) -> KernelSpec:
    return KernelSpec(family, config, TARGET.arch)


FP8_FAMILIES = [
    family
    for bias in (False, True)
    for family in (
        *(problem.family for problem in Shape(1, 64, 64).gemms(DType.E4M3, bias, bias)),
        Shape(1, 64, 64).recipe_kernels(bias)[1].family,
    )
]
SPECS = list(dict.fromkeys(spec for spec, _ in runs()))
if NATIVE:
    SPECS += [fp8_spec(family, config) for family in FP8_FAMILIES for config in FP8_CONFIGS]


def moved(x: Tensor | Sparse24 | None, device: str) -> Tensor | Sparse24 | None:
    if not isinstance(x, Sparse24):
        return None if x is None else x.to(device)
    copy = Sparse24.empty(*x.shape, x.dtype, device)
    copy.values.copy_(x.values)
    copy.metadata.copy_(x.metadata)
    return copy


def main() -> int:
    for spec, problem in runs():
        on_cpu = workload.operands_for(problem, 0.3, "cpu")
        fields = {field.name: getattr(on_cpu, field.name) for field in dataclasses.fields(Operands)}
        on_gpu = Operands(**{name: moved(value, "cuda:0") for name, value in fields.items()})  # type: ignore[arg-type]
        launch.run(spec, on_gpu)
        torch.cuda.synchronize()
        out, counts = moved(on_gpu.out, "cpu"), moved(on_gpu.counts, "cpu")
        assert out is not None
        assert not isinstance(counts, Sparse24)
        found = verify.check(problem, dataclasses.replace(on_cpu, out=out, counts=counts))
        print(f"{spec.name} {problem}: {found.detail}")
        if not found.ok:
            return 1
    print(f"{len(runs())} kernels are right")
    return fp8() if NATIVE else 0


def fp8() -> int:
    """Every recipe on one row and on two tiles with ragged ends, near the CPU's answer."""
    recipes = ("rowwise", "predicted", "static")
    for shape, recipe in itertools.product((Shape(1, 16, 16), Shape(321, 48, 336)), recipes):
        if not fp8_forward(shape, recipe, True):
            return 1
    # With the larger tiles, which so few rows would not get: two of them a cluster, and the end of a third.
    for config, recipe, bias in itertools.product(FP8_CONFIGS, ("rowwise", "static"), (False, True)):
        with patch.object(kernels, "launcher_of", partial(fp8_launcher, config)):
            if not fp8_forward(Shape(769, 64, 576), recipe, bias):
                return 1
    return training()


def fp8_launcher(config: KernelConfig, family: Family, m: int, n: int, k: int, device: torch.device) -> Launcher:
    if family in FP8_FAMILIES:
        return launcher_for(fp8_spec(family, config), device.index)
    return dispatch.launcher_of(family, m, n, k, device)


def fp8_forward(shape: Shape, recipe: str, bias: bool) -> bool:
    m, d, f = shape
    data = workload.make_ffn(m, d, f, DType.BF16, 0.3, "cpu")
    w1, w2 = srelu24.quantize_weight(data.w1), srelu24.quantize_weight(data.w2)
    biases = [torch.ones(n, dtype=torch.bfloat16) if bias else None for n in (f, d)]
    basis = srelu24.Static(100.0).scales_on(torch.device("cpu")) if recipe == "static" else w1.row_norm
    operands = FfnOperands(
        x=data.x,
        w1=w1.values,
        w1_scale=w1.scale,
        w2=w2.values,
        w2_scale=w2.scale,
        b1=biases[0],
        b2=biases[1],
        recipe=recipe,
        basis=basis,
        saturated=torch.zeros((), dtype=torch.int64),
    )
    expected = torch.ops.srelu24.ffn_fp8(*operands)
    on_gpu = FfnOperands(*(each.cuda() if isinstance(each, torch.Tensor) else each for each in operands))
    y = kernels.forward(on_gpu).cpu()
    error = float((y - expected).norm() / expected.norm())
    print(f"ffn_fp8 {recipe} {shape}{' with biases' if bias else ''}: {error:.2g} from the reference")
    return error < 0.05


def training() -> int:
    """A training step on one block of tokens and on two tiles with ragged ends, near the CPU's answer."""
    for (m, d, f), stride, config in itertools.product(((16, 64, 64), (336, 128, 320)), (None, 1), TRAINING_CONFIGS):
        data = workload.make_ffn(m, d, f, DType.BF16, 0.3, "cpu")
        g = torch.ones(m, d, dtype=torch.bfloat16)
        pruning = Pruning(torch.empty(0, dtype=torch.int64), stride)
        forward = reference.forward(data.x, data.w1, data.w2, pruning=pruning)
        expected = reference.backward(g, data.x, data.w1, data.w2, forward.hidden, pruning=pruning)
        on_gpu = [t.cuda() for t in (data.x, data.w1, data.w2)]
        with step_kernels.fixed_config(config):
            done = step.forward(*on_gpu, None, None, Pruning(pruning.dense_features.cuda(), stride))
            found = step.backward(
                g.cuda(),
                *on_gpu,
                done.hidden,
                pruning=Pruning(pruning.dense_features.cuda(), stride),
                needed=Needed(),
            )
        for name, ours, wanted in (
            ("y", done.y, forward.y),
            ("w1", found.w1, expected.w1),
            ("w2", found.w2, expected.w2),
        ):
            assert ours is not None
            assert wanted is not None
            error = float((ours.cpu().float() - wanted.float()).norm() / wanted.float().norm())
            print(f"training step {m}x{d}x{f}, stride {stride}, tile_m {config.tile_m}, {name}: {error:.2g}")
            if not error < 0.05:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
