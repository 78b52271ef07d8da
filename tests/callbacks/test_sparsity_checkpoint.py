"""Best checkpoints by sparsity, and early stopping that waits for the last target."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_prune import prune, recipes, sparsity
from lightning_prune._targets import Threshold
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from lightning_prune.callbacks.sparsity_checkpoint import SparsityCheckpoint
from lightning_prune.callbacks.sparsity_stopping import SparsityEarlyStopping
from tests.callbacks.pruning_cases import (
    TOTAL,
    WEIGHTS,
    Digits,
    digits,
    loaders,
    make_model,
    trainer,
    warnings_of,
    zeros,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The pruning schedule has targets up to epoch"),
]

HARSH = {2: 0.5, 4: 0.97}  # the second event costs more than two epochs win back


def level(share: float) -> float:
    return round(round(share * TOTAL) / TOTAL, 4)


def fit(
    folder: Path,
    *others: Any,
    schedule: Any = HARSH,
    max_epochs: int = 7,
    resume: Any = None,
    **kwargs: Any,
) -> SparsityCheckpoint:
    """Return the checkpoint callback, made with ``kwargs``, after a fit of real digits."""
    save = SparsityCheckpoint(folder, **{"monitor": "accuracy", "mode": "max", **kwargs})
    pruner = SaliencyPruningCallback(schedule)
    t = trainer(pruner, save, *others, enable_checkpointing=True, max_epochs=max_epochs)
    t.fit(make_model(), *loaders(), ckpt_path=resume, weights_only=True if resume else None)
    return save


def load(path: Any) -> Digits:
    model = Digits()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])  # strict
    return model.eval()


def accuracy(model: Digits) -> float:
    x, y = digits()[0][-128:], digits()[1][-128:]
    return float((model(x).argmax(-1) == y).float().mean())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------- checkpoints


def test_the_sparse_best_is_kept_although_the_dense_model_scores_best(tmp_path) -> None:
    plain = ModelCheckpoint(tmp_path / "plain", monitor="accuracy", mode="max")
    ours = fit(tmp_path / "ours", plain)
    assert zeros(load(plain.best_model_path)) < round(0.97 * TOTAL)  # what this is against
    assert float(plain.best_model_score) > float(ours.best_model_score)
    assert zeros(load(ours.best_model_path)) == round(0.97 * TOTAL)
    assert list(ours.best_by_sparsity) == [0.0, level(0.5), level(0.97)]
    assert ours.best_by_sparsity[level(0.97)] == (
        ours.best_model_path,
        float(ours.best_model_score),
    )


def test_each_checkpoint_has_the_sparsity_in_its_name_and_the_score_it_is_kept_for(tmp_path):
    ours = fit(tmp_path)
    for share, (path, score) in ours.best_by_sparsity.items():
        model = load(path)
        assert f"sparsity={share:.4f}.ckpt" in path
        assert round(zeros(model) / TOTAL, 4) == share
        assert accuracy(model) == pytest.approx(score)
    assert files(tmp_path) == {Path(path).name for path, _ in ours.best_by_sparsity.values()}


@pytest.mark.parametrize("at_train_epoch_end", [True, False])
def test_the_best_of_a_level_is_the_best_of_all_its_epochs(tmp_path, at_train_epoch_end) -> None:
    everything = ModelCheckpoint(
        tmp_path / "all", filename="{epoch}", monitor="accuracy", mode="max", save_top_k=-1
    )
    ours = fit(tmp_path / "ours", everything, save_on_train_epoch_end=at_train_epoch_end)
    by_epoch = {
        int(re.findall(r"epoch=(\d+)", path)[0]): float(score)
        for path, score in everything.best_k_models.items()
    }
    epochs = {0.0: (0, 1, 2), level(0.5): (3, 4), level(0.97): (5, 6)}
    expected = {share: max(by_epoch[e] for e in among) for share, among in epochs.items()}
    assert {share: score for share, (_, score) in ours.best_by_sparsity.items()} == expected


def test_a_level_has_its_own_top_k_and_all_share_the_last(tmp_path) -> None:
    ours = fit(tmp_path, save_top_k=2, save_last=True, filename="{epoch}-{sparsity:.2f}")
    found = files(tmp_path)
    assert {name for name in found if "0.50" in name} == {
        f"epoch={e}-sparsity=0.50.ckpt" for e in (3, 4)
    }
    assert {name for name in found if "0.97" in name} == {
        f"epoch={e}-sparsity=0.97.ckpt" for e in (5, 6)
    }
    assert len(found) == 3 * 2 + 1
    assert len(ours.best_k_models) == 2
    assert zeros(load(tmp_path / "last.ckpt")) == round(0.97 * TOTAL)


def test_without_a_monitor_the_latest_of_each_level_is_kept(tmp_path) -> None:
    ours = fit(tmp_path, monitor=None, mode="min", filename="{epoch}")
    sparsities = [0.0, level(0.5), level(0.97)]
    latest = zip((2, 4, 6), sparsities, strict=True)
    names = [f"epoch={epoch}-sparsity={sparsity:.4f}.ckpt" for epoch, sparsity in latest]
    assert files(tmp_path) == set(names)
    assert all(score is None for _, score in ours.best_by_sparsity.values())
    assert Path(ours.best_model_path).name == names[-1]


def test_a_fixed_name_is_written_over_within_its_level_only(tmp_path) -> None:
    ours = fit(tmp_path, filename="best", enable_version_counter=False)
    assert files(tmp_path) == {f"best-sparsity={s:.4f}.ckpt" for s in ours.best_by_sparsity}
    assert len(ours.best_by_sparsity) == 3


def test_names_without_automatic_insertion(tmp_path) -> None:
    fit(
        tmp_path,
        filename="e{epoch}",
        auto_insert_metric_name=False,
        schedule={0: 0.5},
        max_epochs=1,
    )
    assert files(tmp_path) == {"e0-sparsity=0.0000.ckpt"}


def test_only_the_last_level(tmp_path) -> None:
    ours = fit(tmp_path, levels="last")
    assert list(ours.best_by_sparsity) == [level(0.97)]
    assert len(files(tmp_path)) == 1
    assert zeros(load(ours.best_model_path)) == round(0.97 * TOTAL)


def test_the_last_level_of_a_schedule_that_does_not_know_its_end(tmp_path) -> None:
    ours = fit(tmp_path, levels="last", target=0.5, schedule=HARSH.get)
    assert list(ours.best_by_sparsity) == [level(0.5), level(0.97)]


def test_a_fit_that_ends_before_the_last_level_says_so(tmp_path) -> None:
    # The masks of the last epoch's event come in force after its checkpoint.
    with warnings_of(r"levels='last'\) has saved no checkpoint.*sparsity of 0.5000"):
        ours = fit(tmp_path, levels="last", max_epochs=5)
    assert ours.best_model_path == ""
    assert ours.best_by_sparsity == {}


def test_a_metric_older_than_the_event_ranks_no_checkpoint(tmp_path) -> None:
    """Saving at every step, 5 an epoch: in epoch 2 the metric is still the dense model's."""
    steps = {"every_n_train_steps": 1, "schedule": {1: 0.97}, "save_top_k": -1, "save_last": True}
    until_then = fit(tmp_path / "until_then", max_epochs=3, **steps)
    assert list(until_then.best_by_sparsity) == [0.0]
    assert zeros(load(until_then.last_model_path)) == round(0.97 * TOTAL)
    ours = fit(tmp_path / "ours", max_epochs=4, **steps)
    assert list(ours.best_by_sparsity) == [0.0, level(0.97)]
    saved_at = sorted(int(re.findall(r"step=(\d+)", path)[0]) for path in ours.best_k_models)
    assert saved_at == [16, 17, 18, 19, 20]


def test_several_pruners_make_one_level(tmp_path) -> None:
    pruners = [
        SaliencyPruningCallback({at: 0.5}, criterion="magnitude", parameters=[name])
        for at, name in enumerate(WEIGHTS)
    ]
    ours = SparsityCheckpoint(tmp_path, monitor="accuracy", mode="max")
    t = trainer(*pruners, ours, enable_checkpointing=True, max_epochs=4)
    t.fit(make_model(), *loaders())
    assert list(ours.best_by_sparsity) == [0.0, round(64 * 24 / 2 / TOTAL, 4), 0.5]
    assert zeros(load(ours.best_model_path)) == TOTAL // 2


# ---------------------------------------------------------------------- resume


def named(save: SparsityCheckpoint) -> dict[float, Any]:
    return {s: (Path(p).name, score) for s, (p, score) in save.best_by_sparsity.items()}


@pytest.mark.parametrize("epochs", [1, 3, 4, 5, 6])
def test_rankings_survive_a_resume(tmp_path, epochs) -> None:
    whole = fit(tmp_path / "whole", save_last=True)
    fit(tmp_path / "part", save_last=True, max_epochs=epochs)
    resumed = fit(tmp_path / "part", save_last=True, resume=tmp_path / "part" / "last.ckpt")
    assert named(resumed) == named(whole)
    assert files(tmp_path / "part") - {"last-v1.ckpt"} == files(tmp_path / "whole")
    assert resumed.best_model_path == str(tmp_path / "part" / Path(whole.best_model_path).name)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_resume_in_another_folder_remembers_the_levels_passed(tmp_path, mode) -> None:
    first = fit(tmp_path / "first", mode=mode, save_last=True, max_epochs=4)
    before = files(tmp_path / "first")
    resumed = fit(tmp_path / "new", mode=mode, resume=tmp_path / "first" / "last.ckpt")
    assert resumed.best_by_sparsity[0.0] == first.best_by_sparsity[0.0]
    # The level that goes on is ranked anew: its epoch 4 is kept, better or worse than epoch 3.
    assert "epoch=4" in resumed.best_by_sparsity[level(0.5)][0]
    assert resumed.best_model_path == resumed.best_by_sparsity[level(0.97)][0]
    assert files(tmp_path / "first") == before
    assert len(files(tmp_path / "new")) == 2


def test_the_best_stays_that_of_the_highest_sparsity(tmp_path) -> None:
    """A second fit of the same callback, with a new pruner and so a dense model again."""
    save = SparsityCheckpoint(tmp_path, monitor="accuracy", mode="max")
    for schedule, epochs in (({0: 0.5}, 2), ({5: 0.9}, 4)):
        pruner = SaliencyPruningCallback(schedule)
        t = trainer(pruner, save, enable_checkpointing=True, max_epochs=epochs)
        t.fit(make_model(), *loaders())
    assert "epoch=0" not in save.best_by_sparsity[0.0][0]  # the second fit's is better
    assert save.best_model_path == save.best_by_sparsity[0.5][0]
    assert zeros(load(save.best_model_path)) == TOTAL // 2


def test_the_state_is_plain_and_its_key_an_own_one(tmp_path) -> None:
    ours = fit(tmp_path)
    states = torch.load(ours.best_model_path, weights_only=True)["callbacks"]
    state = states[ours.state_key]
    assert state["best_model_path"] == ours.best_model_path
    assert [entry["sparsity"] for entry in state["levels"]] == list(ours.best_by_sparsity)
    same = {"monitor": "accuracy", "mode": "max"}
    keys = [
        ModelCheckpoint(**same).state_key,
        *(SparsityCheckpoint(**same, levels=levels).state_key for levels in ("each", "last")),
        EarlyStopping(**same).state_key,
        SparsityEarlyStopping(**same).state_key,
    ]
    assert len(set(keys)) == 5


def test_a_test_with_the_best_takes_the_sparse_one(tmp_path) -> None:
    class Tested(Digits):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

    ours = SparsityCheckpoint(tmp_path, monitor="accuracy", mode="max")
    t = trainer(SaliencyPruningCallback(HARSH), ours, enable_checkpointing=True, max_epochs=7)
    torch.manual_seed(1)
    t.fit(model := Tested(), *loaders())
    found = t.test(model, loaders()[1], ckpt_path="best", weights_only=True, verbose=False)
    assert zeros(model) == round(0.97 * TOTAL)
    assert found[0]["accuracy"] == pytest.approx(float(ours.best_model_score))


# ---------------------------------------------------------------------- early stopping


class Worsening(Digits):
    """Real training, with a metric beside it that gets worse in every epoch."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.log("score", -float(self.current_epoch), batch_size=len(batch[0]))


def stop(*callbacks: Any, resume: Any = None, **kwargs: Any):
    torch.manual_seed(1)
    t = trainer(*callbacks, **{"max_epochs": 12, **kwargs})
    t.fit(Worsening(), *loaders(), ckpt_path=resume, weights_only=True if resume else None)
    return t


SCHEDULES = {
    "mapping": ({1: 0.5, 3: 0.8}, {}),
    "threshold": ({1: 0.5, 3: Threshold(1e-4)}, {}),
    "callable": ({1: 0.5, 3: 0.8}.get, {"target": 0.8}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("at_train_epoch_end", [True, False])
def test_stopping_waits_for_the_last_target_and_starts_afresh(kind, at_train_epoch_end) -> None:
    schedule, arguments = SCHEDULES[kind]
    when = {"mode": "max", "patience": 2, "check_on_train_epoch_end": at_train_epoch_end}
    with warnings_of(r"ended in epoch 2, before .*: the targets of epochs \[3\] were not"):
        plain = stop(SaliencyPruningCallback(schedule), EarlyStopping("score", **when))
    assert plain.current_epoch == 3  # what this is against: before the masks of epoch 3

    pruner = SaliencyPruningCallback(schedule)
    stopping = SparsityEarlyStopping("score", **arguments, **when)
    t = stop(pruner, stopping)
    # Epoch 4 is the first with the last masks; 5 and 6 are no better.
    assert stopping.stopped_epoch == 6
    assert t.current_epoch == 7
    assert float(stopping.best_score) == -4
    assert len(pruner.history) == 2


def test_an_improving_metric_is_not_stopped() -> None:
    pruner = SaliencyPruningCallback({0: 0.5})
    t = stop(pruner, SparsityEarlyStopping("score", mode="min", patience=1), max_epochs=5)
    assert t.current_epoch == 5


def test_nothing_is_stopped_by_a_threshold_before_the_last_target() -> None:
    stopping = SparsityEarlyStopping("score", mode="max", divergence_threshold=-0.5, patience=9)
    stop(SaliencyPruningCallback({3: 0.5}), stopping)
    assert stopping.stopped_epoch == 4


def test_a_metric_of_before_the_last_masks_does_not_count() -> None:
    """Checks in every epoch, validations in every second: epoch 2 still has epoch 1's metric."""
    stopping = SparsityEarlyStopping(
        "score", mode="max", patience=9, check_on_train_epoch_end=True, strict=False
    )
    stop(SaliencyPruningCallback({1: 0.5}), stopping, check_val_every_n_epoch=2, max_epochs=6)
    assert float(stopping.best_score) == -3
    assert stopping.wait_count == 2  # epochs 4 and 5


def test_events_within_an_epoch_are_waited_for() -> None:
    pruner = SaliencyPruningCallback({1: 0.5}, criterion="magnitude", every_n_train_steps=9)
    stopping = SparsityEarlyStopping("score", mode="max", patience=1)
    stop(pruner, stopping)  # round 1 ends with step 18: in force from epoch 3's last steps on
    assert (stopping.stopped_epoch, float(stopping.best_score)) == (4, -3)


def test_a_second_fit_waits_and_starts_afresh_again() -> None:
    stopping = SparsityEarlyStopping("score", mode="max", patience=2)
    stop(SaliencyPruningCallback({1: 0.5}), stopping)
    assert (stopping.stopped_epoch, float(stopping.best_score)) == (4, -2)
    stop(SaliencyPruningCallback({4: 0.5}), stopping)
    assert (stopping.stopped_epoch, float(stopping.best_score)) == (7, -5)


@pytest.mark.parametrize("epoch", [2, 3, 5])
def test_stopping_is_resumed(tmp_path, epoch) -> None:
    def callbacks():
        save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        stopping = SparsityEarlyStopping("score", mode="max", patience=2)
        return SaliencyPruningCallback({1: 0.5, 3: 0.8}), stopping, save

    stop(*callbacks(), enable_checkpointing=True)
    resumed = callbacks()
    stop(*resumed, enable_checkpointing=True, resume=tmp_path / f"epoch={epoch}.ckpt")
    assert (resumed[1].stopped_epoch, float(resumed[1].best_score)) == (6, -4)


def test_a_metric_that_is_not_there_is_missed_from_the_first_epoch_on() -> None:
    pruner, stopping = SaliencyPruningCallback({5: 0.5}), SparsityEarlyStopping("skore")
    with pytest.raises(RuntimeError, match=r"`skore` which is not available"):
        stop(pruner, stopping)
    assert pruner.history == []


# ---------------------------------------------------------------------- set-up


@pytest.mark.parametrize(
    "callback",
    [SparsityCheckpoint(monitor="accuracy"), SparsityEarlyStopping("accuracy")],
    ids=lambda c: type(c).__name__,
)
def test_a_trainer_without_a_pruner_is_refused_before_the_first_step(tmp_path, callback) -> None:
    t = trainer(callback, enable_checkpointing=True, default_root_dir=tmp_path)
    model = make_model()
    with pytest.raises(PruningSetupError, match=r"expected a SaliencyPruningCallback among"):
        t.fit(model, *loaders())
    assert model.steps == 0
    t.validate(model, loaders()[1], verbose=False)  # needs none


@pytest.mark.parametrize(
    "callback",
    [SparsityCheckpoint(levels="last"), SparsityEarlyStopping("accuracy")],
    ids=lambda c: type(c).__name__,
)
def test_a_schedule_without_an_end_needs_a_target(tmp_path, callback) -> None:
    pruner = SaliencyPruningCallback(HARSH.get)
    t = trainer(pruner, callback, enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(PruningSetupError, match=r"Say by \w+\(target=...\)"):
        t.fit(make_model(), *loaders())


@pytest.mark.parametrize("target", [1.0, 80, "0.8", Threshold(0.1)])
def test_wrong_arguments_are_refused(target) -> None:
    for make in (SparsityCheckpoint, lambda **kw: SparsityEarlyStopping("accuracy", **kw)):
        with pytest.raises(ValueError, match="Expected argument `target` to be a share"):
            make(target=target)
    with pytest.raises(ValueError, match=r"`levels` to be one of \('each', 'last'\)"):
        SparsityCheckpoint(levels="best")


def test_a_fast_dev_run_passes(tmp_path) -> None:
    save = SparsityCheckpoint(tmp_path, monitor="nothing", levels="last")
    stopping = SparsityEarlyStopping("nothing")
    t = trainer(
        SaliencyPruningCallback({0: 0.5}),
        save,
        stopping,
        fast_dev_run=True,
        enable_checkpointing=True,
    )
    t.fit(make_model(), *loaders())
    assert files(tmp_path) == set()


YAML = """
trainer:
  max_epochs: 3
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_prune.callbacks.SaliencyPruningCallback
      init_args: {schedule: {0: 0.5}}
    - class_path: lightning_prune.callbacks.sparsity_checkpoint.SparsityCheckpoint
      init_args:
        {dirpath: %s, monitor: accuracy, mode: max, levels: last, target: 0.4, save_last: true}
    - class_path: lightning_prune.callbacks.sparsity_stopping.SparsityEarlyStopping
      init_args: {monitor: accuracy, mode: max, patience: 7, target: 0.4}
"""


def test_both_from_a_yaml_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(YAML % (tmp_path / "saved"))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own calls
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={tmp_path / 'config.yaml'}"])
    cli = LightningCLI(Digits, run=False, save_config_callback=None, seed_everything_default=False)
    cli.trainer.fit(cli.model, *loaders())
    save, stopping = cli.trainer.checkpoint_callback, cli.trainer.early_stopping_callback
    assert isinstance(save, SparsityCheckpoint)
    assert list(save.best_by_sparsity) == [0.5]
    assert (save.target, save.save_last) == (0.4, True)
    assert isinstance(stopping, SparsityEarlyStopping)
    assert (stopping.target, stopping.patience) == (0.4, 7)


@pytest.mark.parametrize("target", [None, 0.95])
def test_under_masks_of_before_pruning_is_over(tmp_path, target) -> None:
    x = digits()[0][:320]
    torch.manual_seed(1)
    masks = prune(model := Worsening(), [x], sparsity=0.95, criterion="random")
    assert sparsity(masks) < 0.95  # a whole number of weights
    save = SparsityCheckpoint(
        tmp_path, monitor="accuracy", mode="max", levels="last", target=target
    )
    stopping = SparsityEarlyStopping("score", mode="max", patience=1, target=target)
    t = trainer(
        *recipes.best(0.95, 6, masks=masks),
        save,
        stopping,
        enable_checkpointing=True,
        max_epochs=6,
    )
    t.fit(model, *loaders())
    assert stopping.stopped_epoch == 1
    assert list(save.best_by_sparsity) == [level(0.95)]
