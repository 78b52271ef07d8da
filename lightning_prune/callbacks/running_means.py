"""Means of scalars: over the samples of an epoch, and over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class RunningMeans:
    """Means of named scalars over an epoch, weighted by samples, without waiting for the device.

    Example:
        >>> means = RunningMeans()
        >>> means.add({"loss": torch.tensor(1.0)}, 3)
        >>> means.add({"loss": torch.tensor(5.0)}, 1)
        >>> means.finish()
        {'loss': tensor(2.)}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Add values that are means over ``samples``."""
        for name, value in values.items():
            total, count = self._sums.get(name) or (torch.zeros_like(value), 0)
            self._sums[name] = total.add_(value, alpha=samples), count + samples

    def finish(self) -> dict[str, Tensor]:
        """Return the means, and start anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


def mean_over_processes(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that averages a tensor over processes; None if there is one process."""
    if trainer.world_size == 1:
        return None

    def mean(tensor: Tensor) -> Tensor:
        averaged: Tensor = trainer.strategy.reduce(tensor, reduce_op="mean")
        return averaged

    return mean
