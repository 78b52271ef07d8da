"""Running statistics against plain averages over the batches, and all else as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks.batch_norm_pass import average, batch_norms, estimate_statistics
from lightning_prune.callbacks.batch_norm_statistics import BatchNormStatistics
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from tests.callbacks.pruning_cases import (
    Digits,
    TrainOnly,
    digits,
    fit,
    loaders,
    make_model,
    warnings_of,
)
from tests.callbacks.pruning_cases import trainer as make_trainer


def averages(model: Digits, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over batches of the first layer's batch means and unbiased variances, in float64."""
    layer = copy.deepcopy(model.net[0]).double()
    seen = [layer(x.double()).detach() for x, *_ in batches]
    means = torch.stack([z.mean(0) for z in seen]).mean(0)
    return means, torch.stack([z.var(0, unbiased=True) for z in seen]).mean(0)


def check(model: Digits, batches: Any) -> None:
    mean, variance = averages(model, batches)
    norm = model.net[1]
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)


def test_statistics_are_averages_over_the_training_batches() -> None:
    model = fit(BatchNormStatistics(), max_epochs=2)
    check(model, loaders()[0])
    twin = copy.deepcopy(model)
    update_bn(loaders()[0], twin)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    assert model.net[1].momentum == 0.1
    assert all(module.training for module in model.modules())


def test_they_are_not_what_training_leaves() -> None:
    with pytest.raises(AssertionError):
        check(fit(max_epochs=2), loaders()[0])


def test_some_batches_are_enough() -> None:
    model = fit(BatchNormStatistics(2), max_epochs=1)
    check(model, list(loaders()[0])[:2])


def test_they_are_those_of_the_pruned_network_also_after_an_event_at_the_end() -> None:
    pruner = SaliencyPruningCallback({1: 0.5, 2: 0.9})
    model = fit(pruner, BatchNormStatistics(), max_epochs=3)  # the last event is at the very end
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    assert int((model.net[0].weight == 0).sum()) > 1000
    check(model, loaders()[0])


def test_the_last_validation_and_checkpoint_have_them(tmp_path) -> None:
    class Look(L.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.mean = pl_module.net[1].running_mean.clone()

    look, saving = Look(), ModelCheckpoint(tmp_path, "last-{epoch}", every_n_epochs=1)
    model = fit(BatchNormStatistics(), look, saving, max_epochs=2, enable_checkpointing=True)
    assert torch.equal(look.mean, model.net[1].running_mean)
    saved = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_mean"], model.net[1].running_mean)


@pytest.mark.parametrize("how", [{"max_steps": 7}, {"max_epochs": -1, "max_steps": 7}])
def test_the_end_may_be_a_number_of_steps(how) -> None:
    check(fit(BatchNormStatistics(), **how), loaders()[0])


def test_the_end_may_come_early() -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    check(fit(BatchNormStatistics(), Stop(), max_epochs=5), loaders()[0])


def test_averaged_weights_have_statistics_of_their_own() -> None:
    model = fit(EMAWeightAveraging(decay=0.9), BatchNormStatistics(), max_epochs=2)
    check(model, loaders()[0])


def test_nothing_else_changes() -> None:
    states = []
    for callbacks in ([BatchNormStatistics()], []):
        torch.manual_seed(5)
        model = make_model()
        generator = torch.Generator().manual_seed(3)
        x, y = digits()
        shuffled = DataLoader(
            TensorDataset(x[:320], y[:320]), 64, shuffle=True, generator=generator
        )
        make_trainer(*callbacks, max_epochs=2).fit(model, shuffled, loaders()[1])
        states.append((model, torch.get_rng_state(), generator.get_state()))
    (one, *random), (other, *as_before) = states
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(random, as_before, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.net[1].running_mean, other.net[1].running_mean)


def test_dropout_and_frozen_norms() -> None:
    """Dropout is off in the pass; a norm in eval mode, or without statistics, is not touched."""

    class Mixed(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(64, 24),
                nn.BatchNorm1d(24),
                nn.Dropout(0.5),
                nn.BatchNorm1d(24),
                nn.BatchNorm1d(24, track_running_stats=False),
                nn.Linear(24, 10),
            )

        def on_train_epoch_start(self) -> None:
            self.net[3].eval()

    torch.manual_seed(1)
    model = Mixed()
    fit(BatchNormStatistics(), model=model, max_epochs=1)
    check(model, loaders()[0])
    assert not model.net[3].running_mean.any()
    assert not model.net[3].training
    assert model.net[2].training
    assert model.net[4].running_mean is None


def test_a_model_without_batch_norm_costs_no_pass() -> None:
    class Plain(TrainOnly):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 10))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.net(x)

    model = Plain()
    fit(BatchNormStatistics(), model=model, val=False, max_epochs=1)
    assert model.calls == 5


def test_a_loader_that_is_used_up_leaves_them_as_they_are() -> None:
    class Once(torch.utils.data.IterableDataset):
        def __init__(self) -> None:
            self.left = list(zip(*digits(), strict=True))[:64]

        def __iter__(self) -> Any:
            while self.left:
                yield self.left.pop()

    model = make_model()
    with warnings_of("no batches a second time"):
        make_trainer(BatchNormStatistics(), max_epochs=1).fit(model, DataLoader(Once(), 32))
    assert model.net[1].running_mean.any()


def test_a_forward_of_the_users() -> None:
    x, _ = digits()
    batches = DataLoader(TensorDataset(torch.zeros(96), x[:96]), 32)

    class Odd(TrainOnly):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch[1]).square().mean()

    model = Odd()
    ours = BatchNormStatistics(forward=lambda module, batch: module(batch[1]))
    make_trainer(ours, max_epochs=1).fit(model, batches)
    check(model, [(x,) for _, x in batches])


class Several(TrainOnly):
    """Returns more than logits, which running statistics do not care for."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x), x

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0])[0], batch[1])


class Distant(Several):
    """Takes two arguments."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.net(x * scale)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0], torch.ones(1)), batch[1])


def test_an_output_of_any_form_will_do() -> None:
    model = Several()
    make_trainer(BatchNormStatistics(), max_epochs=1).fit(model, loaders()[0])
    check(model, loaders()[0])


def test_what_cannot_be_run_is_said_before_the_first_step() -> None:
    model = Distant()
    with pytest.raises(PruningSetupError, match=r"(?s)BatchNormStatistics.*forward=.*batch_norm"):
        make_trainer(BatchNormStatistics(), max_epochs=1).fit(model, loaders()[0])
    assert model.steps == 0


def test_a_stream_without_an_end_is_read_as_far_as_the_fit_has() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return cycle(zip(*digits(), strict=True))

    model = TrainOnly()
    stream = DataLoader(Stream(), 32)
    make_trainer(BatchNormStatistics(), max_epochs=-1, max_steps=5).fit(model, stream)
    check(model, list(islice(stream, 5)))


def test_averaged_weights_that_would_come_later_are_refused() -> None:
    with pytest.raises(PruningSetupError, match="behind EMAWeightAveraging"):
        fit(BatchNormStatistics(), EMAWeightAveraging(decay=0.9), max_epochs=1)


def test_after_an_exception_all_is_as_before() -> None:
    model = make_model().train()
    model(digits()[0][:64])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="half-way"):
        estimate_statistics(model, list(batch_norms(model).values()), list(loaders()[0]), _break())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.net[1].momentum == 0.1
    assert model.training
    assert model.net[1].training


def _break() -> Any:
    calls = []

    def forward(module: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("half-way")
        return module(batch[0])

    return forward


@pytest.mark.parametrize("batches", [0, 1.5, -1])
def test_a_number_of_batches_that_cannot_be(batches) -> None:
    with pytest.raises(ValueError, match="batches"):
        BatchNormStatistics(batches)


class WithHead(Digits):
    """Has an auxiliary head, which only training_step calls, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8))
        self.idle = nn.BatchNorm1d(3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        hidden = self.net[:3](batch[0])
        loss = nn.functional.cross_entropy(self.net[3](hidden), batch[1])
        return loss + 0.1 * self.head(5 * hidden + 3).square().mean()


def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    torch.manual_seed(1)
    model = WithHead()
    with warnings_of(r"statistics of head\.1 stay as training left them"):
        fit(BatchNormStatistics(), model=model, max_epochs=2)
    check(model, loaders()[0])
    torch.manual_seed(1)
    plain = fit(model=WithHead(), max_epochs=2)
    assert model.head[1].num_batches_tracked == 10
    for name, value in plain.head[1].named_buffers():
        assert torch.equal(value, dict(model.head[1].named_buffers())[name])


class Scaling(Digits):
    """Prepares its input in its steps, as the batch holds it 255 times too large."""

    scales: tuple[float, float] = (255.0, 255.0)
    hidden = False  # whether the steps call the submodule

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if self.hidden else self(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        z = self.call(batch[0] / self.scales[0])
        return nn.functional.cross_entropy(z, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.call(batch[0] / self.scales[1])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("sanity", [0, 2])
def test_inputs_that_a_step_prepares_are_not_guessed(hidden: bool, sanity: int) -> None:
    models = []
    for callbacks in ([BatchNormStatistics()], []):
        torch.manual_seed(1)
        model = Scaling()
        model.hidden = hidden
        ours = warnings_of("stay as training left them.*`forward=")
        with ours if callbacks else nullcontext():
            fit(*callbacks, model=model, max_epochs=2, num_sanity_val_steps=sanity)
        models.append(model)
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, other)
    assert not any(part._forward_pre_hooks for part in models[0].modules())


def test_a_forward_that_repeats_the_preparation_is_taken() -> None:
    torch.manual_seed(1)
    model = Scaling()
    ours = BatchNormStatistics(forward=lambda module, batch: module(batch[0] / 255))
    fit(ours, model=model, max_epochs=1)
    check(model, [(x / 255,) for x, _ in loaders()[0]])


def test_steps_that_call_a_submodule_with_the_batch_are_in_order() -> None:
    torch.manual_seed(1)
    model = Scaling()
    model.hidden, model.scales = True, (1.0, 255.0)
    fit(BatchNormStatistics(), model=model, max_epochs=1)
    check(model, loaders()[0])


class Noisy(Digits):
    """Augments at random in its training step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0] + 0.1 * torch.randn_like(batch[0])
        return nn.functional.cross_entropy(self(x), batch[1])


@pytest.mark.parametrize("sanity", [0, 2])
def test_random_augmentation_is_in_order_where_the_validation_step_agrees(sanity: int) -> None:
    torch.manual_seed(1)
    model = Noisy()
    fit(BatchNormStatistics(), model=model, max_epochs=2, num_sanity_val_steps=sanity)
    check(model, loaders()[0])
    with warnings_of("stay as training left them"):
        fit(BatchNormStatistics(), model=Noisy(), max_epochs=1, val=False)


def test_a_pruner_still_sees_a_validation_step_that_prepares_its_input() -> None:
    with warnings_of("validation_step calls the model with another tensor"):
        fit(SaliencyPruningCallback({0: 0.5}), BatchNormStatistics(), model=Scaling(), max_epochs=1)


class Logging(Digits):
    """Logs in ``forward``, which Lightning refuses when training has ended."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        self.log("size", z.abs().mean(), on_step=False, on_epoch=True, batch_size=len(x))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        z = self(batch[0])
        self.seen = [*(self.seen if batch_idx else []), float(z.detach().abs().mean())]
        return nn.functional.cross_entropy(z, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def test_what_forward_logs_is_that_of_the_users_steps() -> None:
    pruner = SaliencyPruningCallback({1: 0.5}, criterion="magnitude")  # in force at the very end
    stop = EarlyStopping("accuracy", mode="max", patience=1, min_delta=2.0)
    for callbacks in ([pruner], [stop]):
        model = Logging()
        run = make_trainer(*callbacks, BatchNormStatistics(), max_epochs=2)
        run.fit(model, *loaders())
        check(model, loaders()[0])
        mean = sum(model.seen) / len(model.seen)
        assert float(run.callback_metrics["size"]) == pytest.approx(mean, rel=1e-4)


def test_a_copy_leaves_the_model_behind() -> None:
    ours = BatchNormStatistics()
    model = fit(ours, max_epochs=1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copied = pickle.dumps(ours)
    assert len(copied) < weights
    assert pickle.loads(copied)._inputs.agrees


@pytest.mark.parametrize("given", [False, True])
def test_a_compiled_model_cannot_be_looked_into(given: bool) -> None:
    model = make_model()
    model.compile(backend="eager")
    ours = BatchNormStatistics(forward=(lambda module, batch: module(batch[0])) if given else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ours, model=model, max_epochs=2)
    torch.compiler.reset()
    said = [str(w.message) for w in caught if "BatchNormStatistics" in str(w.message)]
    assert len(said) == (not given)
    if given:
        check(model, loaders()[0])
    else:
        assert "the model is compiled" in said[0]
        assert model.net[1].num_batches_tracked == 10  # of the training steps


def test_processes_average_on_the_device_that_can_reduce() -> None:
    """When a fit has ended the model is on the CPU, where NCCL reduces nothing."""
    sent: list[torch.Tensor] = []

    def reduce(tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        sent.append(tensor)
        return torch.full(tensor.shape, 6.0)

    strategy = SimpleNamespace(root_device=torch.device("meta"), reduce=reduce)
    layer = nn.BatchNorm1d(4)
    assert average(SimpleNamespace(world_size=2, strategy=strategy), [layer], [3]) == [6]
    assert [tensor.device.type for tensor in sent] == ["meta"] * 3
    assert layer.running_mean.tolist() == [1.0] * 4
