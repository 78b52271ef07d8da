"""Directions among the classes: against the rows of all classes, by float64 autograd."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.refit import class_directions, output_saliency
from lightning_prune.refit.class_directions import TOLERANCE, leading_directions
from lightning_prune.refit.obs import obs_prices


def class_rows(logits: Tensor) -> Tensor:
    """Return dP_y / dlogits of each sample, (N, C, C)."""
    return torch.func.vmap(torch.func.jacrev(lambda z: z.softmax(0)))(logits)


def products(rows: Tensor) -> Tensor:
    """Return the sum over rows r (N, R, C) of r r^T: what all squared gradients hang on."""
    return rows.mT @ rows


def found(logits: Tensor, most: int = 64) -> Tensor:
    return torch.stack(list(leading_directions(logits, most)), 1)


def test_without_a_tolerance_they_are_the_rows_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_directions, "TOLERANCE", 0.0)
    logits = 3 * torch.randn(50, 7, dtype=torch.float64)
    torch.testing.assert_close(
        products(found(logits)), products(class_rows(logits)), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_few_hold_nearly_all_and_never_more_than_all(classes: int) -> None:
    logits = 4 * torch.randn(200, classes, dtype=torch.float64)
    few, rows = found(logits), class_rows(logits)
    assert few.shape[1] <= classes - 1  # the probabilities add up to 1: one direction is empty
    left = 1 - few.square().sum() / rows.square().sum()
    assert -1e-12 < float(left) <= TOLERANCE
    # Whatever the network makes of the logits, no square is overestimated.
    gap = products(rows) - products(few)
    assert float(torch.linalg.eigvalsh(gap).min()) > -1e-12


def test_sure_predictions_keep_their_digits() -> None:
    logits = torch.zeros(20, 5, dtype=torch.float64)
    logits[:, 2] = torch.linspace(12, 34, 20)  # the others: down to 1e-15 each
    for one in logits.split(1):
        few, p = found(one), one.softmax(1)
        small = p[0, [0, 1, 3, 4]]
        rest = small.sum()
        expected = ((1 - rest) * rest).square() + ((1 - rest) * small).square().sum()
        assert float(few.square().sum(1)[0, 2]) == pytest.approx(float(expected), rel=1e-3)


def test_of_many_classes_the_likeliest_of_each_sample_stand_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(class_directions, "TOLERANCE", 0.0)
    logits = torch.randn(30, 9, dtype=torch.float64)
    likeliest = logits.topk(4).indices[:, :, None].expand(-1, -1, 9)
    rows = class_rows(logits).gather(1, likeliest)
    torch.testing.assert_close(products(found(logits, 4)), products(rows), rtol=1e-10, atol=1e-14)


def test_of_predictions_that_cannot_move_one_empty_direction_is_left() -> None:
    logits = torch.tensor([[0.0, 900.0, 0.0]], dtype=torch.float64)
    assert torch.equal(found(logits), torch.zeros(1, 1, 3, dtype=torch.float64))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    ).double()


def test_a_dear_network_is_priced_by_few_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convnet(), torch.randn(60, 1, 12, 12, dtype=torch.float64)
    model[-1].weight.data *= 12  # as sure as a trained one
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    passes = mock.Mock(wraps=torch.autograd.grad)
    monkeypatch.setattr(torch.autograd, "grad", passes)
    few = obs_prices(model, {}, names, [x], temperature=1.0)
    assert 0 < passes.call_count < 10
    passes.reset_mock()
    monkeypatch.setattr(output_saliency, "WORK", 10**9)
    every = obs_prices(model, {}, names, [x], temperature=1.0)
    assert passes.call_count == 10
    for name in names:
        assert float((few[name] - every[name]).abs().max()) < 3e-3 * float(every[name].max())
        assert bool((few[name] <= every[name] * (1 + 1e-9)).all())
        assert not torch.equal(few[name], every[name])
