"""Where the dense weights come from: a moment of the fit, or a state dict; kept, refused."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.callbacks import recipes
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from tests.callbacks.pruning_cases import (
    Digits,
    fit,
    loaders,
    make_model,
    same,
    trainer,
    warnings_of,
)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def learning(teacher: Any, **kwargs: Any) -> DistillationCallback:
    return DistillationCallback(teacher=teacher, **kwargs)


def pruner(schedule: Any = None) -> SaliencyPruningCallback:
    return SaliencyPruningCallback({1: 0.5} if schedule is None else schedule)


class First(L.Callback):
    """The divergence of the first epoch, and what the teacher is from its start on."""

    def __init__(self, callback: DistillationCallback) -> None:
        self.callback = callback
        self.teacher: dict[str, Tensor] | None = None
        self.losses: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        kept = self.callback._teacher
        self.teacher = None if kept is None else dict(kept.weights)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics.get("distill/loss", torch.nan)))


def test_the_network_that_the_fit_begins_with() -> None:
    dense = fit(max_epochs=4)
    start = copied(dense)
    ours, before = learning("fit_start"), learning("before_pruning")
    first = First(ours)
    fit(pruner(), ours, first, model=copy.deepcopy(dense), max_epochs=4)
    fit(pruner(), before, model=dense, max_epochs=4)
    assert same(ours._teacher.weights, start)
    assert same(first.teacher, start)  # from the first step on, and through the event
    assert not same(before._teacher.weights, start)


def test_the_recipe_learns_from_the_network_it_is_given() -> None:
    dense = fit(max_epochs=4)
    start = copied(dense)
    for distill in (True, 0.3):
        callbacks = recipes.best(0.9, 3, distill=distill)
        fit(*callbacks, model=copy.deepcopy(dense), max_epochs=3)
        assert same(callbacks[1]._teacher.weights, start)


def test_weights_from_before_an_offline_pruning() -> None:
    model = fit(max_epochs=4)
    dense = copied(model)
    masks = prune(model, list(loaders()[0]), sparsity=0.8)
    ours = learning(dense)
    callbacks = recipes.best(0.8, 2, masks=masks, distill=ours)
    fit(*callbacks, model=model, max_epochs=2)  # and no warning, which would be an error
    assert same(ours._teacher.weights, dense)
    assert not any(value is dense[name] for name, value in ours._teacher.weights.items())
    assert int((model.net[0].weight == 0).sum()) > 1000


@pytest.mark.parametrize("teacher", ["before_pruning", "fit_start"])
def test_a_pruned_network_without_dense_weights_is_warned_of(teacher: str) -> None:
    model = fit(max_epochs=1)
    masks = prune(model, list(loaders()[0]), sparsity=0.8)
    callbacks = recipes.best(0.8, 2, masks=masks, distill=learning(teacher))
    with warnings_of(r"has masks: given.*no weights of this model.*`teacher=copy.deepcopy"):
        fit(*callbacks, model=model, max_epochs=1)


def test_masks_given_to_a_dense_network_leave_it_to_learn_from() -> None:
    model = fit(max_epochs=1)
    dense = copied(model)
    masks = prune(copy.deepcopy(model), list(loaders()[0]), sparsity=0.8)
    ours = learning("fit_start")
    # In front of the pruner, which puts the masks in: nothing to warn of.
    fit(ours, SaliencyPruningCallback({}, masks=masks), model=model, max_epochs=1)
    assert same(ours._teacher.weights, dense)
    assert int((model.net[0].weight == 0).sum()) > 1000


def test_a_submodule_takes_its_own_names_or_those_of_the_model() -> None:
    model = fit(max_epochs=1)
    for weights in (copied(model), copied(model.net)):
        ours = learning(weights, module="net")
        fit(ours, model=copy.deepcopy(model), max_epochs=1, limit_train_batches=1)
        assert same(ours._teacher.weights, copied(model.net))


class Buffered(Digits):
    """Tied weights, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(10), persistent=False)
        self.again = self.net[3]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.shift


def test_what_a_state_dict_leaves_out_is_as_it_is() -> None:
    model = Buffered()
    ours = learning(copied(model))
    fit(ours, model=model, max_epochs=1, limit_train_batches=1)
    assert torch.equal(ours._teacher.weights["shift"], model.shift)
    assert "again.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("net.3.bias"), "'net.3.bias' is missing"),
        (lambda d: d.update(head=torch.ones(1)), "'head' is unknown"),
        (lambda d: d.update({"net.3.bias": torch.ones(3)}), r"'net.3.bias' is \(3,\) instead"),
    ],
)
def test_another_networks_state_dict_is_refused(change: Any, message: str) -> None:
    model = make_model()
    weights = copied(model)
    change(weights)
    with pytest.raises(PruningSetupError, match=rf"(?s)state dict of the model, but {message}"):
        fit(learning(weights), model=model)


def test_what_does_not_fit_within_a_submodule_is_said_of_that() -> None:
    model = make_model()
    weights = copied(model)
    weights["net.3.bias"] = torch.ones(3)
    message = r"(?s)state dict of 'net', but '3.bias' is \(3,\) instead"
    with pytest.raises(PruningSetupError, match=message):
        fit(learning(weights, module="net"), model=model)


@pytest.mark.parametrize(
    "masks", [{"nope": torch.zeros(2).bool()}, {"net.0.weight": torch.zeros(2).bool()}]
)
def test_masks_of_another_model_are_refused_in_whatever_order(masks: Any) -> None:
    pruner = SaliencyPruningCallback({1: 0.5}, masks=masks)
    for order in (1, -1):
        callbacks = [DistillationCallback(teacher="fit_start"), pruner][::order]
        with pytest.raises(PruningSetupError, match="masks of another model"):
            trainer(*callbacks, max_epochs=2).fit(make_model(), *loaders())


def test_the_models_own_tensors_are_refused() -> None:
    model = make_model()
    with pytest.raises(PruningSetupError, match="is the model's own tensor"):
        fit(learning(model.state_dict()), model=model)


def test_what_is_no_teacher_is_refused_at_once() -> None:
    for odd in ("dense", None, {}, {"state_dict": {}}, nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="`teacher`: expected"):
            learning(odd)


def test_a_later_fit_keeps_the_dense_network_of_a_pruned_one() -> None:
    ours, event, model = learning("fit_start"), pruner({0: 0.5}), make_model()
    fit(ours, model=model, max_epochs=1)  # dense still: taken anew by the next fit
    start = copied(model)
    fit(event, ours, model=model, max_epochs=2)
    assert same(ours._teacher.weights, start)
    fit(event, ours, model=model, max_epochs=1)
    fit(ours, model=model, max_epochs=1)  # and without its pruner
    assert same(ours._teacher.weights, start)
    other = make_model()
    with warnings_of("no weights of this model"):  # the pruner's masks come in force in it
        fit(event, ours, model=other, max_epochs=1)
    assert ours._teacher.weights["net.0.weight"].eq(0).any()


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_resumed_run_goes_on_with_its_dense_network(tmp_path, epoch: int) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    def resumed(teacher: Any) -> tuple[Digits, DistillationCallback]:
        ours, model = learning(teacher), make_model()
        run = trainer(pruner(), ours, max_epochs=4)
        run.fit(model, *loaders(), ckpt_path=tmp_path / "c.ckpt")
        return model, ours

    start = copied(make_model())
    whole = fit(pruner(), learning("fit_start"), Save(), max_epochs=4)
    torch.load(tmp_path / "c.ckpt", weights_only=True)
    for teacher in ("fit_start", start, "before_pruning"):
        model, ours = resumed(teacher)
        assert same(model.state_dict(), whole.state_dict())
        assert same(ours._teacher.weights, start)
    # An argument comes before the checkpoint, as the weight does.
    other = {name: value + 1 for name, value in start.items()}
    assert same(resumed(other)[1]._teacher.weights, other)


def test_a_fit_after_a_resumed_dense_one_begins_anew(tmp_path) -> None:
    ours, model = learning("fit_start"), make_model()
    run = trainer(ours, max_epochs=1)
    run.fit(model, *loaders())
    run.save_checkpoint(tmp_path / "c.ckpt")
    start = dict(ours._teacher.weights)
    trainer(ours, max_epochs=2).fit(model, *loaders(), ckpt_path=tmp_path / "c.ckpt")
    assert same(ours._teacher.weights, start)
    now = copied(model)
    fit(ours, model=model, max_epochs=1)
    assert same(ours._teacher.weights, now)


def test_a_copy_has_the_same_teacher() -> None:
    model = make_model()
    ours = learning(copied(model))
    fit(ours, model=model, max_epochs=1)
    again = pickle.loads(pickle.dumps(ours))
    assert same(again._teacher.weights, ours._teacher.weights)
    assert again._term.dense is again._dense


def test_the_moment_from_a_configuration_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("""
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_prune.DistillationCallback
      init_args: {weight: 0.2, teacher: fit_start}
""")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own calls
    monkeypatch.setattr(sys, "argv", ["run", "--config", str(file)])
    cli = LightningCLI(Digits, run=False, save_config_callback=None, seed_everything_default=False)
    ours = next(c for c in cli.trainer.callbacks if isinstance(c, DistillationCallback))
    assert ours._dense.source == "fit_start"
