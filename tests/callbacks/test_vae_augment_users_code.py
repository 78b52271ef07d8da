"""What users' steps, forwards, data sets and checkpoints may do beside generated inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_prune import GeneratorTraining, SaliencyPruningCallback, VAEAugmentCallback
from lightning_prune.augment.settings import settings_for
from tests.callbacks.pruning_cases import Digits, digits, same, trainer, warnings_of


class Fixed(nn.Module):
    """A generator of one number."""

    def __init__(self, value: float = 100.0) -> None:
        super().__init__()
        self.value, self.weight = value, nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def loss(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.weight.square().sum()

    def sample(self, n: int) -> Tensor:
        return torch.full((n, 64), self.value)


class Spying(VAEAugmentCallback):
    """Keeps the batches that it gives to the scoring."""

    def scoring_batches(self, *args: Any) -> Any:
        for batch in super().scoring_batches(*args):
            self.given.append(batch)
            yield batch

    given: list[Any]


def rows(n: int = 96, *, labelled: bool = False) -> DataLoader:
    x, y = digits()
    if labelled:
        return DataLoader([{"x": a, "y": b} for a, b in zip(x[:n], y[:n], strict=True)], 16)
    return DataLoader(TensorDataset(x[:n], y[:n]), 16)


class Labelled(Digits):
    """Takes dicts, and puts something else in the place of their entries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch["x"] = batch["x"] + 0.05 * torch.randn_like(batch["x"])
        return F.cross_entropy(self(batch["x"]), batch.pop("y"))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch["x"])


@pytest.mark.parametrize("train_by", ["distill", "batch"])
def test_a_step_that_replaces_what_is_in_its_batch(train_by: Any) -> None:
    generator = Fixed()
    vae = Spying(generator, warmup=1, train_by=train_by, adapt=False)
    vae.given = []
    loader = rows(labelled=True)
    trainer(SaliencyPruningCallback({0: 0.3, 1: 0.5}), vae).fit(Labelled(), loader, loader)
    assert vae.given
    for batch in vae.given:
        assert batch["x"].unique().tolist() == [100.0]
        assert batch["y"].shape == (len(batch["x"]),)
    real = digits()[0]
    assert all(bool((x[:, None] == real).all(2).any(1).all()) for x in generator.seen)


class Logging(Digits):
    def forward(self, x: Tensor) -> Tensor:
        self.log("largest", x.max(), on_step=True, on_epoch=True, batch_size=len(x))
        return super().forward(x)


@pytest.mark.parametrize("train_by", ["distill", "batch"])
def test_what_a_forward_logs_is_that_of_the_steps(train_by: Any) -> None:
    vae = VAEAugmentCallback(
        Fixed(), warmup=1, train_by=train_by, adapt=False, inject=("train",), share=0.25
    )
    run = trainer(vae, SaliencyPruningCallback({0: 0.5}, criterion="magnitude"), max_epochs=3)
    run.fit(Logging(), rows(), rows(48))
    largest = float(run.callback_metrics["largest_step"])
    assert largest == (100.0 if train_by == "batch" else 1.0)  # the joined batch is the step's own


def test_two_generators_in_one_batch_are_refused() -> None:
    vaes = [VAEAugmentCallback(name=name, train_by="batch", warmup=1) for name in "ab"]
    with pytest.raises(MisconfigurationException, match="one callback with train_by='batch'"):
        trainer(*vaes).fit(Digits(), rows(), rows(48))
    other = VAEAugmentCallback(name="b", warmup=1)  # by distillation
    trainer(vaes[0], other, max_epochs=1).fit(Digits(), rows(), rows(48))


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("train_by", ["distill", "batch"])
@pytest.mark.parametrize("vae_first", [True, False])
def test_resumed_after_the_last_step_of_an_events_epoch(
    vae_first: bool, train_by: Any, tmp_path: Path
) -> None:
    def run(folder: str, checkpoint: Path | None = None) -> dict[str, Tensor]:
        vae = VAEAugmentCallback(warmup=1, adapt=False, train_by=train_by)
        pair: list[L.Callback] = [vae, SaliencyPruningCallback({1: 0.3, 2: 0.6})]
        keep = ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=6, save_top_k=-1
        )
        torch.manual_seed(1)
        model = Digits()
        callbacks = [*(pair if vae_first else pair[::-1]), keep]
        run = trainer(*callbacks, max_epochs=4, enable_checkpointing=True)
        run.fit(model, rows(), rows(48), ckpt_path=checkpoint)
        return model.state_dict()

    straight = run("straight")
    for step in (12, 18):
        assert same(straight, run(f"from {step}", tmp_path / "straight" / f"step={step}.ckpt"))


def test_validation_batches_that_forward_cannot_read_leave_the_weight_as_it_is() -> None:
    class Mixed(Labelled):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])

    vae = VAEAugmentCallback(Fixed(), warmup=1, forward=lambda m, b: m(b["x"]), inject=("train",))
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="magnitude")
    with warnings_of("does not adapt, and stays at.*TypeError"):
        trainer(pruner, vae).fit(Mixed(), rows(labelled=True), rows(48))


class Noisy(Dataset):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = digits()
        return x[index] + 0.1 * torch.randn(64, generator=self.generator), y[index]


def test_training_before_leaves_a_data_sets_generator_as_it_was() -> None:
    def run(*callbacks: L.Callback) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = Digits()
        trainer(*callbacks, max_epochs=1).fit(model, DataLoader(Noisy(), 16), rows(48))
        return model.state_dict()

    before = GeneratorTraining(fit_before=1)
    assert same(run(), run(VAEAugmentCallback(inject=(), training=before)))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_fit_without_validation_does_not_keep_the_weight_of_another() -> None:
    vae, pruner = (
        VAEAugmentCallback(warmup=1),
        SaliencyPruningCallback({0: 0.5}, criterion="magnitude"),
    )
    model = Digits()
    trainer(vae, pruner).fit(model, rows(), rows(48))
    vae._joining._mix._mix = 0.0
    trainer(vae, pruner, max_epochs=1).fit(model, rows())
    assert vae._joining.mix == 1.0


@pytest.mark.parametrize("rows_at_first", [1, 2, 3, 16])
def test_a_few_rows_of_a_table_are_no_pictures(rows_at_first: int) -> None:
    table = torch.rand(rows_at_first, 3) * torch.tensor([1.0, 100.0, 1e5])
    found = settings_for(table)
    assert (found["likelihood"], found["units"]) == ("gaussian", "feature")
    assert settings_for(torch.randn(2, 4))["likelihood"] == "gaussian"
    picture = digits()[0][:rows_at_first]
    assert settings_for(picture)["likelihood"] == "bernoulli"
