"""Masks in, a model that keeps them out.

The model's parameters stay what they are (same objects, names, class and state_dict keys); the
masks live beside it. What enters: a model and masks. What leaves: the same model with exact zeros,
which the optimizer cannot revive, and the numbers that say how sparse it is.
"""

from __future__ import annotations

from lightning_prune.masking.apply import MaskKeeper, zero_removed
from lightning_prune.masking.packing import pack_masks, unpack_masks
from lightning_prune.masking.prunable import Prunable, find_prunable, layers_left_out
from lightning_prune.masking.statistics import SparsityMetric, count_removed, density, sparsity
from lightning_prune.masking.tables import unread_rows

__all__ = [
    "MaskKeeper",
    "Prunable",
    "SparsityMetric",
    "count_removed",
    "density",
    "find_prunable",
    "layers_left_out",
    "pack_masks",
    "sparsity",
    "unpack_masks",
    "unread_rows",
    "zero_removed",
]
