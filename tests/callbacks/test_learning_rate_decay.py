"""The rate at every step, whatever counts the steps, and after a resume."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callbacks.learning_rate_decay import LearningRateDecay
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.rewinding import Rewind
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from tests.callbacks.pruning_cases import (
    Digits,
    TrainOnly,
    fit,
    loaders,
    make_model,
    trainer,
    warnings_of,
)

BATCHES = 5  # an epoch
RATE = 0.1


class Rates(L.Callback):
    """Notes the rates that each optimizer step is made with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([float(g["lr"]) for o in trainer.optimizers for g in o.param_groups])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.after = [float(g["lr"]) for o in trainer.optimizers for g in o.param_groups]


def cosine(step: float, start: float, total: float) -> float:
    return (
        1.0 if step <= start else 0.5 * (1 + math.cos(math.pi * (step - start) / (total - start)))
    )


@pytest.mark.parametrize(("start", "first"), [(2 / 3, 10), (0.5, 7.5), (1, 5), (0, 0), (0.0, 0)])
def test_rates_stay_and_then_fall(start, first) -> None:
    rates = Rates()
    fit(LearningRateDecay(start), rates, max_epochs=3)
    expected = [RATE * cosine(step, first, 15) for step in range(15)]
    assert [rate for (rate,) in rates.seen] == pytest.approx(expected, abs=1e-12)
    assert all(rate == RATE for (rate,) in rates.seen[: int(first) + 1])
    assert rates.seen[-1][0] > 0  # the last step is one
    assert rates.after == [RATE]


def test_a_straight_line() -> None:
    rates = Rates()
    fit(LearningRateDecay(0.0, shape="linear"), rates, max_epochs=1)
    assert [r for (r,) in rates.seen] == pytest.approx([RATE * (1 - i / 5) for i in range(5)])


def test_accumulated_batches() -> None:
    rates = Rates()
    fit(LearningRateDecay(1), rates, max_epochs=2, accumulate_grad_batches=2)
    # Steps are made at batches 1, 3, 4 of each epoch.
    expected = [RATE] * 3 + [RATE * cosine(batch, 5, 10) for batch in (6, 8, 9)]
    assert [r for (r,) in rates.seen] == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [-1, 100])
def test_steps_count_where_they_end_the_fit(epochs) -> None:
    rates = Rates()
    fit(LearningRateDecay(0.5), rates, max_epochs=epochs, max_steps=8)
    assert [r for (r,) in rates.seen] == pytest.approx([RATE * cosine(s, 4, 8) for s in range(8)])
    rates = Rates()
    fit(LearningRateDecay(1), rates, max_epochs=epochs, max_steps=8)
    assert [r for (r,) in rates.seen] == pytest.approx([RATE * cosine(s, 5, 8) for s in range(8)])


class TwoGroups(Digits):
    """Manual optimization: two optimizers, two groups, one rate in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = [
            {"params": [self.net[0].weight], "lr": 0.2},
            {"params": [self.net[0].bias], "lr": 0.4},
        ]
        second = torch.optim.Adam(self.net[3].parameters(), lr=torch.tensor(0.01))
        return [torch.optim.SGD(first), second]


def test_all_groups_of_all_optimizers_keep_their_proportions() -> None:
    rates = Rates()
    torch.manual_seed(1)
    fit(LearningRateDecay(1), rates, model=TwoGroups(), max_epochs=2)
    assert len(rates.seen) == 20  # two steps a batch, and batches count
    for step, seen in enumerate(rates.seen):
        factor = cosine(step // 2, 5, 10)
        assert seen == pytest.approx([0.2 * factor, 0.4 * factor, 0.01 * factor])
    assert rates.after == pytest.approx([0.2, 0.4, 0.01])


def test_a_resumed_run_goes_on_exactly(tmp_path) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, rates = Rates(), Rates()
    first = fit(LearningRateDecay(1), whole, Save(), max_epochs=4)
    torch.load(tmp_path / "2.ckpt", weights_only=True)
    second = make_model()
    trainer(LearningRateDecay(1), rates, max_epochs=4).fit(
        second, *loaders(), ckpt_path=tmp_path / "2.ckpt"
    )
    assert rates.seen == whole.seen[15:]
    assert rates.after == [RATE]
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    # A longer fit than was planned: not stuck at the low rate of the checkpoint.
    longer = Rates()
    trainer(LearningRateDecay(0.75), longer, max_epochs=8).fit(
        make_model(), *loaders(), ckpt_path=tmp_path / "3.ckpt"
    )
    assert [r for (r,) in longer.seen] == pytest.approx(
        [RATE * cosine(step, 30, 40) for step in range(20, 40)]
    )


def test_what_the_user_does_before_the_decay_stays() -> None:
    class Warmup(L.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step < 4:
                trainer.optimizers[0].param_groups[0]["lr"] = 0.01 * (trainer.global_step + 1)

    rates = Rates()
    fit(LearningRateDecay(1), Warmup(), rates, max_epochs=2)
    assert [r for (r,) in rates.seen[:5]] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.04])
    # The decay goes on from there, whatever the optimizer was configured with.
    assert rates.seen[6][0] == pytest.approx(0.04 * cosine(6, 5, 10))


def test_a_rewind_of_the_rate_does_not_undo_the_decay() -> None:
    rates = Rates()
    pruner = SaliencyPruningCallback(
        {1: 0.5}, criterion="magnitude", rewind=Rewind("learning_rate", epoch=0)
    )
    fit(pruner, LearningRateDecay(1), rates, max_epochs=3)
    assert [r for (r,) in rates.seen[5:]] == pytest.approx(
        [RATE * cosine(step, 5, 15) for step in range(5, 15)]
    )


def test_a_rate_set_at_an_epochs_start_is_overwritten() -> None:
    class AtEpochs(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.5

    rates = Rates()
    fit(LearningRateDecay(1), AtEpochs(), rates, max_epochs=3)  # and nothing is said
    assert [r for (r,) in rates.seen] == pytest.approx(
        [0.5 * cosine(step, 5, 15) for step in range(15)]
    )


def test_a_whole_float_is_an_epoch() -> None:
    rates = Rates()
    fit(LearningRateDecay(1.0), rates, max_epochs=2)  # as a configuration file gives it
    assert rates.seen[6][0] == pytest.approx(RATE * cosine(6, 5, 10))


def test_another_callback_for_the_rate_is_refused() -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.05)
    with pytest.raises(PruningSetupError, match="StochasticWeightAveraging sets it as well"):
        fit(LearningRateDecay(1), averaging, max_epochs=2)


def test_a_second_fit_starts_again() -> None:
    rates, decay = Rates(), LearningRateDecay(0.0)
    fit(decay, rates, max_epochs=1)
    fit(copy.deepcopy(decay), rates, max_epochs=1)
    fit(
        decay,
        rates,
        model=make_model(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)),
        max_epochs=1,
    )
    assert rates.seen[:5] == rates.seen[5:10]
    assert rates.seen[10] == [1e-3]


def test_the_rate_is_logged_as_ever(tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(
        LearningRateDecay(1),
        LearningRateMonitor("step"),
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
    )
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr-SGD")
    logged = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert logged == pytest.approx([RATE * cosine(step, 5, 10) for step in range(10)])


def test_a_schedule_of_the_users_is_not_overruled() -> None:
    class Scheduled(Digits):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(PruningSetupError, match="StepLR"):
        fit(LearningRateDecay(), model=Scheduled())


def test_several_steps_a_batch_are_known_once_they_were_made() -> None:
    """Ten steps an epoch of five batches: the fit ends after 16 of the 30 that the epochs have."""
    rates = Rates()
    fit(LearningRateDecay(0.5), rates, model=TwoGroups(), max_epochs=3, max_steps=16)
    seen = [group[0] for group in rates.seen]
    assert seen[-1] < 0.2 * seen[0]
    assert all(later <= earlier for earlier, later in pairwise(seen))


def test_an_interruption_gives_the_rates_back() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                raise RuntimeError("stop")

    model = make_model()
    t = trainer(LearningRateDecay(0.1), Stop(), max_epochs=2)
    with pytest.raises(RuntimeError, match="stop"):
        t.fit(model, *loaders())
    assert t.optimizers[0].param_groups[0]["lr"] == RATE


def test_a_fit_without_an_end_is_refused() -> None:
    decay = LearningRateDecay()
    with pytest.raises(PruningSetupError, match="max_steps"):
        trainer(decay, max_epochs=2).fit(TrainOnly(), DataLoader(Stream(), 64))
    rates = Rates()
    trainer(decay, rates, max_steps=4, max_epochs=-1).fit(TrainOnly(), DataLoader(Stream(), 64))
    assert rates.seen[-1][0] == pytest.approx(RATE * cosine(3, 8 / 3, 4))


def test_a_decay_that_never_comes_is_worth_a_warning() -> None:
    with warnings_of("ends before the decay"):
        fit(LearningRateDecay(3), max_epochs=2)
    fit(LearningRateDecay(3), fast_dev_run=True)


@pytest.mark.parametrize("start", [1.5, -0.1, -1, -1.0, True])
def test_arguments_out_of_range_are_named_together(start) -> None:
    with pytest.raises(ValueError, match=r"(?s)`start`.*`shape`"):
        LearningRateDecay(start, shape="step")  # type: ignore[arg-type]


def test_a_start_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="`start`: expected"):
        LearningRateDecay("late")


class Stream(IterableDataset):
    """The same digits, without a length."""

    def __iter__(self) -> Any:
        return iter(loaders()[0].dataset)


@pytest.mark.parametrize("epochs", [4, -1])
def test_an_epoch_is_where_it_begins_also_in_a_loader_without_a_length(epochs: int) -> None:
    rates = Rates()
    run = trainer(LearningRateDecay(2), rates, max_epochs=epochs, max_steps=20)
    run.fit(TrainOnly(), DataLoader(Stream(), 64))  # and no warning, which would be an error
    expected = [RATE * cosine(step, 10, 20) for step in range(20)]
    assert [r for (r,) in rates.seen] == pytest.approx(expected)


def test_an_epoch_is_where_it_begins_also_where_accumulation_changes() -> None:
    rates = Rates()
    accumulation = GradientAccumulationScheduler({0: 5, 2: 1})
    fit(accumulation, LearningRateDecay(2), rates, max_epochs=6, max_steps=12)
    # A step in each of two epochs, then five an epoch: twelve end the fit, before the epochs do.
    expected = [RATE] * 2 + [RATE * cosine(step, 2, 12) for step in range(2, 12)]
    assert [r for (r,) in rates.seen] == pytest.approx(expected)


@pytest.mark.parametrize("with_state", [True, False])
def test_a_run_resumed_behind_the_start_knows_where_that_was(tmp_path, with_state: bool) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    first = [LearningRateDecay(1)] if with_state else []
    fit(*first, Save(), max_steps=14)
    rates = Rates()
    fit_on = trainer(LearningRateDecay(1), rates, max_epochs=-1, max_steps=20)
    with warnings_of("resuming from a checkpoint that ended before the epoch"):
        fit_on.fit(make_model(), *loaders(), ckpt_path=tmp_path / "c.ckpt")
    expected = [RATE * cosine(step, 5, 20) for step in range(13, 20)]
    assert [r for (r,) in rates.seen] == pytest.approx(expected)


def test_steps_that_end_a_fit_before_the_epoch_are_worth_a_warning() -> None:
    with warnings_of("ends before the decay"):
        fit(LearningRateDecay(3), max_epochs=10, max_steps=8)


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_time": "00:01:00:00"}])
def test_a_length_that_is_not_known_is_refused_with_what_to_do(limits: Any) -> None:
    limits = {"max_epochs": -1, **limits}
    with pytest.raises(PruningSetupError, match=r"(?s)max_steps.*limit_train_batches.*decay=False"):
        trainer(LearningRateDecay(), **limits).fit(TrainOnly(), DataLoader(Stream(), 64))


class NoRate(torch.optim.SGD):
    """Makes a rate of its own, as Adafactor with ``lr=None`` does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["lr"] = None


def test_an_optimizer_without_a_rate_is_refused() -> None:
    with pytest.raises(PruningSetupError, match=r"group of NoRate has lr=None.*decay=False"):
        fit(LearningRateDecay(), model=make_model(optimizer=NoRate))


class Warming(Digits):
    """Sets its rate by hand in the first steps, in one of the places for that."""

    steps_of_warmup, where = 4, "on_train_batch_start"

    def set_rate(self) -> None:
        if self.trainer.global_step < self.steps_of_warmup:
            self.optimizers().param_groups[0]["lr"] = 0.01 * (self.trainer.global_step + 1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.where == "on_train_batch_start":
            self.set_rate()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.where == "optimizer_step":
            self.set_rate()
        super().optimizer_step(*args, **kwargs)


@pytest.mark.parametrize("where", ["on_train_batch_start", "optimizer_step"])
def test_a_rate_that_something_else_sets_during_the_decay_is_warned_of_once(where: str) -> None:
    model = Warming()
    model.where, model.steps_of_warmup = where, 100
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(LearningRateDecay(1), model=model, max_epochs=2)
    said = [str(w.message) for w in caught if "LearningRateDecay" in str(w.message)]
    assert len(said) == 1
    # The seventh step: the sixth is the decay's first, at a factor of 1.
    assert "0.07 stands in the optimizer" in said[0]


@pytest.mark.parametrize("where", ["on_train_batch_start", "optimizer_step"])
def test_a_warm_up_before_the_decay_is_not_warned_of(where: str) -> None:
    model = Warming()
    model.where = where
    rates = Rates()
    fit(LearningRateDecay(1), rates, model=model, max_epochs=2)
    assert rates.seen[6][0] == pytest.approx(0.04 * cosine(6, 5, 10))
