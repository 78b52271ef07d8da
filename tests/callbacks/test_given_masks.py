"""Masks to begin with: pruned without a Trainer, trained in one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_prune import prune, recipes
from lightning_prune.callbacks import SaliencyPruningCallback
from lightning_prune.callbacks.preflight import PruningSetupError
from tests.callbacks.pruning_cases import (
    TOTAL,
    WEIGHTS,
    Digits,
    Witness,
    digits,
    loaders,
    make_model,
    removed,
    same,
    trainer,
    zeros,
)


def pruned(share: float = 0.8):
    """Return a model pruned as a user without a Trainer prunes it, and its masks."""
    model = make_model()
    x, y = digits()
    masks = prune(
        model, [(x[:128], y[:128])], sparsity=share, stages=3, criterion="obs", refit=True
    )
    return model, masks


def test_masks_of_prune_are_kept_while_training_goes_on() -> None:
    model, masks = pruned()
    before = copy.deepcopy(model.state_dict())
    pruner = SaliencyPruningCallback({}, masks=masks)
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)
    witness = Witness(pruner)
    trainer(pruner, witness, max_epochs=2).fit(model, *loaders())
    assert witness.steps_checked > 0
    assert {count for _, count in witness.at_step} == {round(0.8 * TOTAL)}
    assert same(pruner.masks, masks)
    assert pruner.history == []
    assert not torch.equal(model.net[0].weight, before["net.0.weight"])


def test_the_schedule_goes_on_from_them() -> None:
    model, masks = pruned(0.5)
    pruner = SaliencyPruningCallback({0: 0.3, 1: 0.9}, masks=masks)
    trainer(pruner, max_epochs=3).fit(model, *loaders())
    assert [record["epoch"] for record in pruner.history] == [1]
    assert zeros(model) == round(0.9 * TOTAL)
    for name, mask in masks.items():
        assert not (pruner.masks[name] & ~mask).any()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_the_recipe_trains_what_was_pruned_before() -> None:
    model, masks = pruned(0.9)
    callbacks = recipes.best(0.9, epochs=3, masks=masks, batch_norm=False)
    trainer(*callbacks, max_epochs=3).fit(model, loaders()[0])  # no event needs a validation
    assert same(callbacks[0].masks, masks)
    assert callbacks[0].history == []
    assert len(recipes.best(0.95, epochs=3, masks=masks)[0].schedule.targets) == 2  # not there yet
    assert zeros(model) == round(0.9 * TOTAL)


def test_masks_of_some_parameters_leave_the_others_to_events() -> None:
    model, masks = pruned(0.5)
    first = {WEIGHTS[0]: masks[WEIGHTS[0]]}
    gone = removed(first)
    pruner = SaliencyPruningCallback({0: 0.95}, masks=first)
    trainer(pruner, max_epochs=2).fit(model := make_model(), *loaders())
    assert gone < zeros(model) == round(0.95 * TOTAL)
    assert not (pruner.masks[WEIGHTS[0]] & ~first[WEIGHTS[0]]).any()


def test_they_are_logged_from_the_first_epoch_on(tmp_path) -> None:
    model, masks = pruned()
    logger = CSVLogger(tmp_path)
    pruner = SaliencyPruningCallback({}, masks=masks)
    t = trainer(pruner, max_epochs=1, logger=logger)
    t.fit(model, *loaders())
    assert float(t.callback_metrics["prune/sparsity"]) == pytest.approx(pruner.sparsity)
    density = float(t.callback_metrics[f"prune/density/{WEIGHTS[0]}"])
    assert density == pytest.approx(float(masks[WEIGHTS[0]].float().mean()))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoints_masks_come_before_them(tmp_path) -> None:
    model, masks = pruned(0.5)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    pruner = SaliencyPruningCallback({0: 0.8}, masks=masks)
    trainer(pruner, saving, max_epochs=2, enable_checkpointing=True).fit(model, *loaders())
    again = SaliencyPruningCallback({0: 0.8}, masks=masks)
    options = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    saving = ModelCheckpoint(tmp_path / "again", save_last=True)
    t = trainer(again, saving, max_epochs=3, enable_checkpointing=True)
    t.fit(make_model(), *loaders(), **options)
    assert same(again.masks, pruner.masks)


@pytest.mark.parametrize("masks", [[torch.ones(2, dtype=torch.bool)], {"w": torch.ones(2)}])
def test_what_is_no_mask_is_refused(masks) -> None:
    with pytest.raises(TypeError, match="bool tensors"):
        SaliencyPruningCallback({}, masks=masks)


def test_names_of_a_part_of_the_module_are_refused_before_the_first_step() -> None:
    model, masks = pruned()
    part = {name.removeprefix("net."): mask for name, mask in masks.items()}
    pruner = SaliencyPruningCallback({}, masks=part)
    with pytest.raises(PruningSetupError, match=r"(?s)0.weight.*not there.*prune the module"):
        trainer(pruner).fit(model, *loaders())
    assert model.steps == 0


class Scaled(Digits):
    """Has a scale that is no matrix, and was one to the pruner until it looked at shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gamma)


def earlier_masks() -> dict[str, Tensor]:
    return {"gamma": torch.arange(64)[None] % 2 == 0, WEIGHTS[1]: torch.rand(10, 24) > 0.5}


@pytest.mark.parametrize("names", [None, ["gamma*", "net.*"]])
def test_masks_of_what_is_not_pruned_by_default_any_more_are_kept(names: Any) -> None:
    masks = earlier_masks()
    pruner = SaliencyPruningCallback({1: 0.6}, masks=masks, parameters=names)
    assert "gamma" in pruner.plan(Scaled(), 3).parameters
    for _ in range(2):  # a second fit, too
        model = Scaled()
        trainer(pruner, max_epochs=3).fit(model, *loaders())
        assert not model.gamma[~masks["gamma"]].any()
        assert model.gamma.any()
    assert pruner.sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_checkpoint_from_before_goes_on(tmp_path) -> None:
    masks = earlier_masks()
    old = SaliencyPruningCallback({0: 0.3}, masks=masks)  # the same key as without `masks`
    run = trainer(old, max_epochs=2)
    run.fit(Scaled(), *loaders())
    run.save_checkpoint(tmp_path / "last.ckpt")
    pruner, model = SaliencyPruningCallback({0: 0.3, 3: 0.6}), Scaled()
    options = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    trainer(pruner, max_epochs=5).fit(model, *loaders(), **options)
    assert [record["epoch"] for record in pruner.history] == [0, 3]
    assert not model.gamma[~masks["gamma"]].any()
    assert set(pruner.masks) == {"gamma", *WEIGHTS}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exclude": ["gamma"]}, "excluded by 'gamma'"),
        ({"parameters": ["net.*"]}, "not named"),
    ],
)
def test_masks_of_what_is_to_be_left_alone_are_refused(options: Any, reason: str) -> None:
    pruner = SaliencyPruningCallback({}, masks=earlier_masks(), **options)
    said = f"(?s)leave alone.*'gamma': {reason}.*`parameters`"
    with pytest.raises(PruningSetupError, match=said):
        trainer(pruner).fit(Scaled(), *loaders())
