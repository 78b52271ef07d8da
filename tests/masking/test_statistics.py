"""Sparsity over a stated denominator: exact zeros among prunable weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.masking import SparsityMetric, density, sparsity


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0
        model[0].bias.zero_()  # biases and norms do not count
        model[1].weight.zero_()
        model[2].weight[0, 0] = -0.0
    return model


def test_of_a_model() -> None:
    assert sparsity(make_model()) == (5 + 1) / (20 + 10)


def test_of_masks() -> None:
    masks = {"a": torch.tensor([True, False]), "b": torch.ones(2, 3).bool()}
    assert sparsity(masks) == 1 / 8
    assert density(masks) == {"a": 0.5, "b": 1.0}
    assert sparsity({}) == 0.0


def test_the_metric_sums_over_updates_and_forgets_on_reset() -> None:
    metric = SparsityMetric()
    metric.update(make_model())
    metric.update({"a": torch.tensor([True, False])})
    assert float(metric.compute()) == pytest.approx(7 / 32)
    metric.reset()
    metric.update({"a": torch.tensor([False])})
    assert float(metric.compute()) == 1.0


def test_the_metric_reduces_by_sums() -> None:
    # Two processes, as torchmetrics sees them: what each holds is stacked, then summed.
    def gather(tensor, group=None):
        return [tensor, torch.tensor(6) if int(tensor) == 1 else torch.tensor(10)]

    metric = SparsityMetric(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update({"a": torch.tensor([True, False])})
    assert float(metric.compute()) == pytest.approx(7 / 12)


@pytest.mark.parametrize("other", [{"a": torch.ones(3)}, [torch.ones(3).bool()], 0.5])
def test_what_is_neither_model_nor_masks_is_refused(other) -> None:
    with pytest.raises(TypeError, match="masks"):
        sparsity(other)
