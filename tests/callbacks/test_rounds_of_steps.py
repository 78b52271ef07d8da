"""Events within an epoch: rounds of optimizer steps, and where their scores come from."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_prune import SaliencyPruningCallback, squared_gradients
from tests.callbacks.pruning_cases import (
    QUIET,
    TOTAL,
    Digits,
    TrainOnly,
    Witness,
    fit,
    loaders,
    make_model,
    warnings_of,
    weights,
)

# 5 batches an epoch.
STEPS = {0: 0.3, 2: 0.6}


def zeros_by_step(pruner: Any, *, epochs: int = 2, **kwargs: Any) -> list[int]:
    witness = Witness(pruner)
    trainer = L.Trainer(max_epochs=epochs, callbacks=[pruner, witness], **{**QUIET, **kwargs})
    trainer.fit(make_model(), *loaders())
    return [count for _, count in witness.at_step]


def test_masks_come_in_force_after_the_last_step_of_a_round() -> None:
    pruner = SaliencyPruningCallback(STEPS, criterion="magnitude", every_n_train_steps=2)
    some, more = round(0.3 * TOTAL), round(0.6 * TOTAL)
    assert zeros_by_step(pruner) == [0, 0, some, some, some, some, more, more, more, more]
    assert [(r["epoch"], r["step"]) for r in pruner.history] == [(0, 2), (1, 6)]


def test_steps_of_accumulated_gradients_are_counted_not_batches() -> None:
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="magnitude", every_n_train_steps=2)
    found = zeros_by_step(pruner, accumulate_grad_batches=2)
    # Steps end with batches 1, 3, 4 (the epoch's last), 6, ...
    assert found == [0] * 4 + [TOTAL // 2] * 6


def test_an_own_loader_is_scored_at_the_moment_of_the_event() -> None:
    """R of the weights as they are after the round's last step, on the loader's data only."""

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, o: Any, b: Any, i: int) -> None:
            if trainer.global_step == 3:
                pl_module.eval()
                self.expected = squared_gradients(
                    pl_module, val, tolerance=0.0, parameters=["net.0.weight", "net.3.weight"]
                )
                pl_module.train()

    train, val = loaders()
    seen = Seen()
    pruner = SaliencyPruningCallback(
        {0: 0.5}, criterion="saliency", tolerance=0.0, every_n_train_steps=3, scoring_loader=val
    )
    torch.manual_seed(1)
    L.Trainer(max_epochs=1, callbacks=[pruner, seen], **QUIET).fit(TrainOnly(), train)
    for name, score in seen.expected.items():
        torch.testing.assert_close(pruner.scores[name], score, rtol=1e-4, atol=1e-12)
    assert pruner.history[0]["samples"] == len(val.dataset)


def test_an_own_loader_by_name_serves_epochs_too() -> None:
    class Named(TrainOnly):
        def scoring_dataloader(self) -> Any:
            return loaders()[1]

    pruner = SaliencyPruningCallback({0: 0.5}, scoring_loader="scoring_dataloader")
    torch.manual_seed(1)
    model = Named()
    L.Trainer(max_epochs=2, callbacks=[pruner], **QUIET).fit(model, loaders()[0])
    assert pruner.sparsity == 0.5
    assert pruner.history[0]["samples"] == 128
    with pytest.raises(ValueError, match="'nowhere' to name a method"):
        L.Trainer(
            max_epochs=2,
            callbacks=[SaliencyPruningCallback({0: 0.5}, scoring_loader="nowhere")],
            **QUIET,
        ).fit(make_model(), *loaders())


def test_scoring_a_loader_leaves_training_as_it_was() -> None:
    """A first event at 0 % removes nothing: the run has to end like one without a pruner."""

    class Noisy(TrainOnly):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.draws = [*getattr(self, "draws", []), float(torch.rand(()))]
            return super().training_step(batch, batch_idx)

    ends = []
    for callbacks in (
        [],
        [SaliencyPruningCallback({0: 0.0}, every_n_train_steps=3, scoring_loader=loaders()[1])],
    ):
        torch.manual_seed(1)
        model = Noisy()
        torch.manual_seed(2)
        L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET).fit(model, loaders(shuffle=True)[0])
        ends.append((weights(model), model.draws, model.net[1].running_mean))
    assert ends[0][1] == ends[1][1]
    assert torch.equal(ends[0][2], ends[1][2])
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name])


def test_without_a_loader_the_last_validation_decides() -> None:
    """Rounds before the first validation wait for it."""
    pruner = SaliencyPruningCallback({0: 0.3, 3: 0.6}, every_n_train_steps=2)
    found = zeros_by_step(pruner)
    some, more = round(0.3 * TOTAL), round(0.6 * TOTAL)
    # The validation comes after 5 steps; the next chance to decide is the step after it.
    assert found == [0] * 6 + [some] * 2 + [more] * 2
    assert [r["samples"] for r in pruner.history] == [128, 128]
    assert pruner.state_dict()["latest"] is None  # no later round will need the scores


class Resumable:
    """A loader that goes on where it was, as its state says."""

    def __init__(self, loader: Any) -> None:
        self.batches = list(loader)
        self.start = self.at = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for i in range(start, len(self.batches)):
            self.at = i + 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


@pytest.mark.parametrize("stop_at", [3, 6, 7, 8])
def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, stop_at) -> None:
    def pruner() -> SaliencyPruningCallback:
        return SaliencyPruningCallback({0: 0.3, 3: 0.6}, every_n_train_steps=2)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == stop_at:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    whole, model = pruner(), make_model()
    L.Trainer(max_epochs=3, callbacks=[whole, Save()], **QUIET).fit(
        model, Resumable(loaders()[0]), loaders()[1]
    )
    resumed, again = pruner(), make_model()
    L.Trainer(max_epochs=3, callbacks=[resumed], **QUIET).fit(
        again, Resumable(loaders()[0]), loaders()[1], ckpt_path=tmp_path / "c.ckpt"
    )
    for name, value in weights(model).items():
        assert torch.equal(value, weights(again)[name])
    assert [r["step"] for r in resumed.history] == [r["step"] for r in whole.history]


def test_a_fit_too_short_for_the_schedule_is_announced() -> None:
    pruner = SaliencyPruningCallback({5: 0.5}, criterion="magnitude", every_n_train_steps=4)
    with warnings_of("targets up to round 5, but the fit ends after round 1"):
        L.Trainer(max_steps=8, callbacks=[pruner], **QUIET).fit(make_model(), *loaders())


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_a_round_is_a_whole_number_of_steps(steps) -> None:
    with pytest.raises(ValueError, match="every_n_train_steps"):
        SaliencyPruningCallback({0: 0.5}, every_n_train_steps=steps)


def test_the_last_validation_before_max_steps_counts_the_steps_of_a_batch() -> None:
    class TwoOptimizers(Digits):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[3])
            ]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    pruner = SaliencyPruningCallback({0: 0.5})
    # Three batches of two steps: the validation after the second is the last one.
    fit(pruner, model=TwoOptimizers(), max_epochs=-1, max_steps=6, val_check_interval=2)
    assert len(pruner.history) == 1
