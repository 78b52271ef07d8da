"""Whole structures: output units, input channels, attention heads, each kept or removed as one.

A group's score is pooled from the scores of those of its weights that are still there. All groups
are parts of one tensor, and axes are axes of that tensor: axis 0 of ``nn.Linear.weight`` is the
output, of ``nn.ConvTranspose2d.weight`` the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_prune._targets import Target, Threshold
from lightning_prune._types import Masks, Scores
from lightning_prune.selection.apportionment import apportion
from lightning_prune.selection.guard import Units, guarded_minimum, remove_weakest
from lightning_prune.selection.ranking import summable

Pool: TypeAlias = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class Grouping:
    """Which weights of one parameter belong together.

    Args:
        axis: The axis that is cut into groups.
        groups: How many groups there are.
        blocks: The axis is that many blocks one after another, each cut into all groups; group g
            is the g-th piece of every block (q, k and v of a fused projection).
    """

    axis: int
    groups: int
    blocks: int = 1

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the groups of ``tensor`` as the rows of a matrix of shape (groups, weights)."""
        lines = tensor.detach().movedim(self.axis, 0)
        cut = lines.reshape(self.blocks, self.groups, -1)
        return cut.transpose(0, 1).reshape(self.groups, -1)

    def spread(self, kept: Tensor, like: Tensor) -> Tensor:
        """Return the mask, shaped as ``like``, that keeps the groups marked in ``kept``."""
        length = like.shape[self.axis] // (self.groups * self.blocks)
        lines = kept.repeat_interleave(length).repeat(self.blocks)
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return lines.view(shape).expand(like.shape)


def grouping_of(
    name: str, shape: torch.Size, granularity: str, heads: Mapping[str, int] | None
) -> Grouping | str:
    """Return the groups of a parameter, or what is wrong with it.

    Args:
        name: The parameter's full name.
        shape: Its shape.
        granularity: ``"unit"`` and ``"head"`` cut axis 0, ``"channel"`` cuts axis 1. (N:M needs an
            axis 1 as well and cuts it in its own way.)
        heads: For ``"head"``: name or pattern -> number of heads. A name written out goes first,
            then the patterns in their order.

    Example:
        >>> grouping_of("attn.in_proj_weight", torch.Size([24, 8]), "head", {"attn.*": 4})
        Grouping(axis=0, groups=4, blocks=3)
        >>> grouping_of("bias", torch.Size([24]), "channel", None)
        "'bias': expected two or more axes, none empty, for granularity 'channel', but got the \
shape (24,)"
    """
    axis = 0 if granularity in ("unit", "head") else 1
    if len(shape) <= axis or 0 in shape:
        axes = f"{'two' if axis else 'one'} or more axes, none empty,"
        got = f"but got the shape {tuple(shape)}"
        return f"{name!r}: expected {axes} for granularity {granularity!r}, {got}"
    if granularity != "head":
        return Grouping(axis, shape[axis])
    number = heads_of(name, heads or {})
    if number is None:
        return (
            f"{name!r}: expected a number of heads, but no pattern of `heads` fits; add one or "
            "leave the parameter out of what is pruned"
        )
    blocks = 3 if name.rpartition(".")[2] == "in_proj_weight" else 1
    if shape[0] % (number * blocks):
        what = "q, k and v of " * (blocks == 3) + f"{number} heads"
        return f"{name!r}: expected rows that divide into {what}, but got {shape[0]} rows"
    return Grouping(0, number, blocks)


def heads_of(name: str, heads: Mapping[str, int]) -> int | None:
    """Return the number of heads of a parameter, ``None`` if no pattern fits its name."""
    if name in heads:
        return heads[name]
    return next((number for pattern, number in heads.items() if fits(name, pattern)), None)


def fits(name: str, pattern: str) -> bool:
    """Tell whether a parameter is named by ``pattern``, in full or with ``*``, ``?``, ``[]``."""
    return name == pattern or fnmatchcase(name, pattern)


def pool_groups(score: Tensor, mask: Tensor, grouping: Grouping, pool: Pool) -> Tensor:
    """Return one score a group, of shape (groups,), from the weights that ``mask`` keeps.

    ``"sum"`` is what the whole group is worth, ``"mean"`` what a weight of it is worth, ``"max"``
    what the best of it is worth. A group without a weight gets -inf.
    """
    kept = grouping.rows(mask)
    rows = grouping.rows(summable(score))
    counts = kept.sum(1)
    if pool == "max":
        pooled = rows.masked_fill(~kept, -torch.inf).amax(1)
    else:
        pooled = rows.masked_fill(~kept, 0.0).sum(1)
        pooled = pooled / counts.clamp(min=1) if pool == "mean" else pooled
    return pooled.masked_fill(counts == 0, -torch.inf)


def select_groups(
    scores: Scores,
    target: Target,
    masks: Masks,
    groupings: Mapping[str, Grouping],
    *,
    pool: Pool,
    by_layer: bool,
    min_density: float,
) -> tuple[Masks, list[str]]:
    """Return the masks that remove the weakest groups, and where the guard had to step in.

    Args:
        scores: One score per weight, checked.
        target: The share of all weights removed: the weakest groups go, one after another, up to
            the first that would make it more than ``round(share * total)``. Or a threshold: the
            groups stay whose pooled score is above it.
        masks: The masks in force, one for each score.
        groupings: The groups of each parameter.
        pool: How a group's score comes from its weights'.
        by_layer: Whether the share is meant for each parameter by itself.
        min_density: The share of each parameter's weights that stays; one group does in any case.
    """
    units = [
        Units(
            scores=pool_groups(score, masks[name], groupings[name], pool),
            alive=groupings[name].rows(masks[name]).sum(1),
            numel=score.numel(),
            minimum=guarded_minimum(score.numel(), int(masks[name].sum()), min_density),
        )
        for name, score in scores.items()
    ]
    if isinstance(target, Threshold):
        kept, guarded = _above(units, target.value)
    elif by_layer:
        kept, guarded = _remove_by_layer(units, target)
    else:
        total, gone = sum(each.numel for each in units), sum(each.removed for each in units)
        kept, guarded = remove_weakest(units, round(target * total) - gone)
    names = list(scores)
    selected = {
        name: masks[name] & groupings[name].spread(part, masks[name])
        for name, part in zip(names, kept, strict=True)
    }
    return selected, [names[i] for i in guarded]


def _above(parameters: list[Units], threshold: float) -> tuple[list[Tensor], list[int]]:
    kept = [(units.scores > threshold) & (units.alive > 0) for units in parameters]
    guarded = []
    for i, units in enumerate(parameters):
        if int(units.alive[kept[i]].sum()) < units.minimum:
            kept[i] = units.protected()
            guarded.append(i)
    return kept, guarded


def _remove_by_layer(parameters: list[Units], share: float) -> tuple[list[Tensor], list[int]]:
    quotas, bound = apportion(
        [units.numel for units in parameters],
        share,
        lower=[units.removed for units in parameters],
        upper=[units.numel - int(units.alive[units.protected()].sum()) for units in parameters],
    )
    kept = []
    for units, quota in zip(parameters, quotas, strict=True):
        kept += remove_weakest([units], quota - units.removed)[0]
    return kept, bound
