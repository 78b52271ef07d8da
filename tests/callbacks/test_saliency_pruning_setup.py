"""Wrong set-ups are refused before the first step, with all faults in one message."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune._targets import Threshold
from lightning_prune.callbacks import SaliencyPruningCallback
from lightning_prune.exceptions import BatchFormatError
from tests.callbacks.pruning_cases import (
    QUIET,
    WEIGHTS,
    Digits,
    TrainOnly,
    digits,
    fit,
    loaders,
    make_model,
    trainer,
    warnings_of,
    weights,
)


def refused(pruner, error, match, *, model=None, data=None, **kwargs) -> str:
    """Fit, expect an error before the first step, and return its message."""
    model = make_model() if model is None else model
    before = copy.deepcopy(model.state_dict())
    t = trainer(pruner, **kwargs)
    with pytest.raises(error, match=match) as caught:
        t.fit(model, *(data or loaders()))
    assert t.global_step == 0
    assert model.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"criterion": "tailor"}, ValueError, "Did you mean 'taylor'"),
        ({"criterion": None}, TypeError, "criterion"),
        ({"target": "probabilities"}, ValueError, "target.*'probability'"),
        ({"likelihood": "softmax"}, ValueError, "likelihood.*'categorical'"),
        ({"target": "x", "likelihood": "y"}, ValueError, "target.*likelihood"),
        ({"tolerance": 1.0}, ValueError, "tolerance"),
        ({"tolerance": "0.1"}, ValueError, "tolerance"),
        ({"forward": "net"}, TypeError, "forward"),
        ({"signs": 8}, TypeError, "RandomSigns"),
        ({"parameters": "net.0.weight"}, TypeError, "parameters"),
        ({"schedule": {2: 1.0}}, ValueError, "epoch 2"),
        ({"schedule": {2: 0.8, 4: 0.5}}, ValueError, "decrease"),
        ({"schedule": 0.5}, TypeError, "schedule"),
    ],
)
def test_arguments_are_checked_when_they_are_given(arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        SaliencyPruningCallback(**{"schedule": {0: 0.5}, **arguments})


@pytest.mark.parametrize("error", [MisconfigurationException, ValueError])
def test_unknown_parameters(error) -> None:
    pruner = SaliencyPruningCallback({0: 0.5}, parameters=["net.0.wieght", "net.3.weight"])
    refused(pruner, error, "'net.0.wieght'.*did you mean 'net.0.weight'")


def test_all_faults_are_in_one_message() -> None:
    pruner = SaliencyPruningCallback(lambda epoch: 50 - epoch, parameters=["nothing"])
    message = refused(pruner, MisconfigurationException, "cannot be used", limit_val_batches=0)
    for fault in ("epoch 0", "epoch 2", "limit_val_batches is 0", "'nothing'"):
        assert fault in message


def test_no_validation_loader() -> None:
    model = TrainOnly()
    refused(
        SaliencyPruningCallback({0: 0.5}), ValueError, "magnitude", model=model, data=loaders()[:1]
    )
    fit(SaliencyPruningCallback({}), model=TrainOnly(), val=False)  # nothing to score: no fault


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_an_empty_validation_loader() -> None:
    empty = DataLoader(TensorDataset(torch.ones(0, 64), torch.ones(0)), batch_size=4)
    data = loaders()[0], empty
    refused(SaliencyPruningCallback({0: 0.5}), ValueError, "holds none", data=data)


def test_an_event_in_an_epoch_without_validation() -> None:
    pruner = SaliencyPruningCallback({1: 0.5, 2: 0.6, 4: 0.7})
    message = refused(
        pruner, ValueError, "check_val_every_n_epoch=2", max_epochs=6, check_val_every_n_epoch=2
    )
    assert "in epoch 2, 4 (counted from 0)" in message
    pruner = SaliencyPruningCallback({2: 0.5}, criterion="magnitude")
    fit(pruner, check_val_every_n_epoch=2)
    assert len(pruner.history) == 1


def test_a_schedule_longer_than_the_fit_is_worth_a_warning() -> None:
    with warnings_of("targets up to epoch 7, but the fit ends after epoch 2"):
        fit(SaliencyPruningCallback({0: 0.5, 7: 0.9}))


def test_a_strategy_that_shards() -> None:
    t = trainer(pruner := SaliencyPruningCallback({0: 0.5}))
    t._accelerator_connector.strategy = FSDPStrategy.__new__(FSDPStrategy)
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy.*shards"):
        pruner.setup(t, make_model(), "fit")


def test_the_other_lightning_package() -> None:
    other = pytest.importorskip("pytorch_lightning")
    x, y = digits()

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    t = other.Trainer(max_epochs=1, callbacks=[SaliencyPruningCallback({0: 0.5})], **QUIET)
    with pytest.raises(
        MisconfigurationException, match=r"`import lightning as L`.*pytorch_lightning"
    ):
        t.fit(Other(), DataLoader(TensorDataset(x, y), batch_size=64))


def test_two_pruners_of_the_same_parameters() -> None:
    first = SaliencyPruningCallback({0: 0.5}, parameters=WEIGHTS)
    second = SaliencyPruningCallback({0: 0.5}, parameters=WEIGHTS[1:])
    with pytest.raises(ValueError, match=r"share \['net.3.weight'\]"):
        fit(first, second)
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(SaliencyPruningCallback({0: 0.5}), SaliencyPruningCallback({1: 0.5}))


@pytest.mark.parametrize("kwargs", [{}, {"num_sanity_val_steps": 0}])
@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_a_batch_that_the_default_forward_cannot_read(kwargs, criterion) -> None:
    class Nested(Digits):
        def validation_step(self, batch, batch_idx):
            super().validation_step((batch["inputs"]["x"], batch["y"]), batch_idx)

    def nest(samples):
        x, y = zip(*samples, strict=True)
        return {"inputs": {"x": torch.stack(x)}, "y": torch.stack(y)}

    train, val = loaders()
    data = train, DataLoader(val.dataset, batch_size=50, collate_fn=nest)
    pruner = SaliencyPruningCallback({1: 0.5}, criterion=criterion)
    if criterion == "magnitude":  # reads no batch
        trainer(pruner, **kwargs).fit(Nested(), *data)
        return
    refused(
        pruner,
        BatchFormatError,
        "forward=lambda module, batch",
        model=Nested(),
        data=data,
        **kwargs,
    )


def test_labels_missing_for_a_target_that_needs_them() -> None:
    class Unlabelled(Digits):
        def validation_step(self, batch, batch_idx):
            self.log("mean", self(batch[0]).mean())

    val = DataLoader(TensorDataset(digits()[0][-128:]), batch_size=50)
    pruner = SaliencyPruningCallback({1: 0.5}, target="label_probability")
    refused(pruner, ValueError, "labels", model=Unlabelled(), data=(loaders()[0], val))


def test_looking_at_a_batch_leaves_model_and_loader_alone() -> None:
    # Without a sanity check two samples are looked at; a generator shared with training stays.
    def run(*callbacks):
        generator = torch.Generator().manual_seed(0)
        x, y = digits()
        data = TensorDataset(x[:128], y[:128])
        train, val = (
            DataLoader(data, batch_size=32, shuffle=shuffle, generator=generator)
            for shuffle in (True, False)
        )
        model = make_model()
        t = trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0)
        t.fit(model, train, val)
        return model, generator.get_state()

    (expected, state), (found, found_state) = run(), run(SaliencyPruningCallback({1: 0.0}))
    assert torch.equal(state, found_state)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert all(module.training for module in found.modules())


def test_nan_before_the_first_event_is_the_events_affair() -> None:
    class Broken(L.Callback):
        """Nothing comes of the first validation, the sanity check."""

        def on_sanity_check_start(self, trainer, pl_module):
            pl_module.net[3].bias.data[0] = torch.nan

        def on_sanity_check_end(self, trainer, pl_module):
            pl_module.net[3].bias.data[0] = 0.0

    pruner = SaliencyPruningCallback({0: 0.5})
    fit(pruner, Broken(), max_epochs=1)
    assert len(pruner.history) == 1


def test_trainer_validate_alone_needs_nothing() -> None:
    pruner = SaliencyPruningCallback({0: Threshold(1.0)}, parameters=["nothing"])
    t = L.Trainer(callbacks=[pruner], **QUIET)
    model = make_model()
    before = weights(model)
    t.validate(model, loaders()[1], verbose=False)
    assert pruner.masks == pruner.scores == {}
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
