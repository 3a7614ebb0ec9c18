"""Our portable sparse GEMM against CUTLASS's own at the same tile, warps and depth, interleaved on the same data.

    python -m tests.gpu.oracle.bench --shape 16384x4096x16384 --json cutlass_sm80.json

Needs the library of ``python -m tests.gpu.oracle`` and a Hopper GPU, for which both are compiled as sm_90.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tests.gpu.oracle.sm80 import CONFIGS, CutlassSpgemmSm80, our_spec

from srelu24.bench import peers
from srelu24.bench.results import BenchFile, Row, check_writable
from srelu24.bench.rows import candidate
from srelu24.measuring import machine, timing
from srelu24.runtime import launch
from srelu24.runtime.launch import Operands
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType


def row(case: peers.Case, cutlass: CutlassSpgemmSm80, name: str, seconds: float) -> Row:
    """Both kernels on the S and W2 of a case, checked against float32 before and after.

    Raises:
        Unsupported: one of them is wrong.
    """
    y = torch.empty(case.shape.m, case.shape.d, dtype=case.x.dtype, device=case.x.device)
    spec, operands = our_spec(name), Operands(a=case.s, b=case.w2, out=y)

    def ours() -> torch.Tensor:
        launch.run(spec, operands)
        return y

    captured = {
        "srelu24": timing.capture(ours, device=y.device),
        "cutlass": timing.capture(cutlass.prepared(name, case.s, case.w2), device=y.device),
    }

    def check() -> None:
        for who, run in captured.items():
            run.output.fill_(torch.nan)
            run.call()
            error = peers.relative_error(run.output, case.y_masked)
            if not error <= peers.TOLERANCE[case.dtype]:
                raise Unsupported(f"{who}, {name}, {case.shape}: relative error {error:.2g}")

    check()
    timings = timing.interleave({who: run.call for who, run in captured.items()}, device=y.device, seconds=seconds)
    check()
    return Row(
        op=name,
        dtype=case.dtype.value,
        shape=str(case.shape),
        density=case.density,
        candidates={who: candidate(timing, case.gemm_flops) for who, timing in timings.items()},
        speedup={"cutlass": timing.ratio(timings["srelu24"], timings["cutlass"])},
        measured_density=case.measured_density,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=Shape.parse, metavar="MxDxF", required=True)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of rounds, a tile and shape")
    parser.add_argument("--json", type=Path, help="result file")
    options = parser.parse_args()
    check_writable(options.json)
    cutlass = CutlassSpgemmSm80()
    file = BenchFile(env=machine.environment("cuda"), rows=[])
    for shape in options.shape:
        case = peers.Case.make(shape, DType.BF16, options.density, "cuda")
        for name in CONFIGS:
            found = row(case, cutlass, name, options.seconds)
            file.rows.append(found)
            if options.json:
                file.save(options.json)
            ours, theirs = (found.candidates[who] for who in ("srelu24", "cutlass"))
            print(
                f"{name} {found.shape}: ours {ours.ms:.3f} ms, CUTLASS {theirs.ms:.3f} ms, "
                f"{found.speedup['cutlass']:.3f}x of its speed",
                flush=True,
            )


if __name__ == "__main__":
    main()
