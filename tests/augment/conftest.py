"""Real digits, 8 x 8, values 0 to 16."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """All 1,797 digits, (N, 8, 8), in random order."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
