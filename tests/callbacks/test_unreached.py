"""A schedule that is not carried out in full is said not to be, once, and for the right reason."""

from __future__ import annotations

import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_prune import Rewind, SaliencyPruningCallback, Selection, Threshold
from tests.callbacks.pruning_cases import Digits, fit, loaders, make_model, trainer

# Five training batches an epoch.


def told(run: Any) -> list[str]:
    """Return what the pruner warns of in a block: when targets are not reached."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    said = [str(warning.message) for warning in caught]
    return [
        line for line in said if re.search(r"not (be )?reached|left out|nothing to go back", line)
    ]


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch == 1


STOPS = {
    "early stopping": lambda: EarlyStopping("accuracy", mode="min", patience=0, min_delta=10.0),
    "should_stop": Stop,
}


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("schedule", [{0: 0.3, 2: 0.5, 4: 0.7}, {0: 0.3, 2: Threshold(1.0)}])
def test_a_fit_that_is_stopped_says_which_targets_are_left(how: str, schedule: Any) -> None:
    pruner = SaliencyPruningCallback(schedule)
    (line,) = told(lambda: fit(pruner, STOPS[how](), max_epochs=9))
    left = [epoch for epoch in schedule if epoch > 1]
    assert "The fit ended in epoch 1, before the pruning schedule did" in line
    assert f"the targets of epochs {left} were not reached" in line
    assert len(pruner.history) == 1


LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "max_steps alone": (
        {},
        {"max_epochs": -1, "max_steps": 12},
        r"up to epoch 4, but the fit ends after epoch 2 \(max_steps=12\)",
    ),
    "max_steps first": (
        {},
        {"max_epochs": 9, "max_steps": 10},
        r"up to epoch 4, but the fit ends after epoch 1 \(max_steps=10\)",
    ),
    "accumulated": (
        {},
        {"max_epochs": 9, "max_steps": 6, "accumulate_grad_batches": 2},
        r"but the fit ends after epoch 1 \(max_steps=6\)",
    ),
    "max_epochs": ({}, {"max_epochs": 2}, r"but the fit ends after epoch 1 \(max_epochs=2\)"),
    "rounds": (
        {"every_n_train_steps": 5},
        {"max_epochs": 3},
        r"The fit ended in epoch 2, .*: the targets of rounds \[4\] were not reached",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits_of_the_fit_are_told_once(case: str) -> None:
    arguments, limits, expected = LIMITS[case]
    pruner = SaliencyPruningCallback({0: 0.3, 4: 0.7}, **arguments)
    (line,) = told(lambda: fit(pruner, **limits))
    assert re.search(expected, line)


class Fail(L.Callback):
    """Interrupt the first fit at a hook of an epoch."""

    def __init__(self, hook: str, epoch: int, error: BaseException) -> None:
        self.hook, self.epoch, self.error, self.done = hook, epoch, error, False

    def _at(self, hook: str, trainer: L.Trainer) -> None:
        if hook == self.hook and not self.done and trainer.current_epoch == self.epoch:
            self.done = not trainer.sanity_checking
            if self.done:
                raise self.error

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("batch", trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._at("validation batch", trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("validation end", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("epoch end", trainer)


SILENT = {
    "all reached": ({0: 0.3, 1: 0.5}, {}),
    "a trial": ({0: 0.3, 4: 0.5}, {"fast_dev_run": True}),
    "no more asked for": ({0: 0.3, 4: 0.3}, {"callbacks": [Stop()], "max_epochs": 9}),
    "a function that stays": (lambda epoch: 0.5, {"callbacks": [Stop()], "max_epochs": 9}),
    "whole units": (
        lambda epoch: 0.21,
        {"callbacks": [Stop()], "max_epochs": 9, "selection": Selection("unit")},
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_nothing_is_said_where_nothing_is_left(case: str) -> None:
    schedule, given = SILENT[case]
    kwargs = {"max_epochs": 2, **given}
    callbacks = kwargs.pop("callbacks", [])
    chosen = {"selection": kwargs.pop("selection")} if "selection" in kwargs else {}
    pruner = SaliencyPruningCallback(schedule, exclude=["net.3.weight"], **chosen)
    assert told(lambda: fit(pruner, *callbacks, **kwargs)) == []


ERRORS = {"error": RuntimeError("disk full"), "interrupt": KeyboardInterrupt()}


@pytest.mark.parametrize("hook", ["batch", "validation batch", "validation end", "epoch end"])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("schedule", [{1: 0.5}, {0: 0.3, 1: 0.5}])
def test_a_trainer_that_goes_on_after_an_interruption_prunes_what_was_due(
    hook: str, kind: str, schedule: dict[int, float]
) -> None:
    pruner = SaliencyPruningCallback(schedule)
    t = trainer(pruner, Fail(hook, 1, ERRORS[kind]), max_epochs=4)
    model = make_model()

    def run() -> None:
        with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
            t.fit(model, *loaders())
        t.fit(model, *loaders())

    assert told(run) == []
    assert pruner.sparsity == 0.5
    assert [record["target"] for record in pruner.history] == list(schedule.values())


def test_a_way_back_outlives_an_interruption() -> None:
    pruner = SaliencyPruningCallback({2: 0.5}, rewind=Rewind("weights", epoch=0))
    t = trainer(pruner, Fail("epoch end", 1, ERRORS["error"]), max_epochs=4)
    model = make_model()
    with pytest.raises(RuntimeError, match="disk full"):
        t.fit(model, *loaders())
    assert told(lambda: t.fit(model, *loaders())) == []
    assert pruner.sparsity == 0.5


def test_a_fresh_trainer_after_an_interruption_starts_afresh() -> None:
    pruner = SaliencyPruningCallback({1: 0.5})
    with pytest.raises(RuntimeError, match="disk full"):
        fit(pruner, Fail("epoch end", 1, ERRORS["error"]))
    fit(pruner, max_epochs=1 + 2)
    assert [record["epoch"] for record in pruner.history] == [1]
    assert pruner.history[0]["step"] == 10


def test_past_targets_of_a_trainer_without_the_pruner_are_told_without_a_checkpoint() -> None:
    model, t = make_model(), trainer(max_epochs=3)
    t.fit(model, *loaders())
    t.fit_loop.max_epochs = 5
    t.callbacks.append(pruner := SaliencyPruningCallback({1: 0.5}))
    (line,) = told(lambda: t.fit(model, *loaders()))
    assert "at epoch 3, where its Trainer has come to before" in line
    assert "checkpoint" not in line
    assert pruner.sparsity == 0.0


def test_masks_below_the_last_past_share_are_told() -> None:
    masks = {"net.0.weight": torch.rand(24, 64) > 0.2}
    pruner = SaliencyPruningCallback({1: 0.5}, masks=masks)
    model, t = make_model(), trainer(max_epochs=3)
    t.fit(model, *loaders())
    t.fit_loop.max_epochs = 4
    t.callbacks.append(pruner)
    (line,) = told(lambda: t.fit(model, *loaders()))
    assert "epochs [1] are past and left out" in line


class Reload(L.Callback):
    """Loads weights of before the pruning, at the start of an epoch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.dense = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            pl_module.load_state_dict(self.dense)


def test_weights_written_at_the_start_of_an_epoch_are_masked_before_its_first_batch() -> None:
    pruner, found = SaliencyPruningCallback({0: 0.5}), []

    class Seen(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for name, mask in pruner.masks.items():
                found.append(int(self.get_parameter(name).detach()[~mask].count_nonzero()))
            return super().training_step(batch, batch_idx)

    fit(pruner, Reload(), model=Seen())
    assert len(found) == 20
    assert not any(found)
