"""Folders: environment variables first, then the checkout or the installed package, then the user's own folders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from srelu24_gen import paths
from srelu24_gen.errors import ToolchainError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as a wheel leaves it: no checkout around it."""
    package = tmp_path / "site-packages" / "srelu24_gen"
    for name in ("templates", "tuning_db"):
        (package / name).mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", package)
    for name in ("SRELU24_CACHE_DIR", "SRELU24_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return package


def test_a_checkout_uses_its_own_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SRELU24_CACHE_DIR", raising=False)
    root = Path(__file__).resolve().parents[3]
    assert paths.checkout() == root
    assert paths.cache_dir() == root / "build" / "cache"
    assert paths.shipped_records_dir() == root / "tuning_db"
    assert (paths.templates_dir() / "sm90").is_dir()


def test_an_installed_package_uses_its_own_data_and_the_users_cache(installed: Path, tmp_path: Path) -> None:
    assert paths.checkout() is None
    assert paths.templates_dir() == installed / "templates"
    assert paths.shipped_records_dir() == installed / "tuning_db"
    assert paths.cache_dir() == tmp_path / "cache" / "srelu24"
    assert paths.data_dir() == tmp_path / "data" / "srelu24"
    assert not (tmp_path / "cache").exists(), "asking where a folder is must not create it"


@pytest.mark.parametrize(
    ("variable", "folder_of"), [("SRELU24_CACHE_DIR", paths.cache_dir), ("SRELU24_DATA_DIR", paths.data_dir)]
)
def test_the_environment_comes_first(
    variable: str, folder_of: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "x"))
    assert folder_of() == tmp_path / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/y")
    assert folder_of() == tmp_path / "y"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "z")
    assert folder_of() == tmp_path / "z"


@pytest.mark.parametrize(
    ("variable", "folder_of"), [("SRELU24_CACHE_DIR", paths.cache_dir), ("SRELU24_DATA_DIR", paths.data_dir)]
)
@pytest.mark.parametrize("home", ["~nosuchuser/x", None])
def test_a_home_that_is_not_known_is_one_warning_and_no_folder(
    variable: str,
    folder_of: Callable[[], Path],
    home: str | None,
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if home:
        monkeypatch.setenv(variable, home)
    else:  # a container's user that is in no list, without HOME
        for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
            monkeypatch.delenv(name)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    paths._warned.clear()
    with pytest.warns(RuntimeWarning, match=f"is not known .*home.*; set {variable}"):
        assert folder_of() == paths.NOWHERE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folder_of() == paths.NOWHERE
    with pytest.raises(OSError, match="Not a directory"):
        paths.NOWHERE.mkdir(parents=True)


def test_a_broken_installation_says_what_is_missing(installed: Path) -> None:
    (installed / "templates").rmdir()
    with pytest.raises(ToolchainError, match=r"templates is missing.*pip install --force-reinstall srelu24"):
        paths.templates_dir()
