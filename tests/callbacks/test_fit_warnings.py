"""What is said at fit start of zeros without masks and of fits of another length; and when not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import EpochSchedule, prune, recipes
from lightning_prune.callbacks import SaliencyPruningCallback
from tests.callbacks.pruning_cases import Digits, digits, loaders, make_model, trainer

ZEROS = "are exactly 0, but no mask holds them"
LENGTH = "was made for"


def said(model: Digits, *callbacks: Any, of: str = ZEROS, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks, max_epochs=options.pop("max_epochs", 2), **options).fit(
            model, *loaders()
        )
    return [str(w.message) for w in caught if of in str(w.message)]


def pruned() -> tuple[Digits, dict[str, torch.Tensor]]:
    model = make_model()
    return model, prune(model, [digits()[0][:128]], sparsity=0.9, stages=2)


def test_zeros_of_an_earlier_pruning_without_its_masks_are_told() -> None:
    model, masks = pruned()
    (message,) = said(model, SaliencyPruningCallback({0: 0.5}))
    assert message.startswith("90.0 % of the weights to prune")
    assert "`masks=`" in message
    model, masks = pruned()
    assert len(said(model, *recipes.best(0.9, 2))) == 1
    model, masks = pruned()
    some = {"net.0.weight": masks["net.0.weight"]}
    assert said(model, SaliencyPruningCallback({}, masks=some)) == []  # the rest is 9 %


def test_nothing_is_said_of_zeros_that_masks_hold(tmp_path: Any) -> None:
    model, masks = pruned()
    pruner = SaliencyPruningCallback({0: 0.95}, masks=masks)
    assert said(model, pruner) == []
    assert said(model, pruner) == []  # a second fit
    saving = SaliencyPruningCallback({0: 0.9})
    run = trainer(saving, max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(make_model(), *loaders())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = SaliencyPruningCallback({0: 0.9})
        trainer(again, max_epochs=3).fit(
            make_model(), *loaders(), ckpt_path=run.checkpoint_callback.best_model_path
        )
    assert again.sparsity == pytest.approx(0.9, abs=1e-3)
    assert not [w for w in caught if ZEROS in str(w.message)]


@pytest.mark.parametrize("kind", ["whole", "frozen"])
def test_zeros_that_belong_to_the_model_are_left_in_peace(kind: str) -> None:
    model = make_model()
    weight = model.net[0].weight
    if kind == "whole":  # such as LoRA's B, or the last layer of a residual branch
        nn.init.zeros_(weight)
    else:
        nn.init.eye_(weight)
        weight.requires_grad_(False)
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="magnitude")
    assert said(model, pruner) == []


def test_a_fit_longer_or_shorter_than_the_recipes_is_told() -> None:
    (message,) = said(make_model(), *recipes.best(0.9, 3), of=LENGTH, max_epochs=6)
    assert "3 epochs, but the fit has 6 (max_epochs=6)" in message
    assert "epochs=6" in message
    assert len(said(make_model(), *recipes.best(0.9, 6), of=LENGTH, max_epochs=5)) == 1
    model, masks = pruned()
    assert len(said(model, *recipes.best(0.9, 3, masks=masks), of=LENGTH, max_epochs=6)) == 1


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": True}, {"max_epochs": 2}])
def test_nothing_is_said_of_the_right_length_or_twice(options: dict[str, Any]) -> None:
    options = {"max_epochs": 3} | options
    callbacks = recipes.best(0.9, 3)
    if options["max_epochs"] == 2:  # its last targets are out of reach, which is said already
        callbacks = [SaliencyPruningCallback(EpochSchedule({0: 0.5, 2: 0.9}, epochs=3))]
        assert len(said(make_model(), *callbacks, of="last targets will not", **options)) == 1
    assert said(make_model(), *callbacks, of=LENGTH, **options) == []
    assert said(make_model(), SaliencyPruningCallback({0: 0.5}), of=LENGTH, max_epochs=7) == []


def test_a_schedule_is_made_for_a_number_of_epochs() -> None:
    with pytest.raises(ValueError, match="epochs: expected a whole number"):
        EpochSchedule({0: 0.5}, epochs=0)
    assert repr(EpochSchedule({0: 0.5}, epochs=3)) == "EpochSchedule(targets={0: 0.5})"
