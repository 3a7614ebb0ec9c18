"""The package works when it is installed: from the wheel, the sdist, and as an editable checkout.

Each install goes into a virtual environment of its own, and is used from another folder. Third-party packages are not
installed again but linked from the environment that runs this test. So what is proven is our own packages and their
data (modules, templates, headers, records, console script), not the resolution of dependencies, which `make` does.
"""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from installs import CHECKOUT, environment, install, only, run

# Run with -I: neither the current folder nor PYTHONPATH helps the import. Prints where everything came from.
USE = """
import json
import srelu24, srelu24_gen
from srelu24_gen.compile import build
from srelu24_gen.paths import cache_dir, shipped_records_dir, templates_dir
from srelu24_gen.space import default
from srelu24_gen.spec import DType, Family, KernelSpec, Op, Problem
from srelu24_gen.target import target_by_key

problem = Problem(Family(Op.GEMM, DType.BF16), 4096, 4096, 4096)
kernel = build(KernelSpec(problem.family, default(problem, target_by_key("h200"))))
print(json.dumps({
    "srelu24": srelu24.__file__, "srelu24_gen": srelu24_gen.__file__,
    "templates": str(templates_dir()), "records": str(shipped_records_dir()), "cache": str(cache_dir()),
    "cubin": kernel.cubin[:4].hex(), "registers": kernel.meta.registers, "folder": str(kernel.folder),
}))
"""


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the unpacked sdist."""
    pytest.importorskip("build", reason="the packages build and hatchling are needed; `make` installs them")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, CHECKOUT, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_installed_package_compiles_a_kernel_from_another_folder(kind: str, dist: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "venv")
    what = {"wheel": [only(dist, "*.whl")], "sdist": [only(dist, "*.tar.gz")], "editable": ["--editable", CHECKOUT]}
    install(env, *what[kind])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folders = {"SRELU24_CACHE_DIR": str(tmp_path / "cache"), "SRELU24_DATA_DIR": str(tmp_path / "data")}

    found = json.loads(run(env / "bin/python", "-I", "-c", USE, cwd=elsewhere, env=folders))

    home = CHECKOUT if kind == "editable" else env
    for name in ("srelu24", "srelu24_gen", "templates", "records"):
        assert Path(found[name]).is_relative_to(home), f"{name} came from {found[name]}"
    assert found["cubin"] == b"\x7fELF".hex()
    assert 0 < found["registers"] <= 255
    assert Path(found["folder"]).is_relative_to(tmp_path / "cache")
    assert (Path(found["folder"]) / "kernel.cubin").is_file()

    version = run(env / "bin/srelu24", "--version", cwd=elsewhere, env=folders).split()[-1]
    assert version in only(dist, "*.whl").name
    source = run(env / "bin/python", "-m", "srelu24", "render", "spgemm", cwd=elsewhere, env=folders)
    assert "srelu24_kernel" in source


def test_wheel_holds_what_the_checkout_holds(dist: Path) -> None:
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        "generator/srelu24_gen": "srelu24_gen",
        "python/srelu24": "srelu24",
        "templates": "srelu24_gen/templates",
        "tuning_db": "srelu24_gen/tuning_db",
    }
    expected = {
        f"{inside}/{file.relative_to(CHECKOUT / folder)}"
        for folder, inside in sources.items()
        for file in (CHECKOUT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == expected


def test_both_packages_ship_the_mark_that_they_are_typed(dist: Path) -> None:
    """PEP 561: without py.typed a type checker takes nothing of an installed package."""
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        assert {"srelu24/py.typed", "srelu24_gen/py.typed"} <= set(wheel.namelist())
    assert {"python/srelu24/py.typed", "generator/srelu24_gen/py.typed"} <= of_sdist(dist)


def of_sdist(dist: Path) -> set[str]:
    """The files of the source distribution."""
    with tarfile.open(only(dist, "*.tar.gz")) as sdist:
        return {str(Path(*Path(name).parts[1:])) for name in sdist.getnames()}


def test_sdist_can_be_tested_and_holds_no_outputs(dist: Path) -> None:
    files = of_sdist(dist)
    assert {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "tests/conftest.py"} <= files
    assert not [name for name in files if name.startswith(("build/", ".venv", "dist/")) or "__pycache__" in name]
