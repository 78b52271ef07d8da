"""Prune a trained network when few digits are left to do it with, with and without generated ones.

    python examples/low_data.py --digits 200

A 784-128-10 network is trained on all digits but a few hundred, as if somebody had handed it over.
It is then pruned to 95 and 98 % with those few only: they are scored, trained on, and shown to a
VAE whose samples join both. Beside it, the same without generated digits, as many steps and twice
as many, since a generated batch stands beside each real one.

The dense network knows more than the few digits tell. That is what the samples are for: its answers
to them are learnt, too. The test digits are only ever reported.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from mnist import CLASSES, Classifier, Digits, count_weights, mlp
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_prune import (
    GeneratorTraining,
    LearningRateDecay,
    SaliencyPruningCallback,
    VAEAugmentCallback,
)
from lightning_prune.augment import Distillation

BATCH_SIZE = 64
EVENTS, EPOCHS = 8, 12  # the last third trains under fixed masks
LEARNING_RATE = 1e-2
ARMS = ("real digits", "real digits, twice the steps", "and generated digits")


@dataclass(frozen=True)
class Task:
    """What there is to prune, and with what.

    Attributes:
        dense: The trained network.
        few: The digits that are left for pruning it.
        test: The untouched digits.
        steps: Training steps in an epoch, however few digits there are.
        seed: Of the order of the digits.
    """

    dense: Classifier
    few: TensorDataset
    test: TensorDataset
    steps: int
    seed: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Task:
        """Split the digits and train the dense network on what is not among the few."""
        data = Digits(options.seed)
        x, y = (
            torch.cat([part.tensors[i] for part in (data.train, data.validation)]) for i in (0, 1)
        )
        random = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(x), generator=random)
        few, others = order[: options.digits], order[options.digits :]
        dense = Classifier(mlp())
        task = cls(
            dense,
            TensorDataset(x[few], y[few]),
            data.test,
            options.steps,
            options.seed,
        )
        trainer = quiet_trainer(options.dense_epochs, [LearningRateDecay()])
        trainer.fit(
            dense, DataLoader(TensorDataset(x[others], y[others]), BATCH_SIZE, shuffle=True)
        )
        return task

    def loader(self, passes: int) -> DataLoader[tuple[Tensor, ...]]:
        """Return an epoch of the few digits, gone through as often as it takes."""
        random = torch.Generator().manual_seed(self.seed)
        count = passes * self.steps * BATCH_SIZE
        sampler = RandomSampler(self.few, num_samples=count, generator=random)
        return DataLoader(self.few, BATCH_SIZE, sampler=sampler)

    def accuracy(self, model: Classifier) -> float:
        """Return the share of the test digits that a model gets right."""
        x, y = self.test.tensors
        with torch.no_grad():
            return multiclass_accuracy(model.eval()(x), y, CLASSES, average="micro").item()


def quiet_trainer(epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    """Return a Trainer that writes nothing, neither on the screen nor into a folder."""
    return L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


@dataclass(frozen=True)
class Row:
    """What one arm came to at one sparsity."""

    arm: str
    sparsity: float
    test_accuracy: float
    seconds: float


def pruned(task: Task, arm: str, sparsity: float) -> Row:
    """Prune a copy of the dense network with the few digits, and measure it."""
    started = time.process_time()
    model = Classifier(mlp(), LEARNING_RATE)
    model.load_state_dict(task.dense.state_dict())
    # Each event removes the same share of what is left; the scores are those of the few digits.
    schedule = {e: 1 - (1 - sparsity) ** ((e + 1) / EVENTS) for e in range(EVENTS)}
    pruner = SaliencyPruningCallback(
        schedule, scoring_loader=DataLoader(task.few, 500, shuffle=False)
    )
    callbacks: list[L.Callback] = [pruner, LearningRateDecay()]
    if arm == ARMS[2]:
        generated = VAEAugmentCallback(
            inject=("saliency", "train"),
            share=1.0,  # a generated batch of the same size beside each real one
            distillation=Distillation(weight=0.9, temperature=1.0),
            training=GeneratorTraining(fit_before=12),  # it has to know the digits by then
            teacher=model,  # as it was handed over: it knows better than after an epoch on a few
            learning_rate=1e-3,
            seed=task.seed,
        )
        callbacks.append(generated)
    trainer = quiet_trainer(EPOCHS, callbacks)
    trainer.fit(model, task.loader(passes=2 if arm == ARMS[1] else 1))
    left, total = count_weights(model)
    return Row(arm, 1 - left / total, task.accuracy(model), time.process_time() - started)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, a line each.

    >>> print(table([Row("real digits", 0.95, 0.912, 3.25)]))
    pruned with                    sparsity  test accuracy  seconds
    real digits                      95.0 %         91.2 %      3.2
    """
    lines = [f"{'pruned with':<31}sparsity  test accuracy  seconds"]
    lines += [
        f"{row.arm:<31}{100 * row.sparsity:>6.1f} %{100 * row.test_accuracy:>13.1f} %"
        f"{row.seconds:>9.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, or leave with a message that says what is wrong."""
    parser = argparse.ArgumentParser(
        description="Prune a network with few real digits, with and without generated ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--digits", type=int, default=200, metavar="N", help="real digits to prune with")
    add("--sparsities", type=float, nargs="+", default=[0.95, 0.98], metavar="S", help="to reach")
    add("--steps", type=int, default=57, metavar="N", help="training steps of each of 12 epochs")
    add("--dense-epochs", type=int, default=15, metavar="N", help="of the dense training")
    add("--seed", type=int, default=0, help="draws the digits, the weights and the batches")
    options = parser.parse_args(arguments)
    if not 10 <= options.digits <= 3000:
        parser.error(f"argument --digits: expected 10 to 3000, got {options.digits}")
    if not all(0 < share < 1 for share in options.sparsities):
        parser.error(f"argument --sparsities: expected between 0 and 1, got {options.sparsities}")
    for name in ("steps", "dense_epochs"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least 1, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the example from the command line."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)  # more would wait for one another in layers this small
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_prune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # True and beside the point: 28 x 28 digits in memory gain nothing from worker processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
    # Lightning 2.6 on torch 2.13, in its own code.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    L.seed_everything(options.seed, verbose=False)
    started = time.process_time()
    task = Task.of(options)
    rows = [
        Row(
            "dense, by the other digits",
            0.0,
            task.accuracy(task.dense),
            time.process_time() - started,
        )
    ]
    for sparsity in options.sparsities:
        rows += [pruned(task, arm, sparsity) for arm in ARMS]
    print(f"\n784-128-10, pruned with {options.digits} MNIST digits, seed {options.seed}\n")
    print(table(rows))
    print(
        "\nMeasured on 1,000 digits used for nothing else (standard error about 1 point)."
        "\nSeconds of CPU time, those of the VAE included."
    )
    return rows


if __name__ == "__main__":
    main()
