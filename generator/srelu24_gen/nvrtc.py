"""The compiler process: ``python -m srelu24_gen.nvrtc`` reads a source and options, answers log and cubin.

NVRTC has a process of its own because it takes over SIGINT and SIGTERM while it compiles and then ends the whole
process without a word (seen with 13.0: exit status 4), and because it holds one lock for all threads of a process.
Only the standard library and cuda-bindings are imported, so that it starts quickly.

Input: a JSON object ``{"source": ..., "options": [...]}``. Output: one line of JSON, the fields of :class:`Answer`,
then the cubin.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypedDict


class Answer(TypedDict):
    status: str
    """Name of the nvrtcResult; NVRTC_SUCCESS where there is a cubin."""
    log: str
    """Compiler and ptxas output, with the resource report that ``--ptxas-options=-v`` asks for."""
    seconds: float


def compile_here(source: str, options: list[str]) -> tuple[Answer, bytes]:
    """Compile in this process; messages call the source ``kernel.cu``."""
    from cuda.bindings import nvrtc  # here, so that a parent process can import this module without the library

    started = time.perf_counter()
    log = cubin = b""
    status, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    if status == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _fetch(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    if status == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        cubin = _fetch(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    text = log.rstrip(b"\0").decode(errors="replace")
    return {"status": status.name, "log": text, "seconds": time.perf_counter() - started}, cubin


def _fetch(program: object, size_of: Callable[..., Any], copy_to: Callable[..., Any]) -> bytes:
    """One of NVRTC's outputs: ask its size, then have it copied."""
    _, size = size_of(program)
    content = bytearray(size)
    copy_to(program, content)
    return bytes(content)


MOST_SECONDS = 1800
"""After so long the process ends whatever happens: nobody waits for it where its parent was killed."""

if __name__ == "__main__":
    signal.alarm(MOST_SECONDS)
    answer, binary = compile_here(**json.load(sys.stdin.buffer))
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + binary)
