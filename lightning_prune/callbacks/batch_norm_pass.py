"""Running statistics as plain averages over batches: one pass, on one process or several.

Enters: a model's batch norms, and batches. Leaves: new means and variances in those that were
reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.callbacks.scoring import summed
from lightning_prune.passes.batches import default_call
from lightning_prune.passes.isolation import evaluating


def batch_norms(module: nn.Module) -> dict[str, Any]:
    """Return by name the batch norms that learn statistics: in train mode, with running ones."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    }


def estimate_statistics(
    module: nn.Module,
    layers: list[Any],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = default_call,
) -> list[int]:
    """Make running statistics the averages over batches, each batch counting the same.

    Args:
        module: The model; all but ``layers`` is in eval mode meanwhile.
        layers: Its batch norms to estimate.
        batches: In the form that ``forward`` reads.
        forward: ``forward(module, batch)``.

    Returns:
        How many batches each layer has seen, in their order. A layer that has seen none, and after
        an exception every layer, has the statistics from before.
    """
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [[getattr(layer, name).clone() for name in names] for layer in layers]
    momenta = [layer.momentum for layer in layers]
    seen = [0] * len(layers)
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
        with torch.no_grad(), evaluating(module):
            for batch in batches:
                for layer in layers:
                    layer.training = True
                forward(module, batch)
        seen = [int(layer.num_batches_tracked) for layer in layers]
    finally:
        for layer, momentum, kept, count in zip(layers, momenta, before, seen, strict=True):
            layer.momentum = momentum
            layer.training = True
            for name, value in zip(names, () if count else kept, strict=False):
                getattr(layer, name).copy_(value)
    return seen


def average(trainer: Trainer, layers: list[Any], seen: list[int]) -> list[int]:
    """Average over the processes, each batch counting the same; return how many all have seen."""
    everywhere = []
    for layer, count in zip(layers, seen, strict=True):
        ours = torch.tensor(float(count), device=layer.running_mean.device)
        total = summed(trainer, ours.clone())
        everywhere.append(int(total))
        for statistic in (layer.running_mean, layer.running_var):
            # Also where nobody has seen any: all processes take part in each of these.
            everyones = summed(trainer, statistic.float() * ours)
            if total > 0:
                statistic.copy_(everyones / total)
    return everywhere
