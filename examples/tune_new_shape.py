"""Generates, builds and tunes kernels for a shape that nobody has tuned, and runs an FFN of it.

    python examples/tune_new_shape.py                        # on a GPU: builds, tunes for a minute, runs
    python examples/tune_new_shape.py --shape 8192x3072x9216 --budget 300

Without a GPU the kernels are compiled for the H200, and the FFN runs on the CPU reference.
"""

from __future__ import annotations

import argparse

import torch

import srelu24
from srelu24.cli import doctor, live
from srelu24.runtime import dispatch
from srelu24.shipping import catalogue
from srelu24_gen import space
from srelu24_gen.models import Shape
from srelu24_gen.render import render
from srelu24_gen.spec import DType
from srelu24_gen.target import target_by_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.parse, default=Shape(1000, 1280, 5120), metavar="MxDxF")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tuning, on a GPU")
    args = parser.parse_args()
    shape, dtype = args.shape, DType.BF16
    target = doctor.this_gpu()
    gpu = target is not None
    target = target or target_by_key("h200")

    # What could compute it: the space is asked, never guessed.
    for problem in shape.gemms(dtype):
        choice = dispatch.choose(problem, target)
        print(f"{problem}: {len(space.candidates(problem, target))} candidates; {choice.why}")

    # The chosen kernels, as source and as binaries.
    specs = catalogue.specs_for([shape], dtype, target)
    for spec in specs:
        lines = render(spec).source.count("\n")
        print(f"{spec.name}: {lines} lines over the headers")
    for row in catalogue.build_kernels(specs):
        print(f"  built {row['name']}: {row['error'] or str(row['registers']) + ' registers'}")

    # The search. The winners go to your own database, and the dispatcher uses them from then on.
    if gpu:
        from srelu24.tuning import tuner

        with live.live_view() as on_event:
            tuner.tune_ffn(*shape, dtype, budget_s=args.budget, on_event=on_event)
        dispatch.clear_cache()

    device = "cuda" if gpu else "cpu"
    x = torch.randn(shape.m, shape.d, device=device).bfloat16()
    w1 = (torch.randn(shape.f, shape.d, device=device) / shape.d**0.5).bfloat16()
    w2 = (torch.randn(shape.d, shape.f, device=device) / shape.f**0.5).bfloat16()
    print(srelu24.explain(x, w1, w2))
    print(f"y = ffn(x, w1, w2): {list(srelu24.ffn(x, w1, w2).shape)}")


if __name__ == "__main__":
    main()
