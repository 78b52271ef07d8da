"""What the pruner's tests share: real digits, a small network, quiet Trainers, a witness."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}

WEIGHTS = ["net.0.weight", "net.3.weight"]


@cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def loaders(
    train: int = 320, val: int = 128, shuffle: bool = False
) -> tuple[DataLoader, DataLoader]:
    x, y = digits()
    return (
        DataLoader(TensorDataset(x[:train], y[:train]), batch_size=64, shuffle=shuffle),
        DataLoader(TensorDataset(x[-val:], y[-val:]), batch_size=50),
    )


class Digits(L.LightningModule):
    """64-24-10 with batch norm: two prunable weights, and parameters that are not."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)
        )
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        correct = self(batch[0]).argmax(-1) == batch[1]
        self.log("accuracy", correct.float().mean(), batch_size=len(correct))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class TrainOnly(Digits):
    """Knows no validation."""

    validation_step = L.LightningModule.validation_step


def make_model(**kwargs: Any) -> Digits:
    torch.manual_seed(1)
    return Digits(**kwargs)


def trainer(*callbacks: L.Callback, max_epochs: int = 3, **kwargs: Any) -> L.Trainer:
    return L.Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **{**QUIET, **kwargs})


def fit(
    *callbacks: L.Callback, model: Digits | None = None, val: bool = True, **kwargs: Any
) -> Digits:
    model = make_model() if model is None else model
    trainer(*callbacks, **kwargs).fit(model, *loaders()[: 2 if val else 1])
    return model


@contextmanager
def warnings_of(message: str) -> Iterator[None]:
    """Expect a warning; Lightning's own beside it are not looked at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert any(re.search(message, str(warning.message)) for warning in caught)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in WEIGHTS}


def zeros(model: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in weights(model).values())


TOTAL = 64 * 24 + 24 * 10


def removed(masks: dict[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


class Witness(L.Callback):
    """Write down how many weights are zero, and where in the fit; check masked ones each step."""

    def __init__(self, pruner: Any) -> None:
        self.pruner = pruner
        self.at_step: list[tuple[int, int]] = []
        self.at_validation: list[tuple[int, int]] = []
        self.validated: dict[int, dict[str, Tensor]] = {}
        self.steps_checked = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.at_step.append((trainer.current_epoch, zeros(pl_module)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        for name, mask in self.pruner.masks.items():
            masked = pl_module.get_parameter(name).detach()[~mask]
            assert torch.equal(masked, torch.zeros_like(masked))
            assert not torch.signbit(masked).any()
            self.steps_checked += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.at_validation.append((trainer.current_epoch, zeros(pl_module)))
            self.validated[trainer.current_epoch] = weights(pl_module)


class Generated(L.Callback):
    """A stand-in for a generator: batches of its own, and a note of when masks change."""

    def __init__(self, inject: tuple[str, ...] = ("saliency",)) -> None:
        self.inject = inject
        self.asked: list[int] = []
        self.zeros_before: list[int] = []

    def scoring_batches(self, trainer: Any, pl_module: Any, samples: int) -> Iterator[Any]:
        self.asked.append(samples)
        x, y = digits()
        yield x[:10], y[:10]
        yield x[10:30], y[10:30]

    def before_pruning(self, trainer: Any, pl_module: Any) -> None:
        self.zeros_before.append(zeros(pl_module))


def every_epoch(epoch: int) -> float:
    """A schedule as a function, for configuration by name."""
    return min(0.9, 0.3 * (epoch + 1))


def flat(scores: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A criterion as a function, for configuration by name."""
    return {name: scores[name] * weights[name].abs() for name in scores}
