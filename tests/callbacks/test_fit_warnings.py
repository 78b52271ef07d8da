"""What is said at fit start of zeros without masks and of fits of another length; and when not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import EpochSchedule, Selection, prune, recipes
from lightning_prune.callbacks import SaliencyPruningCallback
from lightning_prune.callbacks.fit_warnings import unheld_zeros
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
    assert "ignore this" in message
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


@pytest.mark.parametrize("kind", ["whole", "frozen", "identity"])
def test_zeros_that_belong_to_the_model_are_left_in_peace(kind: str) -> None:
    model = make_model()
    weight = model.net[0].weight
    if kind == "whole":  # such as LoRA's B, or the last layer of a residual branch
        nn.init.zeros_(weight)
    elif kind == "identity":  # such as the recurrent weights of a plain network
        nn.init.eye_(weight)
    else:
        weight.data.mul_(torch.rand_like(weight) > 0.9)
        weight.requires_grad_(False)
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="magnitude")
    assert said(model, pruner) == []


def bilinear(channels: int) -> torch.Tensor:
    weight = torch.zeros(channels, channels, 4, 4)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    weight[range(channels), range(channels)] = line * line[:, None]
    return weight


@pytest.mark.parametrize(
    "made",
    [
        torch.eye(8),
        0.5 * torch.eye(8, 12),
        torch.eye(12, 8),
        torch.diag(torch.rand(8) + 0.1),
        torch.eye(8).repeat(4, 1),  # an LSTM's gates
        nn.init.dirac_(torch.empty(8, 4, 3, 3)),
        nn.init.dirac_(torch.empty(8, 4, 3, 3), groups=2),
        nn.init.dirac_(torch.empty(8, 1, 3, 3), groups=8),  # depthwise
        bilinear(6),
    ],
)
def test_zeros_of_an_identity_are_told_from_those_of_a_pruning(made: torch.Tensor) -> None:
    torch.manual_seed(0)
    assert unheld_zeros({"w": nn.Parameter(made)}, {}) == 0
    zeros = int((made == 0).sum())
    scores = torch.rand(made.shape) + 0.1
    pruned = scores * (scores > scores.flatten().kthvalue(zeros).values)  # as many, anywhere
    assert unheld_zeros({"w": nn.Parameter(pruned)}, {}) == zeros / made.numel()


def test_masks_of_a_part_that_leave_a_recipe_without_stages_are_told() -> None:
    torch.manual_seed(0)
    partial = {"net.3.weight": torch.rand(10, 24) > 0.96}
    callbacks = recipes.best(0.9, 3, masks=partial)
    (message,) = said(make_model(), *callbacks, of="no pruning stages", max_epochs=3)
    assert "['net.0.weight'] have no masks" in message
    assert f"it is {100 * callbacks[0].sparsity:.1f} %" in message
    # Both of the ways out.
    whole = {"net.0.weight": torch.ones(24, 64, dtype=torch.bool), **partial}
    callbacks = recipes.best(0.9, 3, masks=whole)
    assert said(make_model(), *callbacks, of="no pruning stages", max_epochs=3) == []
    assert callbacks[0].sparsity == pytest.approx(0.9, abs=1e-3)
    callbacks = recipes.best(0.9, 3, masks=partial, exclude=["net.0.*"])
    assert said(make_model(), *callbacks, of="no pruning stages", max_epochs=3) == []


@pytest.mark.parametrize("kind", ["weight", "unit"])
def test_masks_of_all_that_make_stages_needless_are_not_told(kind: str) -> None:
    model, options = make_model(), {"selection": Selection(kind), "exclude": ["net.3.*"]}
    masks = prune(model, [digits()[0][:128]], sparsity=0.5, **options)
    callbacks = recipes.best(0.5, 3, masks=masks, criterion="taylor", **options)
    assert callbacks[0].schedule == EpochSchedule({}, 3, reached=0.5)
    assert said(model, *callbacks, of="no pruning stages", max_epochs=3) == []


def test_steps_that_end_a_fit_count_as_its_epochs() -> None:
    limits = {"max_epochs": -1, "of": LENGTH}
    (message,) = said(make_model(), *recipes.best(0.9, 3), max_steps=30, **limits)
    assert "3 epochs, but the fit has 6 (max_steps=30)" in message
    assert "or the Trainer max_epochs=3" in message
    (message,) = said(make_model(), *recipes.best(0.9, 6), max_steps=25, **limits)
    assert "or the Trainer more max_steps" in message
    assert said(make_model(), *recipes.best(0.9, 3), max_steps=15, **limits) == []


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
    with pytest.raises(ValueError, match=r"(?s)epochs: expected a whole number.*reached"):
        EpochSchedule({0: 0.5}, epochs=0, reached=1.5)
    assert repr(EpochSchedule({0: 0.5}, epochs=3)) == "EpochSchedule(targets={0: 0.5})"
