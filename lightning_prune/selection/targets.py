"""From a schedule's target to the masks it asks for."""

from __future__ import annotations

from lightning_prune._targets import Target, Threshold
from lightning_prune._types import Masks, Scores
from lightning_prune.selection.sparsity import keep_largest
from lightning_prune.selection.threshold import keep_above


def keep_by_target(scores: Scores, target: Target, *, masks: Masks | None = None) -> Masks:
    """Return the masks a target asks for: a share of all weights, or a threshold on each score.

    Args:
        scores: One score per weight, by parameter name; larger is more important.
        target: A share removed, in [0, 1) (:func:`keep_largest`), or a
            :class:`~lightning_prune.Threshold` (:func:`keep_above`).
        masks: The masks in force. What they have removed stays removed.

    Raises:
        NonFiniteScoresError: A score is NaN or infinite; the message names the parameter.
        ValueError: No scores, a share outside [0, 1), or masks that do not fit the scores.

    Example:
        >>> import torch
        >>> scores = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> keep_by_target(scores, 0.75)
        {'weight': tensor([False, False, False,  True])}
        >>> keep_by_target(scores, Threshold(2.0))
        {'weight': tensor([False, False,  True,  True])}
    """
    if isinstance(target, Threshold):
        return keep_above(scores, target, masks=masks)
    return keep_largest(scores, target, masks=masks)
