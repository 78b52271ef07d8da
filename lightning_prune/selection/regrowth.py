"""Bring back removed weights that would matter more than the weakest of those that are kept.

R, the squared gradients, is known for removed weights too: how far the output would move if the
weight were not zero. A swap leaves the number of weights as it is.

Source: Evci, Gale, Menick, Castro and Elsen, 2020, "Rigging the lottery" (there by the gradient's
magnitude).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune._types import Masks, Scores
from lightning_prune.selection.guard import guarded_minimum
from lightning_prune.selection.ranking import ranking_keys, smallest, split_like, weakest_first


def regrow(
    saliency: Scores,
    selected: Masks,
    earlier: Masks,
    *,
    share: float,
    by_layer: bool,
    min_density: float,
) -> tuple[Masks, int]:
    """Swap the weakest kept weights for removed ones with a larger R, pair by pair.

    The strongest removed weight is compared with the weakest kept one, the second with the second,
    and so on while R is strictly larger. What this very event has removed stays removed, and no
    parameter falls below its minimum.

    Args:
        saliency: R of every weight, removed ones included, by parameter name.
        selected: The masks this event has come to.
        earlier: The masks in force before it, one for each; only what they have removed may return.
        share: At most this share of the kept weights is swapped, in [0, 1).
        by_layer: Whether weights are only swapped within their parameter.
        min_density: As in :func:`~lightning_prune.selection.guard.guarded_minimum`.

    Returns:
        The masks after the swaps, and how many there were.
    """
    if by_layer:
        swapped: Masks = {}
        count = 0
        for name in selected:
            one, more = _swap(
                {name: saliency[name]}, selected, earlier, share=share, min_density=min_density
            )
            swapped.update(one)
            count += more
        return swapped, count
    return _swap(saliency, selected, earlier, share=share, min_density=min_density)


def _swap(
    saliency: Scores, selected: Masks, earlier: Masks, *, share: float, min_density: float
) -> tuple[Masks, int]:
    keys = ranking_keys(saliency, {})
    kept = _flat(saliency, selected)
    leaving = torch.nonzero(kept & ~_protected(saliency, selected, min_density)).squeeze(1)
    returning = torch.nonzero(~_flat(saliency, earlier)).squeeze(1)
    leaving = leaving[weakest_first(keys[leaving])]
    returning = returning[weakest_first(keys[returning]).flip(0)]
    most = min(int(share * int(kept.sum())), leaving.numel(), returning.numel())
    better = keys[returning[:most]] > keys[leaving[:most]]
    count = int(better.sum())  # one side falls, the other rises: the better pairs come first
    kept[leaving[:count]] = False
    kept[returning[:count]] = True
    return split_like(kept, saliency), count


def _protected(saliency: Scores, selected: Masks, min_density: float) -> Tensor:
    """Mark, in each parameter, the strongest kept weights by R up to its minimum."""
    marks = {}
    for name, score in saliency.items():
        one = {name: score}
        alive = int(selected[name].sum())
        minimum = guarded_minimum(score.numel(), alive, min_density)
        keys = ranking_keys(one, selected)
        marks.update(split_like(~smallest(keys, score.numel() - minimum), one))
    return _flat(saliency, marks)


def _flat(like: Scores, masks: Masks) -> Tensor:
    device = next(iter(like.values())).device
    return torch.cat([masks[name].reshape(-1).to(device) for name in like])
