"""Smaller LightningModules: at the end of a fit, in Trainers of their own, trained further."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import (
    SaliencyPruningCallback,
    Selection,
    VAEAugmentCallback,
    carry_optimizer,
    load_shrunk,
    save_shrunk,
    shrink,
    shrink_with_report,
)

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32).div(16).unsqueeze(1)
Y = torch.tensor(DIGITS.target)


class Digits(L.LightningModule):
    """A small convolutional network with a metric in it, as most have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)

    def test_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader(start: int, stop: int) -> DataLoader:
    return DataLoader(TensorDataset(X[start:stop], Y[start:stop]), 64)


def trainer(*callbacks: L.Callback, **options) -> L.Trainer:
    return L.Trainer(
        **{"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def units(**options) -> SaliencyPruningCallback:
    return SaliencyPruningCallback(
        {0: 0.5},
        parameters=["net.0.weight", "net.5.weight"],
        selection=Selection(granularity="unit", scope="layer"),
        **options,
    )


@pytest.fixture(scope="module")
def fitted() -> tuple[Digits, SaliencyPruningCallback]:
    model, pruner = Digits(), units(shrink_at_end=True)
    with torch.random.fork_rng():
        trainer(pruner, max_epochs=5).fit(model, loader(0, 640), loader(1000, 1200))
    return model, pruner


def test_the_callback_leaves_a_smaller_module_behind(fitted) -> None:
    model, pruner = fitted
    small = pruner.shrunk
    assert isinstance(small, Digits)
    assert small.net[0].weight.shape == (4, 1, 3, 3)
    assert small.net[1].num_features == 4
    assert small.net[5].weight.shape == (16, 64)
    assert model.net[5].weight.shape == (32, 128)  # as it was
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-5)


def test_it_works_in_trainers_of_its_own(fitted) -> None:
    model, pruner = fitted
    found = [
        trainer().test(m, loader(1200, 1797), verbose=False)[0] for m in (model, pruner.shrunk)
    ]
    assert found[0]["accuracy"] == pytest.approx(found[1]["accuracy"], abs=0.002)
    assert found[1]["accuracy"] > 0.8
    answers = [trainer().predict(m, loader(1200, 1300)) for m in (model, pruner.shrunk)]
    torch.testing.assert_close(torch.cat(answers[0]), torch.cat(answers[1]), rtol=1e-4, atol=1e-5)


def test_it_is_saved_loaded_and_trained_further(fitted, tmp_path) -> None:
    _, pruner = fitted
    save_shrunk(pruner.shrunk, tmp_path / "small.pt")
    again = load_shrunk(tmp_path / "small.pt", Digits())
    before = {name: value.clone() for name, value in again.state_dict().items()}
    assert all(torch.equal(v, before[n]) for n, v in pruner.shrunk.state_dict().items())
    trainer(max_epochs=1).fit(again, loader(0, 640), loader(1000, 1200))
    assert again.net[5].weight.shape == (16, 64)
    assert not torch.equal(again.net[5].weight, before["net.5.weight"])


def test_example_inputs_may_be_given_and_forward_read() -> None:
    class Dicts(Digits):
        """A model whose forward takes the whole batch."""

        def forward(self, batch) -> Tensor:
            return self.net(batch["image"])

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch), batch["label"])

        def validation_step(self, batch, batch_idx):
            return None

    data = [{"image": X[i : i + 64], "label": Y[i : i + 64]} for i in range(0, 320, 64)]
    plain = DataLoader(data, batch_size=None)
    pruner = units(shrink_at_end=True, forward=lambda module, batch: module(batch))
    trainer(pruner).fit(Dicts(), plain, plain)
    assert pruner.shrunk.net[5].weight.shape == (16, 64)
    pruner = units(shrink_at_end=X[:4])
    trainer(pruner).fit(Digits(), loader(0, 320), loader(1000, 1200))
    assert pruner.shrunk.net[5].weight.shape == (16, 64)


def test_it_goes_with_a_vae_and_a_short_trial() -> None:
    pruner = units(shrink_at_end=True)
    trainer(pruner, VAEAugmentCallback(warmup=1), max_epochs=2).fit(
        Digits(), loader(0, 320), loader(1000, 1200)
    )
    assert pruner.shrunk.net[5].weight.shape == (16, 64)
    pruner = units(shrink_at_end=True)
    trainer(pruner, fast_dev_run=True).fit(Digits(), loader(0, 320), loader(1000, 1200))
    assert pruner.shrunk is not None
    assert units().shrunk is None


def test_what_cannot_be_made_smaller_is_a_warning_after_the_fit() -> None:
    class Deciding(Digits):
        """Its forward depends on a number in the data, so no trace shows all of it."""

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum().item() > 0 else self.net(-x)

    model, pruner = Deciding(), units(shrink_at_end=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(pruner).fit(model, loader(0, 320), loader(1000, 1200))
    assert any("No smaller model was made" in str(w.message) for w in caught)
    assert pruner.shrunk is None
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_carried_optimizer_takes_the_steps_that_the_masked_model_would(kind) -> None:
    """The slow twin: the masked model, with its cut units held at zero, trained as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).double()
    x, y = X[:200].flatten(1).double(), Y[:200]
    arguments = {"lr": 1e-2, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 1e-2}
    optimizer = kind(model.parameters(), **arguments)

    def step(net: nn.Module, by: torch.optim.Optimizer, gone: Tensor | None) -> None:
        by.zero_grad()
        F.cross_entropy(net(x), y).backward()
        by.step()
        if gone is not None:
            with torch.no_grad():
                for tensor in (net[0].weight, net[0].bias, net[2].weight.T):
                    tensor[gone] = 0

    gone = torch.arange(24) % 3 == 0
    for _ in range(3):
        step(model, optimizer, gone)
    small, report = shrink_with_report(model, example_inputs=x[:8])
    assert small[0].weight.shape == (16, 64)
    carried = carry_optimizer(optimizer, model, small, report)
    assert carried is not optimizer
    for _ in range(4):
        step(model, optimizer, gone)
        step(small, carried, None)
    for name, parameter in small.named_parameters():
        expected = report.take(name, model.get_parameter(name).detach())
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(model[2].weight[:, :5])
    small, report = shrink_with_report(model, example_inputs=torch.randn(3, 4))
    stranger = torch.optim.SGD(nn.Linear(4, 8).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="2 of its 2 are none of them"):
        carry_optimizer(stranger, model, small, report)


class Squaring(torch.optim.SGD):
    """Keeps lists of matrices."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["factors"] = [torch.eye(size) for size in parameter.shape]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (torch.optim.Adafactor, "'row_var'"),
        (torch.optim.LBFGS, "together"),
        (Squaring, "'factors'"),
    ],
)
def test_optimizers_whose_state_has_no_units_are_refused(kind: Any, what: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    optimizer = kind(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(x).square().sum()
        value.backward()
        return value

    loss()
    optimizer.step(loss)
    nn.init.zeros_(model[2].weight[:, :5])
    small, report = shrink_with_report(model, example_inputs=x)
    with pytest.raises(ValueError, match=f"{what}.*Make a new one"):
        carry_optimizer(optimizer, model, small, report)


def test_metrics_in_a_module_hide_none_of_its_layers() -> None:
    # `==` of a torchmetrics metric is true whatever it is compared with.
    model = Digits()
    with torch.no_grad():
        model.net[5].weight[:10] = 0
        model.net[5].bias[:10] = 0
    small = shrink(model, example_inputs=X[:4])
    assert small.net[5].out_features == 22
    assert isinstance(small.accuracy, MulticlassAccuracy)
