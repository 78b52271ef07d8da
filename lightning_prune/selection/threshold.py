"""Keep the weights whose score is above a threshold: the published form, ``R_i > T``."""

from __future__ import annotations

from lightning_prune._targets import Threshold
from lightning_prune._types import Masks, Scores
from lightning_prune.selection.checks import check_masks, check_scores

__all__ = ["Threshold", "keep_above"]


def keep_above(scores: Scores, threshold: Threshold, *, masks: Masks | None = None) -> Masks:
    """Return the masks that keep every weight whose score is strictly above the threshold.

    Args:
        scores: One score per weight, by parameter name.
        threshold: ``T``. Each weight is compared with it alone, so one layer's mask does not depend
            on another layer's scores; a layer may lose all its weights.
        masks: The masks in force. What they have removed stays removed. A parameter without one is
            complete.

    Returns:
        One bool mask for each score, ``True`` where the weight is kept.

    Raises:
        NonFiniteScoresError: A score is NaN or infinite; the message names the parameter.
        ValueError: No scores, or masks that do not fit them.

    Example:
        >>> import torch
        >>> keep_above({"weight": torch.tensor([0.0, 1.0, 2.0])}, Threshold(1.0))
        {'weight': tensor([False, False,  True])}
    """
    check_scores(scores)
    check_masks(masks, scores)
    kept = {name: score > threshold.value for name, score in scores.items()}
    for name, mask in (masks or {}).items():
        kept[name] &= mask.to(kept[name].device)
    return kept
