"""A kernel of your own from a template of ours: relu(h), not squared, pruned to 2:4.

    python examples/extend_template.py

The template (relu24_template/sm90/sparsify24.cu.jinja) has the file name of the one it stands for, and is rendered
with the same names. It is compiled here for any Hopper GPU; where there is one, it also runs and is checked.
To make such a kernel part of srelu24, with its space, reference and tests, follow docs/extending.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

import srelu24
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import Operands
from srelu24.runtime.loader import load
from srelu24.runtime.rows import SparsifyLauncher
from srelu24_gen.bindings import WARPGROUP_THREADS
from srelu24_gen.compile import build_rendered
from srelu24_gen.render import render
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op

TEMPLATES = Path(__file__).with_name("relu24_template")


def main() -> None:
    spec = KernelSpec(Family(Op.SPARSIFY24, DType.BF16, Activation.RELU2), KernelConfig())
    rendered = render(spec, TEMPLATES)
    built = build_rendered(rendered)
    print(f"compiled: {len(built.cubin)} bytes, {built.meta.registers} registers, {built.meta.spill_bytes} spilled")

    if not torch.cuda.is_available():
        print("no GPU: compiled for Hopper, not run")
        return
    h = torch.randn(300, 1024, device="cuda").bfloat16()
    out = Sparse24.empty(*h.shape, h.dtype, h.device)
    kernel = load(built, h.device.index, threads=WARPGROUP_THREADS, shared_bytes=0)
    SparsifyLauncher(kernel)(Operands(a=h, out=out))  # our kernel takes the arguments of sparsify24
    # relu first, then the two of largest magnitude as they are: what two steps of the library give.
    expected = srelu24.sparsify24(h.relu(), "none")
    assert torch.equal(out.to_dense(), expected.to_dense()), "the kernel is wrong"
    print("runs: equal to relu, then sparsify24")


if __name__ == "__main__":
    main()
