"""Virtual environments in which the package, or other versions of its dependencies, are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, umask: int = -1) -> str:
    """Stdout of a command; its whole output in the failure where it does not exit with 0."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SRELU24_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean | (env or {}), capture_output=True, text=True, umask=umask
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def environment(folder: Path, without: str = "srelu24") -> Path:
    """A virtual environment with links to this one's third-party packages, and without those whose names begin so.

    Links rather than a .pth file, because cuda-pathfinder looks for NVRTC in site-packages only.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = only(folder, "lib/python*/site-packages")
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "srelu24" not in installed.name and not installed.name.startswith(without) and installed.suffix != ".pth":
            (site / installed.name).symlink_to(installed)
    return folder


def install(environment: Path, *what: str | Path, index: bool = False) -> None:
    """Into an environment, and nothing that it depends on; from the package index only where that is said."""
    command = (sys.executable, "-m", "pip", "--python", environment / "bin/python", "--disable-pip-version-check")
    flags = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    run(*command, *flags, *([] if index else ["--no-index"]), *what, cwd=environment)
