"""What all tests share: a fixed seed, and examples that do not depend on a machine's speed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run and no deadline: a slow or busy machine must not turn a test red.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Give every test the same random state, whatever ran before it, and leave none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
