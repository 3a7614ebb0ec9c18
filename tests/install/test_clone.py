"""The two commands of the README, in a fresh clone of a user with another umask and an odd home folder."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from installs import CHECKOUT, environment, install, run


@pytest.mark.slow
def test_a_clone_with_umask_0002_and_a_strange_home_runs_both_commands(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run("git", "-c", "safe.directory=*", "clone", "--quiet", "--no-hardlinks", CHECKOUT, clone, cwd=tmp_path, umask=2)
    assert stat.S_IMODE((clone / "build").stat().st_mode) == 0o775, "as git makes a tracked folder"
    env = environment(tmp_path / "venv")
    install(env, "--editable", clone)
    (env / ".ready").touch()  # what `make setup` leaves: the packages are there

    def make(target: str, arguments: str, home: str) -> str:
        words = ("make", f"VENV={env}", f"PYTHON={env}/bin/python", target, f"ARGS={arguments}")
        return run(*words, cwd=clone, env={"HOME": home}, umask=0o002)

    for home in ("/dev/null/home", "no/beginning"):  # it cannot be entered; it is not known where it is
        said = make("run", "--shape 64x320x832", home)
        assert "kernels" in said
        assert "fail" not in said
    cache = clone / "build" / "cache"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert len([path for path in cache.iterdir() if (path / "kernel.cubin").is_file()]) == 2
    assert not (clone / "no").exists()
    assert run("git", "-c", "safe.directory=*", "status", "--porcelain", cwd=clone) == ""
    said = make("test", "-q tests/unit/generator/test_store.py tests/unit/generator/test_paths.py", "/dev/null/home")
    assert " passed" in said
