"""Single weights: the weakest go first, and no parameter falls below its minimum."""

from __future__ import annotations

import torch

from lightning_prune._targets import Target, Threshold
from lightning_prune._types import Masks, Scores
from lightning_prune.selection.apportionment import apportion
from lightning_prune.selection.guard import guarded_minimum
from lightning_prune.selection.ranking import ranking_keys, smallest, split_like
from lightning_prune.selection.sparsity import keep_largest
from lightning_prune.selection.threshold import keep_above


def select_weights(
    scores: Scores, target: Target, masks: Masks, *, by_layer: bool, min_density: float
) -> tuple[Masks, list[str]]:
    """Return the masks a target asks for, and the names of the parameters the guard kept alive.

    Args:
        scores: One score per weight, checked.
        target: A share of all weights, or a threshold on each score.
        masks: The masks in force, one for each score.
        by_layer: Whether the share is meant for each parameter by itself.
        min_density: The share of each parameter that stays whatever its scores.

    Linear in the number of weights, no sort.
    """
    minima = {
        name: guarded_minimum(mask.numel(), int(mask.sum()), min_density)
        for name, mask in masks.items()
    }
    if isinstance(target, Threshold):
        kept = keep_above(scores, target, masks=masks)
        short = [name for name, mask in kept.items() if int(mask.sum()) < minima[name]]
        counts = {name: scores[name].numel() - minima[name] for name in short}
        return {**kept, **_remove(scores, masks, counts)}, short
    if by_layer:
        return _select_by_layer(scores, target, masks, minima)
    kept = keep_largest(scores, target, masks=masks)
    if all(int(mask.sum()) >= minima[name] for name, mask in kept.items()):
        return kept, []
    return _select_guarded(scores, target, masks, minima)


def _select_by_layer(
    scores: Scores, share: float, masks: Masks, minima: dict[str, int]
) -> tuple[Masks, list[str]]:
    names = list(scores)
    sizes = [scores[name].numel() for name in names]
    quotas, bound = apportion(
        sizes,
        share,
        lower=[int((~masks[name]).sum()) for name in names],
        upper=[size - minima[name] for name, size in zip(names, sizes, strict=True)],
    )
    counts = dict(zip(names, quotas, strict=True))
    return _remove(scores, masks, counts), [names[i] for i in bound]


def _remove(scores: Scores, masks: Masks, counts: dict[str, int]) -> Masks:
    """Remove that many weights of each parameter named, those that are gone already included."""
    kept: Masks = {}
    for name, count in counts.items():
        one = {name: scores[name]}
        kept.update(split_like(~smallest(ranking_keys(one, masks), count), one))
    return kept


def _select_guarded(
    scores: Scores, share: float, masks: Masks, minima: dict[str, int]
) -> tuple[Masks, list[str]]:
    """Put each parameter's strongest weights out of reach, then remove the weakest of the rest."""
    keys = ranking_keys(scores, masks)
    counts = {name: score.numel() - minima[name] for name, score in scores.items()}
    strongest = _remove(scores, masks, counts).values()
    spared = torch.cat([mask.reshape(-1).to(keys.device) for mask in strongest])
    already = int(torch.isneginf(keys).sum())
    goal, room = max(round(share * keys.numel()), already), int((~spared).sum())
    gone = smallest(keys.masked_fill(spared, torch.inf), min(goal, room))
    if goal > room:
        return split_like(~gone, scores), [name for name, least in minima.items() if least]
    # The guard stepped in where a spared weight comes before the last one removed.
    last = torch.where(gone, keys, -torch.inf).max()
    first_place = int((gone & (keys == last)).nonzero()[0]) if gone.any() else keys.numel()
    places = torch.arange(keys.numel(), device=keys.device)
    passed = spared & ((keys < last) | ((keys == last) & (places > first_place)))
    short = split_like(passed, scores)
    return split_like(~gone, scores), [name for name in scores if bool(short[name].any())]
