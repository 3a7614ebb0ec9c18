"""Where templates, shipped records, the build cache and the user's own data are.

Templates and records come from the installed package, or from the checkout this file is part of.
Nothing here creates a folder.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import platformdirs

from srelu24_gen.errors import ToolchainError

_PACKAGE = Path(__file__).resolve().parent
NOWHERE = Path(os.devnull) / "srelu24"
"""Stands for a folder of the user's where there is no place for one: nothing can be read or written there."""
_warned: set[str] = set()


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
    """Where built kernels go: SRELU24_CACHE_DIR, else the checkout's ``build/cache``, else the user's cache folder.

    :data:`NOWHERE`, with one warning, where the home folder that it should be in is not known.
    """
    if root := checkout():
        return _users_folder("SRELU24_CACHE_DIR", lambda: root / "build" / "cache")
    return _users_folder("SRELU24_CACHE_DIR", lambda: platformdirs.user_cache_path("srelu24", appauthor=False))


def data_dir() -> Path:
    """Where the user's tuning history goes: SRELU24_DATA_DIR, else the user's data folder; :data:`NOWHERE` as of
    :func:`cache_dir`."""
    return _users_folder("SRELU24_DATA_DIR", lambda: platformdirs.user_data_path("srelu24", appauthor=False))


def _users_folder(variable: str, usual: Callable[[], Path]) -> Path:
    chosen = os.environ.get(variable)
    try:
        folder = Path(chosen or usual()).expanduser()
        if chosen or folder.is_absolute():
            return folder.absolute()
        cause = f"{folder} has no beginning"
    except (RuntimeError, OSError) as error:  # no home folder, "~name" of nobody, or a current folder that is gone
        cause = str(error)
    if variable not in _warned:
        _warned.add(variable)
        named = f" that {variable} names" if chosen else ""
        warnings.warn(
            f"the folder{named} is not known ({cause}), so nothing of yours is read or kept; set {variable} to a folder"
            " that you can write",
            RuntimeWarning,
            stacklevel=3,
        )
    return NOWHERE


def _shipped(name: str) -> Path:
    root = checkout()
    folder = (root or _PACKAGE) / name
    if not folder.is_dir():
        raise ToolchainError(
            f"the folder {folder} is missing from this installation; run: pip install --force-reinstall srelu24"
        )
    return folder
