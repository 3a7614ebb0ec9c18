"""The worker's real child on a CPU: the reference stands in for the kernels. Run as a script, with a device."""

from __future__ import annotations

import torch

import played_kernels
from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands
from srelu24.training import kernels
from srelu24.training.kernels import TrainingOperands
from srelu24.tuning import session
from srelu24_gen.spec import KernelSpec, Op

WRONG_STAGES = 2
"""Configurations with so few stages forget the last row."""


def run(spec: KernelSpec, o: Operands) -> None:
    if spec.family.op is Op.GEMM_RELU2_24:
        packed = reference.gemm_relu2_24(o.a, o.b, o.bias)
        assert isinstance(o.out, Sparse24)
        o.out.values.copy_(packed.values)
        o.out.metadata.copy_(packed.metadata)
        return
    if spec.family.op is Op.SPGEMM:
        out = reference.spgemm(o.a, o.b, o.bias, o.residual)
    else:
        out = reference.gemm(o.a, o.b, o.bias, activation=spec.family.activation)
    rows = out.shape[0] - (spec.config.stages == WRONG_STAGES)
    o.out[:rows].copy_(out[:rows])


def run_step(spec: KernelSpec, o: TrainingOperands) -> None:
    values = o.out.values if isinstance(o.out, Sparse24) else o.out
    last = values[-1].clone()
    played_kernels.run(spec, o)
    if spec.config.stages == WRONG_STAGES:
        values[-1] = last


if __name__ == "__main__":
    torch.set_num_threads(1)  # tests run side by side
    launch.run = run
    kernels.run = run_step
    session.main()
