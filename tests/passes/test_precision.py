"""Devices without float64: what is to be precise goes to the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import SaliencyAccumulator, squared_gradients
from lightning_prune.passes import precision
from lightning_prune.refit.class_directions import leading_directions
from lightning_prune.selection.ranking import smallest
from tests.cases import make


def test_where_float64_is() -> None:
    assert precision.precise_device(torch.device("mps")) == torch.device("cpu")
    assert precision.precise_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert precision.widest(torch.device("mps")) == torch.float32
    assert precision.widest(torch.device("cpu")) == torch.float64
    assert precision.precise(torch.ones(2)).dtype == torch.float64


def test_counts_of_a_metric_stay_where_float64_is(monkeypatch) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("meta",))
    accumulator = SaliencyAccumulator(nn.Linear(3, 2)).to("meta")
    assert all(total.is_meta for total in accumulator.sums.values())
    assert accumulator.samples_seen.device == accumulator.energy.device == torch.device("cpu")
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ())
    assert accumulator.to("meta").samples_seen.is_meta


@pytest.fixture
def deterministic():
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_find_the_same(deterministic) -> None:
    model, x = make("conv2d")
    z, keys = torch.randn(5, 4), torch.tensor([2.0, 1.0, -torch.inf, 1.0, torch.nan, 0.0])
    found = []
    for on in (False, True):
        deterministic(on)
        scores = squared_gradients(model, [x], tolerance=1e-2)
        marked = [smallest(keys, count) for count in range(1, 6)]
        found.append([*scores.values(), *leading_directions(z, 4), *marked])
    assert all(map(torch.equal, *found))
