"""How sparse is a model? Sparsity is the share of weights removed, density the share kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune._types import Masks
from lightning_prune.masking.prunable import find_prunable


def density(masks: Masks) -> dict[str, float]:
    """Return the share of weights kept in each parameter.

    Example:
        >>> density({"weight": torch.tensor([True, False, True, True])})
        {'weight': 0.75}
    """
    return {name: int(mask.sum()) / max(1, mask.numel()) for name, mask in masks.items()}


def sparsity(model_or_masks: nn.Module | Mapping[str, Tensor]) -> float:
    """Return the share of weights that are removed, in [0, 1].

    Args:
        model_or_masks: Masks (``False`` is removed), or a model, whose exact zeros are counted. In
            a model only the prunable weights count: those of layers with two or more axes, neither
            biases nor norms, each tied weight once.

    Raises:
        TypeError: Neither a module nor a mapping of bool masks.
        ValueError: A model without prunable weights.

    Example:
        >>> sparsity({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
        0.75
    """
    removed, total = count_removed(model_or_masks)
    return removed / max(1, total)


def count_removed(model_or_masks: nn.Module | Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many weights are removed, and how many there are in all.

    The argument and the errors are those of :func:`sparsity`.

    Example:
        >>> count_removed({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
        (3, 4)
    """
    if isinstance(model_or_masks, nn.Module):
        weights = find_prunable(model_or_masks).parameters.values()
        kept = [weight.detach() != 0 for weight in weights]
    else:
        kept = _checked_masks(model_or_masks)
    return sum(int((~mask).sum()) for mask in kept), sum(mask.numel() for mask in kept)


class SparsityMetric(Metric):
    """Share of weights removed, summed over updates and processes.

    Update it with masks or with a model, as for :func:`sparsity`. Processes that hold the same
    masks give the same share as one of them; processes that hold parts of a model give the share of
    the whole.

    Example:
        >>> metric = SparsityMetric()
        >>> metric.update({"weight": torch.tensor([True, False, False, False])})
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    removed: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("removed", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, model_or_masks: nn.Module | Mapping[str, Tensor]) -> None:
        """Count the removed and all weights of masks, or of a model."""
        removed, total = count_removed(model_or_masks)
        self.removed += removed
        self.total += total

    def compute(self) -> Tensor:
        """Return the share removed, 0 if there are no weights."""
        return self.removed / self.total.clamp(min=1)


def _checked_masks(masks: Any) -> list[Tensor]:
    if not isinstance(masks, Mapping) or not all(
        isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks.values()
    ):
        raise TypeError(
            "Expected a model, or masks as a mapping parameter name -> bool tensor, but got "
            f"{type(masks).__name__}. Scores are not masks: select first."
        )
    return list(masks.values())
