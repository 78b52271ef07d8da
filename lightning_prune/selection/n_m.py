"""N:M: at most N weights of each M consecutive ones, the pattern that sparse tensor cores run.

A weight of shape (out, in, ...) is read as a matrix of shape (out, in * kernel), as torch lays it
out for its semi-structured tensors (``torch.sparse.to_sparse_semi_structured``), and each row is
cut into groups of M. What is left at the end of a row, r < M weights, keeps at most min(N, r).

Source: Mishra et al., 2021, "Accelerating sparse deep neural networks" (2:4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune._types import Masks, Scores
from lightning_prune.selection.apportionment import apportion
from lightning_prune.selection.ranking import summable, weakest_first


def parse_pattern(text: str) -> tuple[int, int] | None:
    """Return N and M of ``"N:M"``, ``None`` unless 1 <= N < M.

    Example:
        >>> parse_pattern("2:4"), parse_pattern("4:4")
        ((2, 4), None)
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        return None
    n, m = int(match[1]), int(match[2])
    return (n, m) if 1 <= n < m else None


@dataclass(frozen=True)
class Groups:
    """The groups of one parameter, whole and pruned.

    Args:
        whole: The weights that are there, bool, of shape (G, M); padding is ``False``.
        pruned: The N strongest of them.
        costs: The sum of the scores of what pruning a group removes, of shape (G,).
        gains: How many weights that is, of shape (G,), int64.
    """

    whole: Tensor
    pruned: Tensor
    costs: Tensor
    gains: Tensor


def select_n_m(
    scores: Scores, share: float, masks: Masks, *, n: int, m: int, by_layer: bool
) -> Masks:
    """Return masks that keep N of M in as many groups as the share asks for.

    At ``share == 1 - n / m`` that is every group: at most N of each M are kept, and exactly N where
    earlier masks have left as many. A smaller share prunes the groups first whose pruning costs
    least, in whole groups, to the number of weights nearest to ``round(share * total)``. No
    parameter can be emptied by it.

    Args:
        scores: One score per weight, checked, each of two or more axes.
        share: The share of all weights removed, in [0, 1 - n / m].
        masks: The masks in force, one for each score.
        n: How many stay.
        m: Of how many.
        by_layer: Whether the share is meant for each parameter by itself.
    """
    groups = {name: cut_into_groups(score, masks[name], n, m) for name, score in scores.items()}
    sizes = [score.numel() for score in scores.values()]
    gone = [size - int(masks[name].sum()) for name, size in zip(scores, sizes, strict=True)]
    most = [int(each.gains.sum()) for each in groups.values()]
    if is_limit(share, n, m):
        chosen = [torch.ones_like(each.gains, dtype=torch.bool) for each in groups.values()]
    elif by_layer:
        upper = [now + gain for now, gain in zip(gone, most, strict=True)]
        quotas, _ = apportion(sizes, share, lower=gone, upper=upper)
        chosen = [
            _cheapest([each], quota - now)[0]
            for each, quota, now in zip(groups.values(), quotas, gone, strict=True)
        ]
    else:
        chosen = _cheapest(list(groups.values()), round(share * sum(sizes)) - sum(gone))
    return {
        name: _put_together(torch.where(chose[:, None], each.pruned, each.whole), scores[name])
        for (name, each), chose in zip(groups.items(), chosen, strict=True)
    }


def is_limit(share: float, n: int, m: int) -> bool:
    """Tell whether a share is ``1 - n / m``, the most that N:M can remove, up to round-off."""
    return abs(share - (1 - n / m)) < 1e-9


def is_n_m(mask: Tensor, n: int, m: int) -> bool:
    """Tell whether a mask keeps at most ``n`` of each ``m``."""
    return bool((_cut(mask, m).sum(1) <= n).all())


def cut_into_groups(score: Tensor, mask: Tensor, n: int, m: int) -> Groups:
    """Cut a parameter into groups of ``m`` and find the ``n`` strongest of each.

    Of equal scores the earlier is kept.
    """
    whole = _cut(mask, m)
    ranked = _cut(summable(score), m)
    order = ranked.masked_fill(~whole, -torch.inf).argsort(dim=1, descending=True, stable=True)
    strongest = torch.zeros_like(whole).scatter_(1, order[:, :n], True)
    pruned = whole & strongest
    lost = whole & ~pruned
    return Groups(whole, pruned, ranked.masked_fill(~lost, 0.0).sum(1), lost.sum(1))


def _cut(tensor: Tensor, m: int) -> Tensor:
    """Return the groups as rows of shape (G, m), padded with zeros at the end of each row."""
    matrix = tensor.detach().reshape(tensor.shape[0], -1)
    padding = -matrix.shape[1] % m
    return torch.nn.functional.pad(matrix, (0, padding)).reshape(-1, m)


def _put_together(groups: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_cut`."""
    width = like[0].numel()
    return groups.reshape(like.shape[0], -1)[:, :width].reshape(like.shape).contiguous()


def _cheapest(parameters: Sequence[Groups], budget: int) -> list[Tensor]:
    """Mark the groups that cost least, until what they remove is nearest to ``budget``."""
    device = parameters[0].costs.device
    gains = torch.cat([groups.gains.to(device) for groups in parameters])
    costs = torch.cat([groups.costs.to(device) for groups in parameters])
    order = weakest_first(costs.masked_fill(gains == 0, -torch.inf))
    removed = gains[order].cumsum(0)
    count = int((removed <= budget).sum())
    if count < removed.numel():
        before = int(removed[count - 1]) if count else 0
        count += int(removed[count]) - budget < budget - before
    chosen = torch.zeros_like(gains, dtype=torch.bool)
    chosen[order[:count]] = True
    parts = torch.split(chosen, [groups.gains.numel() for groups in parameters])
    return [part.to(groups.gains.device) for part, groups in zip(parts, parameters, strict=True)]
