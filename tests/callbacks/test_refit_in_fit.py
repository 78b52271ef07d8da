"""Surviving weights that are corrected at the events of a fit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import Rewind, SaliencyPruningCallback
from lightning_prune.callbacks import refitting
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.exceptions import BatchFormatError
from tests.callbacks.pruning_cases import (
    TOTAL,
    Digits,
    Generated,
    TrainOnly,
    Witness,
    digits,
    fit,
    loaders,
    make_model,
    removed,
    trainer,
    warnings_of,
    weights,
    zeros,
)

METHODS = ["layers", "outputs"]


def train_only() -> Digits:
    torch.manual_seed(1)
    return TrainOnly()


class AroundEvents(L.Callback):
    """Compare the network before and after each event with the one that lost its weights only."""

    def __init__(self, pruner: SaliencyPruningCallback) -> None:
        self.pruner = pruner
        self.events = 0
        self.lost: list[tuple[float, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = copy.deepcopy(pl_module.net)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if len(self.pruner.history) == self.events:
            return
        self.events = len(self.pruner.history)
        x = digits()[0][-128:]
        masked = copy.deepcopy(self.before)
        with torch.no_grad():
            for name, mask in self.pruner.masks.items():
                masked.get_parameter(name.removeprefix("net.")).mul_(mask)
            nets = [net.eval()(x).softmax(1) for net in (self.before, masked, pl_module.net)]
        pl_module.net.train()
        dense, without, with_refit = nets
        self.lost.append((float((without - dense).norm()), float((with_refit - dense).norm())))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("criterion", ["taylor", "obs", "magnitude"])
def test_the_network_stays_closer_to_what_it_was(criterion, method) -> None:
    pruner = SaliencyPruningCallback({1: 0.6, 2: 0.85}, criterion=criterion, refit=method)
    around = AroundEvents(pruner)
    witness = Witness(pruner)
    model = fit(pruner, around, witness, max_epochs=4)
    assert around.events == 2
    assert all(with_refit < without for without, with_refit in around.lost)
    assert zeros(model) == removed(pruner.masks) == round(0.85 * TOTAL)
    assert witness.steps_checked > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_a_refit_resumes_bit_for_bit(tmp_path, method) -> None:
    def run(folder, resume=None) -> Digits:
        pruner = SaliencyPruningCallback({1: 0.5, 2: 0.8}, criterion="obs", refit=method)
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
        model = make_model()
        t = trainer(pruner, save, max_epochs=4, enable_checkpointing=True)
        t.fit(model, *loaders(), ckpt_path=resume, weights_only=True if resume else None)
        return model

    whole = run(tmp_path / "whole")
    for epoch in (1, 2):
        resumed = run(tmp_path / str(epoch), tmp_path / "whole" / f"epoch={epoch}.ckpt")
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_last_epoch_s_event_is_refitted_too() -> None:
    plain = fit(SaliencyPruningCallback({2: 0.8}))
    refitted = fit(SaliencyPruningCallback({2: 0.8}, refit=True))
    assert zeros(plain) == zeros(refitted) == round(0.8 * TOTAL)
    survivors = weights(plain)["net.0.weight"] != 0
    assert not torch.equal(
        weights(plain)["net.0.weight"][survivors], weights(refitted)["net.0.weight"][survivors]
    )


def test_training_numbers_do_not_depend_on_the_refit_s() -> None:
    states = []
    for refit in (False, "layers"):
        pruner = SaliencyPruningCallback({2: 0.5}, refit=refit, criterion="magnitude")
        torch.manual_seed(3)
        trainer(pruner).fit(make_model(), *loaders(shuffle=True))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_failing_refit_leaves_weights_and_masks_as_they_were(monkeypatch) -> None:
    def fail(model: nn.Module, *_) -> None:
        with torch.no_grad():
            model.net[3].bias.fill_(7.0)
        raise RuntimeError("singular")

    monkeypatch.setattr(refitting, "refit_survivors", fail)
    pruner = SaliencyPruningCallback({1: 0.5}, refit="layers")
    witness = Witness(pruner)
    model = make_model()
    with pytest.raises(RuntimeError, match="singular"):
        fit(pruner, witness, model=model)
    assert pruner.masks == {}
    assert all(torch.equal(w, witness.validated[1][n]) for n, w in weights(model).items())
    assert not bool((model.net[3].bias == 7.0).any())


def test_generated_inputs_calibrate_too() -> None:
    source = Generated()
    fit(SaliencyPruningCallback({1: 0.5}, refit="layers", criterion="obs"), source)
    assert source.asked == [128, 128]  # for the prices and for the refit
    source = Generated(inject=("train",))
    fit(SaliencyPruningCallback({1: 0.5}, refit="layers", criterion="obs"), source)
    assert source.asked == []


def test_an_own_loader_calibrates_instead_of_the_validation() -> None:
    class Counted(list):
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return super().__iter__()

    x, y = digits()
    loader = Counted([(x[:64], y[:64])])
    pruner = SaliencyPruningCallback(
        {1: 0.5}, refit="layers", criterion="magnitude", scoring_loader=loader
    )
    model = fit(pruner, model=train_only(), val=False)
    assert Counted.passes == 2  # the first look, and the event
    assert zeros(model) == round(0.5 * TOTAL)


@pytest.mark.parametrize("how", [{"refit": "layers"}, {"refit": False, "criterion": "obs"}])
def test_without_inputs_to_calibrate_by_it_is_refused(how) -> None:
    model = train_only()
    pruner = SaliencyPruningCallback({1: 0.5}, **{"criterion": "magnitude", **how})
    with pytest.raises(PruningSetupError, match="calibrated by the validation inputs"):
        fit(pruner, model=model, val=False)
    assert model.steps == 0


def test_a_refit_of_weights_that_are_thrown_away_is_refused() -> None:
    pruner = SaliencyPruningCallback({1: 0.5}, refit=True, rewind=Rewind("weights"))
    with pytest.raises(PruningSetupError, match="choose one of them"):
        fit(pruner)
    fit(SaliencyPruningCallback({1: 0.5}, refit=True, rewind=Rewind("learning_rate")))


class Embedded(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 4)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x):
        return self.net(self.table((x * 16).long()))


def test_prices_that_cannot_be_had_are_refused_before_the_first_step() -> None:
    model = Embedded()
    with pytest.raises(PruningSetupError, match=r"table\.weight"):
        fit(SaliencyPruningCallback({1: 0.5}, criterion="obs"), model=model)
    assert model.steps == 0
    fit(SaliencyPruningCallback({1: 0.5}, criterion="obs", exclude=["table.*"]), model=Embedded())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`refit` to be True, False, or one of"):
        SaliencyPruningCallback({1: 0.5}, refit="layer")


class EndOfFit(L.Callback):
    """Do something when a fit has ended, before the pruners come to it."""

    def __init__(self, act) -> None:
        self.act = act

    def on_fit_end(self, trainer, pl_module) -> None:
        self.act(trainer, pl_module)


@pytest.mark.parametrize("method", METHODS)
def test_what_another_pruner_removed_stays_removed(method) -> None:
    """The refit of weights corrects the biases beside them: not those that are pruned."""
    biases = SaliencyPruningCallback({0: 0.5}, parameters=["net.0.bias"], criterion="magnitude")
    layers = SaliencyPruningCallback({2: 0.5}, refit=method, criterion="magnitude")
    model = fit(biases, layers, max_epochs=3)
    assert len(layers.history) == 1
    mask = biases.masks["net.0.bias"]
    assert 0 < int((~mask).sum()) < len(mask)
    assert bool((model.net[0].bias[~mask] == 0).all())


@pytest.mark.parametrize("own_loader", [False, True])
def test_the_calibration_is_where_the_model_is(own_loader) -> None:
    """When a fit has ended, strategies for accelerators have taken the model back to the CPU."""
    found = []
    x, y = digits()
    loader = [(x[:64], y[:64])] if own_loader else None
    pruner = SaliencyPruningCallback({1: 0.5}, scoring_loader=loader)

    def look(trainer, pl_module) -> None:
        batches = pruner._pruner.scorer.calibration_batches(trainer)
        found.extend(tensor.device.type for batch in batches for tensor in batch)

    fit(pruner, EndOfFit(lambda trainer, module: look(trainer, module.to("meta"))))
    assert set(found) == {"meta"}


def test_an_event_that_removes_nothing_refits_nothing() -> None:
    plain, refitted = (
        fit(SaliencyPruningCallback({1: 0.0}, criterion="magnitude", refit=refit))
        for refit in (False, "layers")
    )
    for name, weight in weights(plain).items():
        assert torch.equal(weights(refitted)[name], weight)


@pytest.mark.parametrize("own", [False, True])
def test_an_error_on_one_process_is_one_on_all(monkeypatch, own) -> None:
    """Otherwise the others would wait for it for ever."""
    flags = []

    def all_reduce(flag, op) -> None:
        flags.append(int(flag))
        flag.fill_(1)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(refitting, "_share", lambda *_: pytest.fail("the others are gone"))
    if own:
        monkeypatch.setattr(refitting, "hold_out", lambda _: 1 / 0)
    seen = []

    def refit(trainer, module) -> None:
        monkeypatch.setattr(type(trainer), "world_size", 2)
        masks = {"net.0.weight": torch.zeros(24, 64, dtype=torch.bool)}
        before = copy.deepcopy(module.state_dict())
        parameters = dict(module.named_parameters())
        error, match = (ZeroDivisionError, "division") if own else (RuntimeError, "another process")
        with pytest.raises(error, match=match):
            pruner._pruner.refitter.refit(trainer, module, parameters, masks)
        seen.append(all(torch.equal(module.state_dict()[n], w) for n, w in before.items()))
        monkeypatch.undo()

    pruner = SaliencyPruningCallback({5: 0.5}, refit="layers", criterion="magnitude")
    with warnings_of("The pruning schedule has targets up to epoch 5"):
        fit(pruner, EndOfFit(refit), max_epochs=1)
    assert flags == [int(own)]
    assert seen == [True]


class TwoInputs(Digits):
    """Reads batches that the default forward cannot."""

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return nn.functional.cross_entropy(self(batch["left"] + batch["right"]), batch["y"])

    def validation_step(self, batch, batch_idx, dataloader_idx=0) -> None:
        self(batch["left"] + batch["right"])


def halves() -> DataLoader:
    x, y = digits()
    return DataLoader(
        [{"left": x[i] / 2, "right": x[i] / 2, "y": y[i]} for i in range(200)], batch_size=40
    )


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("criterion", ["magnitude", lambda _, weights: weights])
def test_batches_that_cannot_be_read_are_refused_before_the_first_step(criterion, sanity) -> None:
    def run(model: Digits, **kwargs) -> None:
        pruner = SaliencyPruningCallback({1: 0.5}, criterion=criterion, refit="layers", **kwargs)
        trainer(pruner, num_sanity_val_steps=sanity).fit(model, halves(), halves())

    model = TwoInputs()
    own = {} if sanity else {"scoring_loader": halves()}
    with pytest.raises(BatchFormatError, match="one input tensor beside its labels"):
        run(model, **own)
    assert model.steps == 0
    run(TwoInputs(), forward=lambda module, batch: module(batch["left"] + batch["right"]), **own)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_a_validation_without_samples_is_refused_before_the_first_step() -> None:
    model = make_model()
    pruner = SaliencyPruningCallback({1: 0.5}, criterion="magnitude", refit="layers")
    with pytest.raises(PruningSetupError, match="yields none"):
        trainer(pruner).fit(model, loaders()[0], DataLoader([]))
    assert model.steps == 0


def test_a_loader_that_is_used_up_is_said_to_be() -> None:
    class Once(list):
        def __iter__(self):
            found = [self.pop() for _ in range(len(self))]
            return iter(found)

    x, y = digits()
    batches = Once([(x[:64], y[:64])] * 2)
    pruner = SaliencyPruningCallback({1: 0.5}, refit="layers", scoring_loader=batches)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(pruner)
    said = " ".join(str(warning.message) for warning in caught)
    assert "scoring_loader yields no batch: the pruning event that is due in epoch 1" in said
    assert "epochs [1] were not reached: scoring_loader had no batch in these epochs" in said
    assert pruner.sparsity == 0.0


def test_an_event_that_removes_nothing_more_refits_nothing(monkeypatch) -> None:
    calls = []
    method = refitting.refit_survivors
    monkeypatch.setattr(refitting, "refit_survivors", lambda *a: calls.append(a) or method(*a))
    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.5}, refit="layers", criterion="magnitude")
    fit(pruner, max_epochs=3)
    assert len(pruner.history) == 2
    assert len(calls) == 1


def test_the_record_says_how_many_samples_priced_the_weights() -> None:
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="obs")
    fit(pruner)
    assert pruner.history[0]["samples"] == len(loaders()[1].dataset)


class Single(Digits):
    """One logit, as for a yes or no."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize(
    "how",
    [{"criterion": "obc"}, {"criterion": "magnitude", "refit": "outputs"}],
)
def test_one_logit_is_refused_before_the_first_step(how: dict[str, Any]) -> None:
    model = Single()
    with pytest.raises(ValueError, match=r"at least 2 classes.*'bernoulli'"):
        fit(SaliencyPruningCallback({0: 0.5}, **how), model=model)
    assert model.steps == 0
    fit(SaliencyPruningCallback({0: 0.5}, likelihood="gaussian", **how), model=Single())


def test_a_layerwise_refit_needs_no_classes() -> None:
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="magnitude", refit="layers")
    fit(pruner, model=Single())
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)


def test_layers_that_the_first_samples_do_not_choose_are_warned_of() -> None:
    class Routed(Digits):
        """Two samples, as a first look takes them, go another way than a batch."""

        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if len(x) <= 2 else self.net(x) + self.other(x)

    pruner = SaliencyPruningCallback({0: 0.5}, criterion="obc")
    with warnings_of(r"called none of the layers of \['other.weight'\]"):
        fit(pruner, model=Routed())
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)


class Tagger(L.LightningModule):
    """One prediction a position, from that position alone; it does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(5, 16, 1), nn.ReLU(), nn.Conv1d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_padding_counts_for_nothing(criterion: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 5, 9), torch.randint(0, 4, (64, 9))
    padded, labels = torch.cat([x, 9 * torch.randn(64, 5, 6)], 2), nn.functional.pad(y, (0, 6))
    ignored = labels.clone()
    ignored[:, 9:] = -100
    found = []
    for data in ((x, y), (padded, ignored), (padded, labels)):
        loader = DataLoader(list(zip(*data, strict=True)), batch_size=32)
        torch.manual_seed(1)
        model = Tagger()
        pruner = SaliencyPruningCallback({0: 0.6}, criterion=criterion, refit="outputs")
        trainer(pruner, max_epochs=2).fit(model, loader, loader)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    real, with_padding, misled = found
    assert torch.equal(real == 0, with_padding == 0)
    assert (real - with_padding).abs().max() < 1e-3
    assert (real - misled).abs().max() > 0.01
