"""What a VAE of the default size costs beside a training: against the two trainings run apart.

    OMP_NUM_THREADS=1 python -m benchmarks.co_resident --rounds 15

In each round, in turn: a fit of a 784-128-10 network on 4,000 digits in batches of 64; a training
of the VAE by itself on as many batches, once in a Trainer and once in the fastest way (a plain loop
of zero_grad, loss.backward and fused Adam, without a loader); and a fit with both. The ratios are
those of the last to the sums of the first and one of the others; interleaving them, and counting
the process's own seconds, keeps out what else the machine does. Prints the table of
results/co_resident.md.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import digits, mlp
from lightning_prune import VAEAugmentCallback
from lightning_prune.augment.fitting import build_vae
from lightning_prune.augment.settings import settings_for

BATCH = 64
SAMPLES = 4000


class Classifier(L.LightningModule):
    """The network of the published method, with its usual training."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Generator(L.LightningModule):
    """The VAE of the callback, as somebody would train it by itself."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch's inputs."""
        loss: Tensor = self.vae.loss(batch[0])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the callback's optimizer."""
        return torch.optim.Adam(self.parameters(), lr=3e-3, fused=True)


def default_vae(x: Tensor) -> nn.Module:
    """Return the VAE that the callback builds for inputs like these."""
    return build_vae(settings_for(x[:BATCH]), x.dtype, seed=0)


def seconds_of_fit(
    model: L.LightningModule, x: Tensor, y: Tensor, epochs: int, *, beside: bool = False
) -> float:
    """Return the CPU seconds of a fit, with or without the VAE beside it."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[VAEAugmentCallback(inject=())] if beside else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    start = time.process_time()
    trainer.fit(model, batches)
    return time.process_time() - start


def seconds_of_loop(x: Tensor, epochs: int) -> float:
    """Return the CPU seconds of the VAE's training alone, without a loader or a Trainer."""
    vae = default_vae(x)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3, fused=True)
    start = time.process_time()
    for _ in range(epochs):
        for batch in x.split(BATCH):
            optimizer.zero_grad()
            vae.loss(batch).backward()
            optimizer.step()
    return time.process_time() - start


def main() -> None:
    """Measure, and print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    x, y = (tensor[:SAMPLES] for tensor in digits())
    rows = []
    for round_ in range(arguments.rounds + 1):
        alone = seconds_of_fit(Classifier(), x, y, arguments.epochs)
        vae = seconds_of_fit(Generator(default_vae(x)), x, y, arguments.epochs)
        loop = seconds_of_loop(x, arguments.epochs)
        both = seconds_of_fit(Classifier(), x, y, arguments.epochs, beside=True)
        if round_:  # the first warms up
            rows.append((alone, vae, loop, both, both / (alone + vae), both / (alone + loop)))
    *times, first, second = torch.tensor(rows).median(0).values.tolist()
    spans = [[row[column] for row in rows] for column in (4, 5)]
    print(
        "| rounds | fit | VAE in a Trainer | VAE in a loop | both | to two fits | to fit and loop |"
    )
    print("|---|---|---|---|---|---|---|")
    shown = [f"{seconds:.2f} s" for seconds in times]
    shown += [
        f"{median:.3f} ({min(span):.2f} to {max(span):.2f})"
        for median, span in zip((first, second), spans, strict=True)
    ]
    print(f"| {len(rows)} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
