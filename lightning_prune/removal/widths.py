"""Widths that have to be kept: a multiple that hardware likes, equal groups, at least one unit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_prune.removal import layers
from lightning_prune.removal.graph import Link


def settle(dead: Tensor, links: Iterable[Link], round_to: int) -> tuple[Tensor, int]:
    """Return which dead units fall, and how many are spared.

    Args:
        dead: One flag a unit, shape (units,).
        links: Where the units go. A convolution with groups keeps equally many units of each.
        round_to: The number of units that stay is rounded up to a multiple of this.

    Example:
        >>> settle(torch.tensor([True, True, False, True, False]), [], 4)
        (tensor([0]), 2)
    """
    parts = [part for link in links if (part := _parts(link, len(dead))) is not None]
    falls = dead.clone()
    while True:
        before = int(falls.sum())
        for of_unit, groups in parts:
            _equalise(falls, of_unit, groups)
        if bool(falls.all()):
            falls[int(falls.nonzero()[-1])] = False
        kept = len(falls) - int(falls.sum())
        spare = falls.nonzero()[:, 0]
        lacking = min(-kept % round_to, len(spare))
        if lacking:
            falls[spare[-lacking:]] = False
        if int(falls.sum()) == before:
            break
    return falls.nonzero()[:, 0], int(dead.sum()) - int(falls.sum())


def _parts(link: Link, width: int) -> tuple[Tensor, int] | None:
    """Return each unit's group in a convolution that has some, -1 for units that are not in it."""
    layer = link.layer
    groups = int(getattr(layer, "groups", 1))
    if layer is None or link.side is None or groups == 1 or link.side == "channels":
        return None
    parts = torch.full((width,), -1)
    parts[link.roots] = link.indices // (layers.width(layer, link.side) // groups)
    return parts, groups


def _equalise(falls: Tensor, parts: Tensor, groups: int) -> None:
    """Spare units until equally many fall of every group, and one of each stays."""
    names = [int(n) for n in torch.unique(parts) if n >= 0]
    fewest = min(
        min(int(falls[parts == n].sum()), int((parts == n).sum()) - 1) if n in names else 0
        for n in range(groups)
    )
    for n in names:
        extra = (falls & (parts == n)).nonzero()[:, 0][fewest:]
        falls[extra] = False
