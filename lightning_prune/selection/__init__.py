"""Scores in, masks out.

Pure functions: nothing here touches a model, and the same scores give the same masks on every
machine and in every process. What enters: scores, by parameter name, and the masks in force. What
leaves: masks, ``True`` where a weight is kept.
"""

from __future__ import annotations

from lightning_prune.selection.choice import Selected, Selection
from lightning_prune.selection.criteria import (
    CRITERIA,
    Criterion,
    CriterionLike,
    resolve_criterion,
)
from lightning_prune.selection.sparsity import keep_largest
from lightning_prune.selection.threshold import Threshold, keep_above

__all__ = [
    "CRITERIA",
    "Criterion",
    "CriterionLike",
    "Selected",
    "Selection",
    "Threshold",
    "keep_above",
    "keep_largest",
    "resolve_criterion",
]
