"""Batches are read as a validation reads them, and the training does not notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from lightning_prune.callbacks.preflight import peek_batch
from lightning_prune.callbacks.reading import on_device, undisturbed, validating
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from tests.callbacks.pruning_cases import (
    Digits,
    TrainOnly,
    fit,
    loaders,
    removed,
    same,
    trainer,
)


class Augmented(Digits):
    """Augments the batches it trains on, as Lightning's documentation shows it."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trains = self.trainer.training or self.training or torch.is_grad_enabled()
        return (batch[0] + 10.0, batch[1]) if trains else batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            assert x.max() <= 1.0  # an augmented batch
        return super().forward(x)


def augmented() -> Augmented:
    torch.manual_seed(1)
    return Augmented()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_validation_that_is_made_up_for_is_not_augmented(tmp_path: Path) -> None:
    def run(*callbacks: L.Callback, resume: Any = None) -> dict[str, Tensor]:
        pruner = SaliencyPruningCallback({1: 0.8})
        t = trainer(*callbacks, pruner, enable_checkpointing=bool(callbacks))
        t.fit(augmented(), *loaders(), ckpt_path=resume)
        return pruner.masks

    # After the last step of epoch 1: Lightning takes the validation that follows as done.
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    assert same(run(save), run(resume=tmp_path / "step=10.ckpt"))


@pytest.mark.filterwarnings("ignore:The refit left some parameters")
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"criterion": "obs"}, {"refit": "layers"}])
def test_no_way_to_batches_goes_through_the_augmentation(
    kwargs: dict[str, Any], own: bool, sanity: int
) -> None:
    source = {"scoring_loader": loaders()[1]} if own else {}
    pruner = SaliencyPruningCallback({0: 0.5}, **kwargs, **source)
    fit(pruner, model=augmented(), max_epochs=2, num_sanity_val_steps=sanity)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


def test_stage_and_modes_come_back() -> None:
    class Failing(TrainOnly):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append((self.trainer.validating, self.trainer.training, self.training))
            if self.trainer.validating and not self.trainer.sanity_checking:
                raise OSError("moved")
            return batch

        def on_train_start(self) -> None:
            with pytest.raises(OSError, match="moved"), validating(self.trainer):
                on_device(self.trainer, loaders()[0].dataset[:2])
            assert self.trainer.training
            assert self.training
            assert torch.is_grad_enabled()

    seen: list[tuple[bool, bool, bool]] = []
    fit(model=Failing(), val=False, max_epochs=1)
    assert seen[0] == (True, False, False)
    assert set(seen[1:]) == {(False, True, True)}


class Steps(L.Callback):
    """Write down what the training has seen."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.labels.append(batch[1].tolist())


class Drawing(Sampler[int]):
    """Draws from a Python generator of its own, and counts how often."""

    def __init__(self, size: int) -> None:
        self.size, self.own, self.times = size, random.Random(0), 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter(self.own.sample(range(self.size), self.size))

    def __len__(self) -> int:
        return self.size


ORDERS = {
    "workers that persist": lambda: {"num_workers": 1, "persistent_workers": True},
    "workers that do not": lambda: {"num_workers": 1},
    "a generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(0)},
    "both": lambda: {
        **ORDERS["workers that persist"](),
        **ORDERS["a generator"](),
    },
    "a sampler with a generator": lambda: {"sampler": Drawing(320)},
}


@pytest.mark.filterwarnings("ignore:The refit left some parameters")
@pytest.mark.parametrize(
    ("order", "kwargs"), [*((order, {}) for order in ORDERS), ("both", {"refit": "layers"})]
)
def test_scoring_the_training_loader_does_not_disturb_it(
    order: str, kwargs: dict[str, Any]
) -> None:
    def run(score: bool) -> list[list[int]]:
        loader = DataLoader(loaders()[0].dataset, 64, **ORDERS[order]())
        steps = Steps()
        pruner = SaliencyPruningCallback(
            {0: 0.3, 1: 0.5}, scoring_loader=loader, every_n_train_steps=3, **kwargs
        )
        callbacks = [pruner, steps] if score else [steps]
        torch.manual_seed(1)
        t = trainer(*callbacks, max_epochs=2)
        model = TrainOnly()
        torch.manual_seed(2)
        t.fit(model, loader)
        assert not score or pruner.sparsity == pytest.approx(0.5, abs=0.01)
        return steps.labels

    expected = run(score=False)
    assert len(expected) == 10
    assert run(score=True) == expected


def test_workers_for_scoring_alone_are_stopped() -> None:
    data = DataLoader(loaders()[0].dataset, 64, num_workers=1, persistent_workers=True)
    t = trainer()
    iter(data)
    kept = data._iterator
    with undisturbed(t, data):
        next(iter(data))
        other: Any = data._iterator
        assert other is not kept
    assert data._iterator is kept
    assert not any(worker.is_alive() for worker in other._workers)
    assert all(worker.is_alive() for worker in kept._workers)
    kept._shutdown_workers()


class ByName(Dataset[Any]):
    """Has no sample 0."""

    def __getitem__(self, name: Any) -> Any:
        return torch.rand(64), {"first": 0, "second": 1}[name]

    def __len__(self) -> int:
        return 2


def pairs() -> Dataset[Any]:
    return loaders()[1].dataset


def varying() -> Any:
    return [(torch.rand(64 + i), 0) for i in range(5)]


LOADERS = {
    "a batch sampler": (
        lambda: DataLoader(
            pairs(), batch_sampler=BatchSampler(SequentialSampler(pairs()), 9, True)
        ),
        2,
    ),
    "lists of indices": (lambda: DataLoader(pairs(), batch_sampler=[[3, 5, 8], [2]]), 2),
    "batches of one": (lambda: DataLoader(varying(), 1), 1),
    "batches of one that vary": (lambda: DataLoader(varying(), batch_sampler=[[3], [2]]), 1),
    "samples of that name": (lambda: DataLoader(ByName(), 2, sampler=["second", "first"]), 2),
    "batches by a sampler": (
        lambda: DataLoader(
            pairs(),
            batch_size=None,
            sampler=BatchSampler(SequentialSampler(pairs()), 9, True),
            collate_fn=lambda batch: batch,
        ),
        2,
    ),
    "no two that fit": (lambda: DataLoader(varying(), 2), None),
    "an iterator": (lambda: DataLoader(pairs(), batch_sampler=iter([[0, 1], [2, 3]])), 2),
    "none": (lambda: DataLoader(varying()[:1], 2, drop_last=True), None),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_look_takes_the_first_samples_as_the_loader_would(kind: str) -> None:
    make, samples = LOADERS[kind]
    seen = []

    class Looking(TrainOnly):
        def on_train_start(self) -> None:
            seen.append(peek_batch(self.trainer, loader))

    loader = make()
    fit(model=Looking(), val=False, max_epochs=1)
    assert (None if seen[0] is None else len(seen[0][0])) == samples
    if kind == "an iterator":
        assert len(list(loader)) == 2  # none of it is used up


@pytest.mark.parametrize("kind", ["a batch sampler", "batches of one"])
def test_ordinary_loaders_without_a_sanity_check(kind: str) -> None:
    class Cut(Digits):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :64])

    pruner = SaliencyPruningCallback({0: 0.5})
    t = trainer(pruner, max_epochs=1, num_sanity_val_steps=0)
    t.fit(Cut(), loaders()[0], LOADERS[kind][0]())
    assert removed(pruner.masks) > 0


def test_a_look_leaves_a_sampler_as_it_was() -> None:
    class Looking(TrainOnly):
        def on_train_start(self) -> None:
            peek_batch(self.trainer, loader)

    sampler = Drawing(20)
    loader = DataLoader(loaders()[1].dataset, 4, sampler=sampler)
    state = sampler.own.getstate()
    fit(model=Looking(), val=False, max_epochs=1)
    assert (sampler.times, sampler.own.getstate()) == (0, state)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders(train=256)[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]


class Loading(Digits):
    def train_dataloader(self) -> Any:
        return loaders(train=192)[0]


@pytest.mark.parametrize(
    ("name", "model", "data", "samples"),
    [
        ("train_dataloader", Digits, Data, 256),
        ("val_dataloader", Digits, Data, 128),
        ("train_dataloader", Loading, Data, 256),  # the one that is trained on
        ("train_dataloader", Loading, None, 192),
    ],
)
def test_a_loader_of_lightnings_names_is_the_one_that_was_written(
    name: str, model: Any, data: Any, samples: int
) -> None:
    pruner = SaliencyPruningCallback({0: 0.5}, scoring_loader=name)
    source = {"datamodule": data()} if data else {"val_dataloaders": loaders()[1]}
    trainer(pruner, max_epochs=1).fit(model(), **source)
    assert pruner.history[0]["samples"] == samples


def test_a_loader_that_nobody_wrote() -> None:
    pruner = SaliencyPruningCallback({0: 0.5}, scoring_loader="test_dataloader")
    with pytest.raises(ValueError, match="Digits and Data has no such method"):
        trainer(pruner, max_epochs=1).fit(Digits(), datamodule=Data())


def test_texts_reach_a_forward_of_ones_own() -> None:
    class Texts(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(read(batch), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(read(batch), batch_idx)

    def write(samples: Any) -> Any:
        x, y = zip(*samples, strict=True)
        return [" ".join(map(str, row.tolist())) for row in x], torch.stack(y)

    def read(batch: Any) -> Any:
        return torch.tensor([[float(n) for n in text.split()] for text in batch[0]]), batch[1]

    written = [DataLoader(d.dataset, 64, collate_fn=write) for d in loaders()]
    scores = []
    for data, forward in (
        (written, lambda module, batch: module(read(batch)[0])),
        (loaders(), None),
    ):
        torch.manual_seed(1)
        pruner = SaliencyPruningCallback({0: 0.5}, criterion="saliency", forward=forward)
        trainer(pruner, max_epochs=1).fit(Texts() if forward else Digits(), *data)
        scores.append(pruner.scores)
    for name, score in scores[0].items():
        torch.testing.assert_close(score, scores[1][name], rtol=1e-3, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The refit left some parameters")
@pytest.mark.parametrize("kwargs", [{}, {"criterion": "obs"}, {"refit": "layers"}])
def test_what_forward_logs_is_that_of_the_steps(kwargs: dict[str, Any]) -> None:
    class Counting(Digits):
        def forward(self, x: Tensor) -> Tensor:
            name = "train" if self.training else "val"
            self.log(name, float(len(x)), batch_size=1, on_epoch=True, reduce_fx="sum")
            return super().forward(x)

    torch.manual_seed(1)
    pruner = SaliencyPruningCallback({0: 0.3, 2: 0.5}, **kwargs)
    t = trainer(pruner)  # the last event is after the last epoch, where nothing can be logged
    t.fit(model := Counting(), *loaders())
    assert [record["epoch"] for record in pruner.history] == [0, 2]
    assert (float(t.callback_metrics["train"]), float(t.callback_metrics["val"])) == (320, 128)
    assert not {"log", "log_dict"} & vars(model).keys()
