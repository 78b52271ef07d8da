"""Checkpoints: the weights their metrics were measured on, and a resume that changes nothing."""

from __future__ import annotations

import copy
import io
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune._targets import Threshold
from lightning_prune.callbacks import SaliencyPruningCallback
from tests.callbacks.pruning_cases import (
    TOTAL,
    WEIGHTS,
    Digits,
    Witness,
    digits,
    loaders,
    make_model,
    removed,
    trainer,
    warnings_of,
    zeros,
)

# Resumed runs write to a folder of their own, which ModelCheckpoint remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

SCHEDULE = {1: 0.5, 2: 0.8}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def fit_with_checkpoints(folder, *, checkpoint=None, schedule=SCHEDULE, resume=None, **kwargs):
    pruner = SaliencyPruningCallback(schedule)
    save = ModelCheckpoint(folder, save_top_k=-1, **{"filename": "{epoch}", **(checkpoint or {})})
    model = make_model(optimizer=adamw)
    options = {"enable_checkpointing": True, "max_epochs": 5, **kwargs}
    t = trainer(pruner, save, Witness(pruner), **options)
    t.fit(model, *loaders(), ckpt_path=resume, weights_only=True if resume else None)
    return pruner, model, t


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("at_train_epoch_end", [True, False])
def test_a_checkpoint_holds_the_weights_its_metrics_were_measured_on(tmp_path, at_train_epoch_end):
    when = {"save_on_train_epoch_end": at_train_epoch_end, "monitor": "accuracy", "mode": "max"}
    _, _, t = fit_with_checkpoints(tmp_path, checkpoint=when)
    x, y = digits()[0][-128:], digits()[1][-128:]
    sparse = {0: 0, 1: 0, 2: round(0.5 * TOTAL), 3: round(0.8 * TOTAL), 4: round(0.8 * TOTAL)}
    scores = {
        int(p.split("epoch=")[1][0]): v for p, v in t.checkpoint_callback.best_k_models.items()
    }
    for epoch, count in sparse.items():
        plain = Digits()
        plain.load_state_dict(load(tmp_path / f"epoch={epoch}.ckpt")["state_dict"])  # strict
        plain.eval()
        assert zeros(plain) == count
        accuracy = (plain(x).argmax(-1) == y).float().mean()
        torch.testing.assert_close(accuracy, scores[epoch])


@pytest.mark.parametrize("limits", [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 25}])
@pytest.mark.parametrize("at_train_epoch_end", [True, False])
@pytest.mark.parametrize("epoch", range(4))
def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, epoch, at_train_epoch_end, limits):
    when = {"save_on_train_epoch_end": at_train_epoch_end}
    whole, expected, _ = fit_with_checkpoints(tmp_path / "whole", checkpoint=when, **limits)
    path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
    pending = next(iter(load(path)["callbacks"].values()))
    assert any(s.get("pending") for s in load(path)["callbacks"].values()) == (epoch in SCHEDULE), (
        pending
    )
    resumed, found, _ = fit_with_checkpoints(
        tmp_path / "new", checkpoint=when, resume=path, **limits
    )
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    for name, mask in whole.masks.items():
        assert torch.equal(resumed.masks[name], mask)
    without_time = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in pruner.history]
        for pruner in (whole, resumed)
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("step", [7, 10, 12])
def test_a_run_resumed_within_an_epoch_goes_on(tmp_path, step) -> None:
    # 5 steps an epoch. Step 10 is the last of epoch 1: its validation, and so its event, is still
    # to come in the checkpoint, and Lightning goes on with epoch 2.
    when = {"every_n_train_steps": 1, "filename": "{step}"}
    fit_with_checkpoints(tmp_path / "whole", checkpoint=when, max_epochs=4)
    path = tmp_path / "whole" / f"step={step}.ckpt"
    resumed, model, _ = fit_with_checkpoints(
        tmp_path / "new", checkpoint=when, resume=path, max_epochs=4
    )
    assert resumed.history[-1]["target"] == 0.8
    assert zeros(model) == removed(resumed.masks) == round(0.8 * TOTAL)


def test_a_finished_run_resumed_from_its_last_epoch_is_pruned(tmp_path) -> None:
    # The checkpoint of the last epoch holds the weights it measured, and the event to come.
    whole, _, _ = fit_with_checkpoints(tmp_path / "whole", schedule={4: 0.5})
    path = tmp_path / "whole" / "epoch=4.ckpt"
    assert zeros_in(path) == 0
    resumed, model, _ = fit_with_checkpoints(tmp_path / "new", schedule={4: 0.5}, resume=path)
    assert zeros(model) == removed(whole.masks) == round(0.5 * TOTAL)
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in whole.masks.items())


def zeros_in(path) -> int:
    return sum(int((load(path)["state_dict"][name] == 0).sum()) for name in WEIGHTS)


def test_the_state_is_small_and_plain(tmp_path) -> None:
    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (int, float, str, torch.Tensor)

    def size(value) -> int:
        file = io.BytesIO()
        torch.save(value, file)
        return file.tell()

    pruner, _, _ = fit_with_checkpoints(tmp_path, schedule={1: 0.5, 2: Threshold(1e-3)})
    for epoch in range(5):
        state = load(tmp_path / f"epoch={epoch}.ckpt")["callbacks"][pruner.state_key]
        assert plain(state)
        assert (state["pending"] is not None) == (epoch in (1, 2))
        if state["pending"] is None:
            assert size(state) <= TOTAL / 8 + 4096


def test_masks_history_and_a_pending_event_travel_through_the_state() -> None:
    pruner = SaliencyPruningCallback({0: 0.5, 1: Threshold(1e-3)})
    states = []

    class Take(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            states.append(copy.deepcopy(pruner.state_dict()))

    trainer(pruner, Take()).fit(make_model(), *loaders())
    other = SaliencyPruningCallback({})
    other.load_state_dict(pruner.state_dict())
    assert other.history == pruner.history
    assert [r["target"] for r in other.history] == [0.5, Threshold(1e-3)]
    assert all(torch.equal(other.masks[name], mask) for name, mask in pruner.masks.items())
    other.load_state_dict(states[2])  # after the sanity check's and epoch 0's
    assert other.state_dict()["pending"]["target"] == {"threshold": 1e-3}
    assert other.state_dict()["pending"]["scores"].keys() == set(WEIGHTS)


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    fit_with_checkpoints(tmp_path)
    state = next(s for s in load(tmp_path / "epoch=3.ckpt")["callbacks"].values() if "masks" in s)
    pruner = SaliencyPruningCallback({0: 0.5})
    pruner.load_state_dict(state)
    model = make_model()
    model.net[0], model.net[1] = torch.nn.Linear(64, 25), torch.nn.Identity()
    model.net[3] = torch.nn.Linear(25, 10)
    with pytest.raises(ValueError, match=r"another model.*\n.*'net.0.weight'.*\n.*'net.3.weight'"):
        trainer(pruner).fit(model, *loaders())


def test_a_state_of_another_format_is_refused() -> None:
    state = SaliencyPruningCallback({}).state_dict()
    with pytest.raises(ValueError, match="version 99"):
        SaliencyPruningCallback({}).load_state_dict({**state, "version": 99})


def test_pruners_of_different_parameters_have_states_of_their_own() -> None:
    keys = [
        SaliencyPruningCallback({}, parameters=names).state_key
        for names in (None, WEIGHTS[:1], WEIGHTS[1:], WEIGHTS)
    ]
    assert len(set(keys)) == 4
    # What may change between two runs is not in the key, or the state would be lost:
    assert SaliencyPruningCallback({1: 0.5}, criterion="magnitude").state_key == keys[0]


def test_a_resumed_run_whose_pruner_has_other_names_says_that_masks_are_lost(tmp_path) -> None:
    fit_with_checkpoints(tmp_path)
    renamed = SaliencyPruningCallback(SCHEDULE, exclude=["net.1.*"])  # prunes the same weights
    arguments = {"ckpt_path": tmp_path / "epoch=4.ckpt", "weights_only": True}
    with warnings_of(r"what that one removed will grow back.*`parameters` and `exclude`"):
        trainer(renamed, max_epochs=6).fit(make_model(optimizer=adamw), *loaders(), **arguments)
    assert not renamed.masks
    same_names = SaliencyPruningCallback({0: 0.1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(same_names, max_epochs=6).fit(make_model(optimizer=adamw), *loaders(), **arguments)
    assert not any("will grow back" in str(warning.message) for warning in caught)
    assert removed(same_names.masks) == round(0.8 * TOTAL)


def test_masks_follow_the_weights_that_a_test_loads(tmp_path) -> None:
    class Tested(Digits):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

    pruner = SaliencyPruningCallback(SCHEDULE)
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    t = trainer(pruner, save, enable_checkpointing=True, max_epochs=4)
    model = Tested()
    t.fit(model, *loaders())
    t.test(model, loaders()[1], ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert zeros(model) == removed(pruner.masks) == round(0.5 * TOTAL)


def test_a_copy_of_the_callback_is_independent() -> None:
    pruner = SaliencyPruningCallback({0: 0.5})
    trainer(pruner, max_epochs=2).fit(make_model(), *loaders())
    other = copy.deepcopy(pruner)
    other.load_state_dict(SaliencyPruningCallback({}).state_dict())
    assert other.sparsity == 0
    assert pruner.sparsity == round(0.5 * TOTAL) / TOTAL
    trainer(copy.deepcopy(pruner), max_epochs=1).fit(make_model(), *loaders())


def test_targets_before_a_dense_checkpoint_are_left_out_with_a_warning(tmp_path) -> None:
    dense = trainer(max_epochs=3)
    dense.fit(make_model(), *loaders())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    pruner = SaliencyPruningCallback({1: 0.5, 2: 0.6, 4: 0.8})
    with warnings_of(r"goes on at epoch 3.*targets of the epochs \[1, 2\] are past"):
        trainer(pruner, max_epochs=6).fit(
            make_model(), *loaders(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True
        )
    assert [record["epoch"] for record in pruner.history] == [4]
