"""Describes, renders and compiles the kernels of srelu24; needs no GPU, no torch, no CUDA toolkit and no C++ compiler.

Start at :mod:`srelu24_gen.spec` (the vocabulary) and :func:`srelu24_gen.compile.build` (spec to cubin).
"""

from __future__ import annotations

__version__ = "0.1.0"
