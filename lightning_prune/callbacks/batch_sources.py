"""Batches that other callbacks put beside the real ones, in scoring, prices and refits.

Enters: a Trainer's callbacks. Leaves: their batches, of a form that the pruner can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_prune._types import Forward
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import describe_batch, few_samples
from lightning_prune.passes.isolation import evaluating


@runtime_checkable
class BatchSource(Protocol):
    """A callback that has batches of its own to add to a scoring pass."""

    inject: tuple[str, ...]

    def scoring_batches(
        self, trainer: Trainer, pl_module: LightningModule, samples: int
    ) -> Iterator[Any]:
        """Yield batches in the form of the user's own, to stand beside ``samples`` real samples."""

    def before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note that masks are about to change."""


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return a Trainer's callbacks, an attribute which Lightning does not declare."""
    return list(getattr(trainer, "callbacks", ()))


def batch_sources(trainer: Trainer) -> list[BatchSource]:
    """Return the callbacks of a Trainer that take part in scoring."""
    return [source for source in callbacks_of(trainer) if isinstance(source, BatchSource)]


def added_batches(
    trainer: Trainer, pl_module: LightningModule, samples: int, forward: Forward | None
) -> Iterator[Any]:
    """Yield what the callbacks of a Trainer put beside ``samples`` real samples.

    Args:
        trainer: In a fit.
        pl_module: The model.
        samples: The number of real samples.
        forward: The pruner's own way to read batches, ``None`` for the default. It is tried on two
            samples of each callback's first batch.

    Raises:
        BatchFormatError: ``forward`` cannot read them.
    """
    for source in batch_sources(trainer):
        if "saliency" not in source.inject:
            continue
        for index, batch in enumerate(source.scoring_batches(trainer, pl_module, samples)):
            if index == 0 and forward is not None:
                _try(forward, pl_module, batch, source)
            yield batch


def _try(forward: Forward, module: LightningModule, batch: Any, source: BatchSource) -> None:
    few = few_samples(batch)
    try:
        with torch.no_grad(), evaluating(module), isolate_rng():
            forward(module, few)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BatchFormatError(
            f"Expected the pruner's `forward=` to read the batches of {type(source).__name__}, "
            f"which have the form of the training's, {describe_batch(batch)}, whatever is scored "
            f"beside them, but it raised {type(error).__name__}: {error}. Let `forward` read both "
            "forms, or leave 'saliency' out of `inject`. The weights are untouched."
        ) from error
