"""What our callbacks' own passes show to those of us that watch the user's steps: nothing."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune.callbacks import recipes
from lightning_prune.callbacks.batch_norm_statistics import BatchNormStatistics
from lightning_prune.callbacks.fed_inputs import first_call
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


class Placed(Digits):
    """Begins with a layer that is fed the same whatever the batch."""

    def __init__(self, scale: float, places: int) -> None:
        torch.manual_seed(1)
        super().__init__()
        self.scale, self.places = scale, places
        self.place = nn.Embedding(places, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = self.place(torch.arange(self.places)).reshape(1, -1)
        return self.net(x + place.repeat(1, 64 // self.places))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0] / self.scale), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0] / self.scale)


@pytest.mark.parametrize("places", [8, 64])  # 64 is the training batches' size, too
@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_a_layer_that_is_fed_a_constant_says_nothing(scale, places) -> None:
    model = Placed(scale, places)
    assert said([BatchNormStatistics()], model) == ([] if scale == 1 else [NORMS])
    assert model.net[1].num_batches_tracked == (5 if scale == 1 else 15)


def test_the_first_call_is_told_by_the_order_of_the_samples() -> None:
    x = loaders()[0].dataset.tensors[0]
    model, recurrent = Digits().eval(), nn.RNN(8, 3)

    def over_time(x: torch.Tensor) -> torch.Tensor:
        return recurrent(x.reshape(-1, 8, 8).transpose(0, 1))

    layer, fed = first_call(model, model, x[:2])
    assert layer is model.net[0]
    assert torch.equal(fed, x[:2])
    assert first_call(model, model, x[:1]) is None
    assert first_call(recurrent, over_time, x[:16])[0] is recurrent


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_a_scripted_part_is_not_looked_into(scale) -> None:
    class Scripted(Placed):
        def __init__(self) -> None:
            super().__init__(scale, 64)
            self.first = torch.jit.script(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(self.first(x))

    model = Scripted()
    assert said([BatchNormStatistics()], model) == ([] if scale == 1 else [NORMS])
    assert model.net[1].num_batches_tracked == (5 if scale == 1 else 15)
    assert not any(part._forward_pre_hooks for part in model.net.modules())
    assert not model._forward_pre_hooks


def test_one_copy_of_the_input_is_kept_however_deep_it_goes() -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            alive = (part for part in gc.get_objects() if type(part) is torch.Tensor)
            self.copies = sum(part.shape == x.shape for part in alive)
            return x

    def copies(depth: int) -> int:
        inner = model = Counting()
        for _ in range(depth):
            model = nn.Sequential(model)
        assert first_call(model, model, torch.rand(7, 1237))[0] is inner
        return inner.copies

    assert copies(8) == copies(1)
