"""Every error this project raises on purpose, one base class for all of them.

A message is one clear sentence: what was given, what is needed, what to do.
"""

from __future__ import annotations

from pathlib import Path


class Srelu24Error(Exception):
    """Base of every error raised on purpose by srelu24 and srelu24_gen."""


class Unsupported(Srelu24Error, ValueError):
    """The problem or configuration is outside what the kernels can do; the message says why."""


class ToolchainError(Srelu24Error):
    """NVRTC, the CUDA headers or the CUTLASS headers are missing or do not fit together."""


class RenderError(Srelu24Error):
    """A template could not be rendered; names the template, its line and the variable."""


class CompileError(Srelu24Error):
    """NVRTC rejected a kernel. The source and the full log stay on disk.

    Attributes:
        log: what NVRTC and ptxas printed.
        folder: where the source (kernel.cu) and the log (compile.log) were kept, if they were.
    """

    def __init__(self, message: str, log: str = "", folder: Path | None = None) -> None:
        super().__init__(message)
        self.log = log
        self.folder = folder


class CacheError(Srelu24Error):
    """The cache folder cannot be used safely (for example, others may write to it)."""


class RecordError(Srelu24Error):
    """A tuning record or database file is damaged, foreign or of an unknown schema."""


class BundleError(Srelu24Error):
    """A bundle is damaged, foreign, of another version, or cannot be written."""


class LaunchError(Srelu24Error):
    """The CUDA driver is missing or refused to load or launch a kernel."""
