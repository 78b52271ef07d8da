"""What our callbacks' own passes show to those of us that watch the user's steps: nothing."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune.callbacks import recipes
from lightning_prune.callbacks.batch_norm_statistics import BatchNormStatistics
from tests.callbacks.pruning_cases import Digits, loaders, trainer

PRUNER = "validation_step calls the model with another tensor"
NORMS = "running statistics stay as training left them"


class Scaling(Digits):
    """Prepares its input in its steps, where no pass over a batch can see it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0] / 255), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0] / 255)


def said(callbacks: list[L.Callback], model: Digits, val: int = 128, **kwargs: Any) -> list[str]:
    """Which of the two warnings a fit gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks, **kwargs).fit(model, *loaders(val=val))
    messages = [str(warning.message) for warning in caught]
    return [text for text in (PRUNER, NORMS) if any(text in message for message in messages)]


@pytest.mark.parametrize("val", [128, 50])  # the first batch is scored by an event if it is alone
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("criterion", ["taylor", "obc"])
def test_both_see_a_step_that_prepares_its_input(criterion, first, sanity, val) -> None:
    torch.manual_seed(1)
    model = Scaling()
    *others, norms = recipes.best(0.6, 3, criterion=criterion)
    assert isinstance(norms, BatchNormStatistics)
    callbacks = [norms, *others] if first else [*others, norms]
    assert said(callbacks, model, val, num_sanity_val_steps=sanity) == [PRUNER, NORMS]
    # Of inputs 255 times larger they would be larger, too.
    assert model.net[1].num_batches_tracked == 15
    x = loaders()[0].dataset.tensors[0]
    with torch.no_grad():
        assert model.net[1].running_mean.abs().max() < 0.1 * model.net[0](x).abs().max()


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("criterion", ["taylor", "obc"])
def test_both_let_a_step_pass_that_does_not(criterion, first, sanity) -> None:
    torch.manual_seed(1)
    model = Digits()
    *others, norms = recipes.best(0.6, 3, criterion=criterion)
    callbacks = [norms, *others] if first else [*others, norms]
    assert said(callbacks, model, num_sanity_val_steps=sanity) == []
    assert model.net[1].num_batches_tracked == 5  # of the pass at the end
