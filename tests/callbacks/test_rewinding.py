"""Going back at an event: the values put back are the right ones."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_prune import Rewind, SaliencyPruningCallback, sparsity
from tests.callbacks.pruning_cases import (
    QUIET,
    Digits,
    fit,
    loaders,
    make_model,
    warnings_of,
    weights,
)

SCHEDULE = {2: 0.5, 4: 0.8}


class Scheduled(Digits):
    """Adam under a cosine schedule by step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class Diary(L.Callback):
    """Write down, before the first batch of each epoch, everything that may be gone back to."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.norms: dict[int, torch.Tensor] = {}
        self.momenta: dict[int, list[torch.Tensor]] = {}
        self.rates: list[float] = []
        self.first_step: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if index == 0:
            epoch = trainer.current_epoch
            self.first_step[epoch] = len(self.rates) - 1
            self.weights[epoch] = weights(pl_module)
            self.norms[epoch] = pl_module.net[1].running_mean.clone()
            self.momenta[epoch] = [
                s["exp_avg"].clone() for s in trainer.optimizers[0].state.values() if "exp_avg" in s
            ]


def run(rewind: Rewind | None, *callbacks: Any, **kwargs: Any) -> tuple[Any, Diary]:
    torch.manual_seed(1)
    model, diary = Scheduled(), Diary()
    pruner = SaliencyPruningCallback(SCHEDULE, rewind=rewind)
    trainer = L.Trainer(max_epochs=6, callbacks=[pruner, diary, *callbacks], **QUIET)
    trainer.fit(model, *loaders(), **kwargs)
    return pruner, diary


@pytest.mark.parametrize("back_to", [0, 1])
def test_surviving_weights_take_their_earlier_values(back_to) -> None:
    _, diary = run(Rewind("weights", epoch=back_to))
    for event in (3, 5):  # the epochs in which the masks of 2 and 4 come in force
        for name, now in diary.weights[event].items():
            kept = now != 0
            assert 0 < kept.float().mean() < 1
            assert torch.equal(now, diary.weights[back_to][name] * kept)
        assert torch.equal(diary.norms[event], diary.norms[back_to])
    # ... and training had changed them in between.
    assert not torch.equal(diary.weights[2]["net.0.weight"], diary.weights[back_to]["net.0.weight"])


def test_momenta_are_the_earlier_ones_where_weights_are_kept() -> None:
    _, diary = run(Rewind("weights", epoch=1))
    kept_of = {weight.shape: weight != 0 for weight in diary.weights[3].values()}
    assert len(diary.momenta[1]) == len(diary.momenta[3]) == 6
    for before, momentum in zip(diary.momenta[1], diary.momenta[3], strict=True):
        assert before.any()
        assert torch.equal(momentum, before * kept_of.get(before.shape, True))


@pytest.mark.parametrize("what", ["weights", "learning_rate"])
def test_the_learning_rate_starts_again_from_there(what) -> None:
    _, diary = run(Rewind(what, epoch=1))
    start, event = diary.first_step[1], diary.first_step[3]
    assert diary.rates[event : event + 10] == diary.rates[start : start + 10]
    assert diary.rates[event - 1] < diary.rates[event]


def test_rewinding_the_learning_rate_keeps_the_weights() -> None:
    _, plain = run(None)
    _, diary = run(Rewind("learning_rate", epoch=1))
    # The same up to the event and in the first batch after it, different from then on.
    for name, now in diary.weights[3].items():
        assert torch.equal(now, plain.weights[3][name])
    assert not torch.equal(diary.weights[4]["net.0.weight"], plain.weights[4]["net.0.weight"])
    assert plain.rates[plain.first_step[3]] < diary.rates[diary.first_step[3]]


@pytest.mark.parametrize("what", ["weights", "learning_rate"])
def test_a_resumed_run_goes_back_to_the_same_values(tmp_path, what) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    whole, diary = run(Rewind(what, epoch=1), Save())
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert any(value["snapshot"] for value in state["callbacks"].values())
    resumed, after = run(Rewind(what, epoch=1), ckpt_path=tmp_path / "c.ckpt")
    for name, value in diary.weights[5].items():
        assert torch.equal(value, after.weights[5][name])
    assert after.rates[after.first_step[3] :] == diary.rates[diary.first_step[3] :]
    assert [r["sparsity"] for r in resumed.history] == [r["sparsity"] for r in whole.history]


def test_the_end_of_a_fit_goes_back_to_nothing() -> None:
    torch.manual_seed(1)
    pruner = SaliencyPruningCallback({1: 0.5}, rewind=Rewind("weights", epoch=0))
    diary, model = Diary(), make_model()
    start = weights(model)
    L.Trainer(max_epochs=2, callbacks=[pruner, diary], **QUIET).fit(model, *loaders())
    kept = pruner.masks["net.0.weight"]
    assert pruner.sparsity == 0.5
    assert not torch.equal(weights(model)["net.0.weight"][kept], start["net.0.weight"][kept])


def test_a_round_before_the_epoch_to_go_back_to_is_worth_a_warning() -> None:
    pruner = SaliencyPruningCallback(
        {0: 0.5}, criterion="magnitude", every_n_train_steps=2, rewind=Rewind("weights", epoch=1)
    )
    with warnings_of("nothing to go back to at the event of epoch 0"):
        L.Trainer(max_epochs=2, callbacks=[pruner], **QUIET).fit(make_model(), *loaders())
    assert pruner.sparsity == 0.5


def test_a_way_back_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        Rewind("momentum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch"):
        Rewind("weights", epoch=-1)
    with pytest.raises(ValueError, match="Rewind to epoch 2 or earlier"):
        run(Rewind("weights", epoch=3))


def test_what_others_have_written_into_the_groups_since_stays() -> None:
    model = make_model()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    pruner = SaliencyPruningCallback({3: 0.5}, rewind=Rewind("weights", epoch=1))
    with warnings.catch_warnings():  # of Lightning's: the batch norm's statistics
        warnings.simplefilter("ignore")
        fit(pruner, averaging, model=model, max_epochs=6)
    assert pruner.history[0]["epoch"] == 3
    assert sparsity(pruner.masks) == pytest.approx(0.5)


ONE, OTHER = "net.0.weight", "net.3.weight"


class Leaks(L.Callback):
    """Write down what each pruner has removed and a batch finds there all the same."""

    def __init__(self, *pruners: Any) -> None:
        self.pruners = pruners
        self.found: list[tuple[int, str]] = []
        self.momenta: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for pruner in self.pruners:
            for name, mask in pruner.masks.items():
                weight = pl_module.get_parameter(name)
                if weight.detach()[~mask].any():
                    self.found.append((trainer.current_epoch, name))
                for state in trainer.optimizers[0].state[weight].values():
                    if state is not None:
                        self.momenta.append(float(state[~mask].abs().max()))


def test_what_another_pruner_has_removed_stays_removed_after_a_rewind() -> None:
    other = SaliencyPruningCallback({1: 0.5}, parameters=[OTHER])
    back = SaliencyPruningCallback({3: 0.5}, parameters=[ONE], rewind=Rewind("weights", epoch=1))
    leaks, diary = Leaks(other, back), Diary()
    fit(other, back, diary, leaks, max_epochs=5)
    assert [len(pruner.history) for pruner in (other, back)] == [1, 1]
    kept = other.masks[OTHER]
    assert torch.equal(diary.weights[4][OTHER], diary.weights[1][OTHER] * kept)
    assert leaks.found == []
    assert leaks.momenta
    assert max(leaks.momenta) == 0.0


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_all_pruners_rank_what_was_trained_before_one_goes_back(both, turned) -> None:
    rewind = Rewind("weights", epoch=0)
    back = SaliencyPruningCallback({2: 0.5}, parameters=[ONE], rewind=rewind)
    other = SaliencyPruningCallback(
        {2: 0.5}, parameters=[OTHER], criterion="magnitude", rewind=rewind if both else None
    )
    pruners = [other, back] if turned else [back, other]
    leaks, diary = Leaks(*pruners), Diary()
    trained: dict[str, torch.Tensor] = {}

    class Note(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                trained.update(weights(pl_module))

    fit(*pruners, diary, leaks, Note(), max_epochs=4)
    assert torch.equal(other.scores[OTHER], trained[OTHER].abs())
    for name, mask in {**back.masks, **other.masks}.items():
        assert torch.equal(diary.weights[3][name], diary.weights[0][name] * mask)
    assert leaks.found == []
