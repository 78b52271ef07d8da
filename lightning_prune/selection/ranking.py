"""One order of all weights: by score, and of equal scores the earlier place is the stronger."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune._types import Masks, Scores
from lightning_prune.passes.precision import widest


def complete_masks(scores: Scores, masks: Masks | None) -> Masks:
    """Return a mask for every score, on its device; all ``True`` where ``masks`` has none."""
    return {
        name: masks[name].to(score.device)
        if masks is not None and name in masks
        else torch.ones(score.shape, dtype=torch.bool, device=score.device)
        for name, score in scores.items()
    }


def ranking_keys(scores: Scores, masks: Masks) -> Tensor:
    """Lay all scores end to end; -inf marks what is removed already and so goes first."""
    device = next(iter(scores.values())).device
    keys = []
    for name, score in scores.items():
        key = score.detach().reshape(-1)
        key = key if key.is_floating_point() else key.double()
        if name in masks:
            key = key.masked_fill(~masks[name].reshape(-1).to(key.device), -torch.inf)
        keys.append(key.to(device))
    return torch.cat(keys)


def split_like(flat: Tensor, scores: Scores) -> Masks:
    """Cut what was laid end to end back into one tensor a parameter, on that score's device."""
    parts = torch.split(flat, [score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def smallest(keys: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` of the smallest keys; of equal keys those at the end come first.

    Linear in the number of keys: one selection of the k-th smallest, no sort (but where
    deterministic algorithms are asked for).

    Example:
        >>> smallest(torch.tensor([1.0, 1.0, 2.0]), 1)
        tensor([False,  True, False])
    """
    if count == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    if torch.are_deterministic_algorithms_enabled():  # which older torch lacks for kthvalue on CUDA
        cut = keys.sort().values[count - 1]
    else:
        cut = keys.kthvalue(count).values
    marked = keys < cut
    equal = torch.nonzero(keys == cut).squeeze(1)
    marked[equal[equal.numel() - (count - int(marked.sum())) :]] = True
    return marked


def weakest_first(keys: Tensor) -> Tensor:
    """Return the places of all keys in the order in which they are removed.

    Its first k places are what :func:`smallest` marks, for every k. Time n log n.

    Example:
        >>> weakest_first(torch.tensor([1.0, 1.0, 0.0]))
        tensor([2, 1, 0])
    """
    return keys.numel() - 1 - torch.argsort(keys.flip(0), stable=True)


def summable(score: Tensor) -> Tensor:
    """Return the score in the widest float type of its device, to add up without a loss."""
    return score.detach().to(widest(score.device))
