"""One hypothesis profile for all unit tests: no deadlines on slow machines, few enough examples to stay fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from srelu24 import dispatch

settings.register_profile("srelu24", deadline=None, max_examples=60)
settings.load_profile("srelu24")


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    """No test sees what another one's tuning database made the dispatcher choose."""
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()
