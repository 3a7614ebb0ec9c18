"""CUTLASS's own sparse GEMMs, built with nvcc from the ``.cu`` files here, for tests and timings to compare with.

Building the one for Hopper takes about two minutes and 6 GB, so libraries are kept in ``build/oracle/`` of the
checkout. A machine without nvcc can use those that were built elsewhere with ``python -m tests.gpu.oracle`` and copied
there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24
from srelu24_gen.target import Toolchain

FOLDER = Path(__file__).parents[3] / "build" / "oracle"
KERNELS = {
    torch.bfloat16: ("spgemm_bf16_k64", 64),
    torch.float16: ("spgemm_fp16_k128", 128),
    torch.float8_e4m3fn: ("spgemm_e4m3_k128", 128),
}
"""Function for each type, and the K of its tile, which decides E's order."""


@dataclass(frozen=True)
class Library:
    """A source in this folder, and what it is compiled for."""

    source: str
    arch: str

    @property
    def path(self) -> Path:
        """Where the built library is or will be; the name changes with all that it is built from."""
        source = Path(__file__).parent / self.source
        parts = (Toolchain.find().cutlass_version, *self.flags, source.read_text())
        return FOLDER / f"{source.stem}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}.so"

    @property
    def flags(self) -> tuple[str, ...]:
        code = f"-gencode=arch=compute_{self.arch},code=sm_{self.arch}"
        return ("-std=c++17", "-O1", code, "--expt-relaxed-constexpr", "-shared", "-Xcompiler=-fPIC")

    @property
    def available(self) -> bool:
        """Whether it is there or can be built."""
        return nvcc() is not None or self.path.exists()

    def build(self) -> Path:
        """The library, built if it is not there yet.

        Raises:
            FileNotFoundError: it is not there, and neither is nvcc.
            CalledProcessError: nvcc failed; what it said is on stderr.
        """
        if self.path.exists():
            return self.path
        compiler = nvcc()
        if compiler is None:
            raise FileNotFoundError(f"neither nvcc nor {self.path} was found")
        # nvcc brings its own CUDA headers. CUTLASS's helpers for strides lie outside its include folder.
        include = Toolchain.find().include_dirs[0]
        includes = [f"-I{folder}" for folder in (include, include.parent / "tools/util/include")]
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
        source = Path(__file__).parent / self.source
        subprocess.run([compiler, *self.flags, *includes, "-o", str(unfinished), str(source)], check=True)
        unfinished.replace(self.path)
        return self.path


WGMMA = Library("cutlass_spgemm.cu", "90a")
MMA_SYNC = Library("cutlass_spgemm_sm80.cu", "90")


def nvcc() -> str | None:
    """The compiler on PATH, else the one in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=Path(home, "bin")) if home else None)


class CutlassSpgemm:
    """``S B^T`` by CUTLASS's kernels for Hopper."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(WGMMA.build()))
        self._library.spgemm_status.restype = ctypes.c_char_p

    def __call__(self, s: Sparse24, b: Tensor) -> Tensor:
        """S [M, F] packed times b [N, F] -> [M, N] on torch's current stream, without synchronising; bf16 from e4m3.

        M >= 1, N a multiple of 8.

        Raises:
            RuntimeError: CUTLASS refused the operands or could not launch.
        """
        name, tile_k = KERNELS[s.dtype]
        m, f = s.shape
        values, e = s.to_cutlass(tile_k)
        # CUTLASS takes a K that is a multiple of 16, of 32 in 8 bits. The values come padded to one.
        bits = b.view(torch.uint8 if b.itemsize == 1 else torch.int16)
        b = torch.nn.functional.pad(bits, (0, -f % (32 // b.itemsize))).contiguous()
        y_dtype = torch.bfloat16 if s.values.itemsize == 1 else s.dtype
        y = torch.full((m, b.shape[0]), torch.nan, dtype=y_dtype, device=s.device)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, e, b, y)]
        stream = ctypes.c_void_p(torch.cuda.current_stream(s.device).cuda_stream)
        status = getattr(self._library, name)(*pointers, m, b.shape[0], b.shape[1], stream)
        if status:
            raise RuntimeError(f"{name} {m}x{b.shape[0]}x{f}: {self._library.spgemm_status(status).decode()}")
        return y
