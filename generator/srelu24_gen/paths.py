"""Where templates, shipped records, the build cache and the user's own data are.

Templates and records come from the installed package, or from the checkout this file is part of.
Nothing here creates a folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from srelu24_gen.errors import ToolchainError

_PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """Root of the source checkout this package is imported from, or None when it is installed."""
    root = _PACKAGE.parents[1]
    return root if _PACKAGE.parent.name == "generator" and (root / "templates").is_dir() else None


def templates_dir() -> Path:
    """The folder with ``sm90/*.cu.jinja`` and ``include/srelu24/*.cuh``.

    Raises:
        ToolchainError: the installation lacks them.
    """
    return _shipped("templates")


def shipped_records_dir() -> Path:
    """The folder with the tuning records that come with srelu24, ``<arch>/<gpu>/<family>.json``.

    Raises:
        ToolchainError: the installation lacks them.
    """
    return _shipped("tuning_db")


def cache_dir() -> Path:
    """Where built kernels go: SRELU24_CACHE_DIR, else the checkout's ``build/``, else the user's cache folder."""
    if chosen := os.environ.get("SRELU24_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if root := checkout():
        return root / "build"
    return platformdirs.user_cache_path("srelu24", appauthor=False)


def data_dir() -> Path:
    """Where the user's tuning history goes: SRELU24_DATA_DIR, else the user's data folder."""
    if chosen := os.environ.get("SRELU24_DATA_DIR"):
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_data_path("srelu24", appauthor=False)


def _shipped(name: str) -> Path:
    root = checkout()
    folder = (root or _PACKAGE) / name
    if not folder.is_dir():
        raise ToolchainError(
            f"the folder {folder} is missing from this installation; run: pip install --force-reinstall srelu24"
        )
    return folder
