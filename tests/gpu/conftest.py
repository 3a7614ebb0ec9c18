"""All kernels that the collected tests need are built first, side by side; the user's tuning records stay out.

A test module names what it runs: ``SPECS`` are kernels, ``PROBLEMS`` are what the dispatcher will be asked for.
``--family sm80`` runs the modules of tests/conftest.py's PORTABLE_MODULES on the portable kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from srelu24.runtime import dispatch, fallback
from srelu24_gen.compile import BuiltKernel, build_many
from srelu24_gen.spec import KernelSpec


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session", autouse=True)
def no_user_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRELU24_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        dispatch.clear_cache()
        yield
    dispatch.clear_cache()


@pytest.fixture(scope="session", autouse=True)
def built(request: pytest.FixtureRequest, device: torch.device, no_user_records: None) -> dict[KernelSpec, BuiltKernel]:
    """Every kernel that a collected module needs, from the build cache or compiled on all cores."""
    here = Path(__file__).parent
    modules = {
        item.module
        for item in request.session.items
        if isinstance(item, pytest.Function) and here in item.path.parents and not item.get_closest_marker("skip")
    }
    specs = {spec for module in modules for spec in getattr(module, "SPECS", ())}
    target = dispatch.gpu_of(device)
    for problem in {problem for module in modules for problem in getattr(module, "PROBLEMS", ())}:
        specs.add(KernelSpec(problem.family, dispatch.choose(problem, target).config, target.arch))
    kernels = {}
    for spec, outcome in zip(specs, build_many(specs), strict=True):
        if not isinstance(outcome, BuiltKernel):
            raise outcome
        kernels[spec] = outcome
    return kernels


@pytest.fixture(autouse=True)
def warn_again() -> None:
    """A fallback warns once per process: let every test see it."""
    fallback.warn_again()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile has seen nothing yet, and counts from zero."""
    from torch._dynamo.utils import counters  # slow to import, and most modules compile nothing

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
