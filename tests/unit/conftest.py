"""One hypothesis profile for all unit tests: no deadlines on slow machines, few enough examples to stay fast."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("srelu24", deadline=None, max_examples=60)
settings.load_profile("srelu24")
