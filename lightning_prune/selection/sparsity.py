"""Keep the weights with the largest scores, exactly as many as asked for."""

from __future__ import annotations

import torch

from lightning_prune._targets import Threshold, target_fault
from lightning_prune._types import Masks, Scores
from lightning_prune.selection.checks import check_masks, check_scores
from lightning_prune.selection.ranking import ranking_keys, smallest, split_like


def keep_largest(scores: Scores, sparsity: float, *, masks: Masks | None = None) -> Masks:
    """Return the masks that remove the least important share of all weights together.

    Exactly ``round(sparsity * total)`` weights are removed, those removed before included: asking
    for 0.5 twice gives 0.5, not 0.75. Weights with equal scores are ordered by their place
    (parameters in the order of ``scores``, then by index), and the earlier one is kept.

    Args:
        scores: One score per weight, by parameter name; larger is more important.
        sparsity: The share removed of all weights together, in [0, 1).
        masks: The masks in force. What they have removed stays removed, whatever its score, also
            if that is more than ``sparsity`` asks for. A parameter without a mask is complete.

    Returns:
        One bool mask for each score, ``True`` where the weight is kept.

    Raises:
        NonFiniteScoresError: A score is NaN or infinite; the message names the parameter.
        ValueError: No scores, ``sparsity`` outside [0, 1), or masks that do not fit the scores.

    Time is linear in the number of weights (one selection of the k-th smallest, no sort); memory is
    one copy of the scores.

    Example:
        >>> import torch
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
        >>> keep_largest(scores, 0.25)
        {'a': tensor([True, True]), 'b': tensor([False,  True])}
    """
    check_scores(scores)
    check_masks(masks, scores)
    if isinstance(sparsity, Threshold) or target_fault(sparsity) is not None:
        raise ValueError(f"Expected argument `sparsity` to be in [0, 1), but got {sparsity!r}.")
    keys = ranking_keys(scores, masks or {})
    already = int(torch.isneginf(keys).sum())
    return split_like(~smallest(keys, max(round(sparsity * keys.numel()), already)), scores)
