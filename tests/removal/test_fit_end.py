"""The smaller module at the end of a fit: what it is a copy of, and what happens without one."""

from __future__ import annotations

import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import BatchNormStatistics, SaliencyPruningCallback, Selection
from lightning_prune.callbacks import shrinking

X = torch.rand(128, 16, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(16, 4, generator=torch.Generator().manual_seed(1))).argmax(1)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Deciding(Net):
    """Its forward depends on a number in the data, so that it cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum().item() > 0 else -x)


class Raises(L.Callback):
    """Fails when the training is over."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise RuntimeError("too late")


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), 32)


def trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=list(callbacks),
    )


def units(schedule: Any = None, **options: Any) -> SaliencyPruningCallback:
    return SaliencyPruningCallback(
        schedule or {0: 0.5},
        parameters=["net.0.weight"],
        selection=Selection(granularity="unit"),
        **{"shrink_at_end": True, **options},
    )


def assert_same(small: L.LightningModule, model: L.LightningModule) -> None:
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-5)


def fit_with_warnings(model: L.LightningModule, pruner: SaliencyPruningCallback, *loaders) -> str:
    """Return what the fit warned of, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(pruner).fit(model, *loaders)
    return "\n".join(str(w.message) for w in caught)


@pytest.mark.parametrize("through", ["module.compile", "torch.compile"])
def test_of_a_compiled_module(through: str) -> None:
    model, pruner = Net(), units()
    fitted = model
    if through == "torch.compile":
        fitted = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    trainer(pruner).fit(fitted, loader(), loader())
    assert pruner.shrunk.net[0].out_features == 6
    assert_same(pruner.shrunk, model)
    with torch.no_grad():
        for parameter in pruner.shrunk.parameters():
            parameter.zero_()
        assert pruner.shrunk(X).abs().max() == 0


def test_it_has_the_batch_norm_statistics_of_the_last_event() -> None:
    model, pruner = Net(), units({1: 0.5})
    trainer(pruner, BatchNormStatistics()).fit(model, loader(), loader())
    assert [record["epoch"] for record in pruner.history] == [1]
    assert pruner.shrunk.net[0].out_features == 6
    assert_same(pruner.shrunk, model)


def test_it_has_what_a_pruner_behind_removes_last() -> None:
    first = units()
    second = SaliencyPruningCallback({1: 0.5}, parameters=["head.weight"])
    model = Net()
    trainer(first, second).fit(model, loader(), loader())
    assert_same(first.shrunk, model)


def test_a_loss_that_is_kept_and_a_forward_that_logs_are_no_obstacles() -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self._trainer is not None:
                self.log("norm", out.norm().detach(), batch_size=len(x))
            return out

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.last_loss = super().training_step(batch, batch_idx)
            return self.last_loss

    model, pruner = Keeps(), units()
    trainer(pruner).fit(model, loader(), loader())
    assert pruner.shrunk.net[0].out_features == 6
    assert model.last_loss.grad_fn is not None  # as it was
    model._trainer = None
    assert_same(pruner.shrunk, model)


def test_a_batch_whose_parts_are_keywords_of_the_model() -> None:
    class Keywords(Net):
        def forward(self, values: Tensor, scale: Tensor) -> Tensor:
            return super().forward(values * scale)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch["values"], batch["scale"]), batch["labels"])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch["values"], batch["scale"])

    samples = [
        {"values": x, "scale": torch.tensor([2.0]), "labels": y} for x, y in zip(X, Y, strict=True)
    ]
    batches = DataLoader(samples, 32)
    model, pruner = Keywords(), units()
    trainer(pruner).fit(model, batches, batches)
    assert pruner.shrunk.net[0].out_features == 6
    found, expected = (net.eval()(X, X[:, :1]) for net in (pruner.shrunk, model))
    torch.testing.assert_close(found, expected)


def test_batches_that_cannot_be_read_are_a_warning_after_the_fit() -> None:
    class Dicts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx)

    pruner = units(criterion="magnitude")
    both = CombinedLoader({"a": loader(), "b": loader()})
    said = fit_with_warnings(Dicts(), pruner, both, loader())
    assert re.search("No smaller model was made.*shrink_at_end=inputs", said)
    assert pruner.shrunk is None
    assert pruner.sparsity == 0.5
    pruner = units(criterion="magnitude", shrink_at_end=X[:4])
    trainer(pruner).fit(Dicts(), both, loader())
    assert pruner.shrunk.net[0].out_features == 6


def test_batches_without_a_tensor_are_a_warning_after_the_fit() -> None:
    class Indices(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((X[batch], Y[batch]), batch_idx)

    pruner = units(criterion="magnitude")
    numbers = DataLoader([[0, 1, 2], [3, 4, 5]], batch_size=None)
    said = fit_with_warnings(Indices(), pruner, numbers)
    assert re.search("No smaller model was made.*Expected a batch with a tensor", said)
    assert pruner.shrunk is None


@pytest.mark.parametrize(
    ("name", "said", "made"),
    [
        ("shrink_with_report", "No smaller model was made; .*KeyError: 'x'", False),
        ("compare", "could not be measured. KeyError: 'x'", True),
    ],
)
def test_whatever_fails_is_a_warning(
    name: str, said: str, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(shrinking, name, fail)
    pruner = units()
    assert re.search(said, fit_with_warnings(Net(), pruner, loader(), loader()))
    assert (pruner.shrunk is not None) == made
    assert pruner.sparsity == 0.5


def test_none_is_left_of_a_fit_before() -> None:
    pruner, model = units(), Net()
    trainer(pruner).fit(model, loader(), loader())
    first = pruner.shrunk
    assert first is not None
    trainer(pruner).validate(model, loader(), verbose=False)
    assert pruner.shrunk is first
    assert "No smaller model was made" in fit_with_warnings(Deciding(), pruner, loader(), loader())
    assert pruner.shrunk is None


def test_none_is_made_of_a_fit_that_failed() -> None:
    pruner, model = units(), Net()
    trainer(pruner).fit(model, loader(), loader())
    with pytest.raises(RuntimeError, match="too late"):
        trainer(pruner, Raises()).fit(model, loader(), loader())
    assert pruner.shrunk is None
    trainer(pruner).validate(model, loader(), verbose=False)
    assert pruner.shrunk is None
