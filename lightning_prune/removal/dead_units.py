"""Which units fall, and what has to be done to the layers behind them first.

Enters: a group of coupled units, and what arrives at the layers behind it. Leaves: a plan. Two
rules. A unit whose outgoing weights are all zero is not needed. A unit whose incoming weights are
all zero is a constant, which goes into the biases of the layers behind it; where zero padding makes
a constant inexact at the border, all constant channels of a group become one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_prune.removal import layers
from lightning_prune.removal.constants import Arriving, has_border
from lightning_prune.removal.graph import Group, Link
from lightning_prune.removal.widths import settle


@dataclass(frozen=True, eq=False)
class Fold:
    """Inputs of a layer that go into its bias: which, and their constants."""

    layer: nn.Module
    inputs: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Merge:
    """Inputs of a layer that another input stands for: which, and as what multiple of it."""

    layer: nn.Module
    inputs: Tensor
    into: int
    factors: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be cut of a group.

    Args:
        group: The group.
        cut: The units that fall, shape (cut,).
        folds: What to do before.
        merges: What to do before.
        notes: What stays although it is dead, and why.
    """

    group: Group
    cut: Tensor
    folds: list[Fold] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Taker:
    """A layer that takes the group's units: how each of them may go, one entry a unit."""

    link: Link
    unused: Tensor  # all its outgoing weights here are zero
    constant: Tensor  # it is a constant here
    foldable: Tensor  # and that constant can go into the bias
    value: Tensor  # the constant (the last one where a unit has several inputs)
    values: Tensor  # what arrives at each entry of the link
    single: Tensor  # it is one input here


def plan(group: Group, arriving: Mapping[int, Arriving], round_to: int) -> Plan:
    """Return what falls of a group.

    Args:
        group: A group without an obstacle.
        arriving: What :func:`~lightning_prune.removal.constants.observe` saw.
        round_to: The number of units that stay is rounded up to a multiple of this.
    """
    steady = _constant_nodes(group)
    takers = [_taker(link, group, steady, arriving) for link in group.links if _takes(link)]
    nothing = torch.zeros(group.width, dtype=torch.bool)
    if not takers:
        why = "no layer that is known takes its units: they stay"
        return Plan(group, nothing.nonzero()[:, 0], notes=[why])
    free = torch.stack([t.unused | t.foldable for t in takers]).all(0) & _taken(group, takers)
    mergeable = torch.stack([t.unused | t.constant for t in takers]).all(0)
    mergeable &= _taken(group, takers) & ~free
    keeper = _keeper(takers, mergeable)
    dead = free | mergeable if keeper is not None else free.clone()
    if keeper is not None:
        dead[keeper] = False
    cut, spared = settle(dead, group.links, round_to)
    notes = []
    untaken = int((~_taken(group, takers)).sum())
    if untaken:
        notes.append(f"{untaken} units go where no known layer takes them one by one: they stay")
    if spared:
        notes.append(f"{spared} units stay for the width (round_to, groups, or the last one)")
    stays = int(mergeable.sum()) - int(mergeable[cut].sum())
    if stays:
        notes.append(
            f"{stays} constant channel stays: behind zero padding it is no constant at the border"
        )
    folds = [f for t in takers if (f := _fold(t, cut)) is not None]
    merges = []
    if keeper is not None:
        merges = [m for t in takers if (m := _merge(t, cut, mergeable, keeper)) is not None]
    return Plan(group, cut, folds, merges, notes)


def _takes(link: Link) -> bool:
    return link.side == "inputs"


def _taken(group: Group, takers: list[_Taker]) -> Tensor:
    """Which units some layer takes: what none takes leaves the model, or is not understood."""
    taken = torch.zeros(group.width, dtype=torch.bool)
    for taker in takers:
        taken[taker.link.roots] = True
    return taken


def _constant_nodes(group: Group) -> dict[int, Tensor]:
    """Return, by node, which units do not depend on the data there, shape (units,).

    A unit without incoming weights does not, nor does what only such units go into.
    """
    here = {link.key: link for link in group.links if not _takes(link)}
    present = {key: _spread(link, group.width) for key, link in here.items()}
    made = {key: _weightless(link, group.width) for key, link in here.items()}
    steady = {key: made[key].clone() for key in here}
    changed = True
    while changed:
        changed = False
        for key, link in here.items():
            if link.side == "outputs":
                continue
            new = made[key] | (_steady_before(link, steady, present) & present[key])
            if not torch.equal(new, steady[key]):
                steady[key], changed = new, True
    return steady


def _steady_before(
    link: Link, steady: Mapping[int, Tensor], present: Mapping[int, Tensor]
) -> Tensor:
    width = len(next(iter(present.values())))
    result = torch.ones(width, dtype=torch.bool)
    for source in link.sources:
        if source in steady:
            result &= steady[source] | (~present[source] if link.joins else result & False)
        elif not link.joins:
            result &= False
    return result


def _spread(link: Link, width: int) -> Tensor:
    present = torch.zeros(width, dtype=torch.bool)
    present[link.roots] = True
    return present


def _weightless(link: Link, width: int) -> Tensor:
    """Which units get nothing but a constant out of this node, whatever goes in."""
    if link.layer is None or link.side is None:
        return torch.zeros(width, dtype=torch.bool)
    if isinstance(link.layer, nn.PReLU):
        return torch.zeros(width, dtype=torch.bool)
    if isinstance(link.layer, layers.BATCH_NORMS):  # a scale of zero leaves the shift
        scale = link.layer.weight if link.layer.affine else torch.ones(link.layer.num_features)
        zero = scale.detach() == 0
    else:
        zero = (layers.rows(link.layer) == 0).all(1)
    return _all_of(zero[link.indices], link.roots, width)


def _all_of(flags: Tensor, roots: Tensor, width: int) -> Tensor:
    """Combine the entries of each unit: True where there are some and all are."""
    result = torch.zeros(width, dtype=torch.bool)
    result[roots] = True
    result[roots[~flags.cpu()]] = False
    return result


def _taker(
    link: Link, group: Group, steady: Mapping[int, Tensor], arriving: Mapping[int, Arriving]
) -> _Taker:
    layer = link.layer
    if layer is None:
        raise TypeError("Expected the link of a layer.")
    width = group.width
    absent = ~_spread(link, width)
    unused = _all_of((layers.columns(layer) == 0).all(1)[link.indices], link.roots, width) | absent
    value = torch.zeros(width, dtype=torch.double)
    single = torch.bincount(link.roots, minlength=width) == 1
    seen = arriving.get(id(layer))
    if seen is None:
        never = torch.zeros(width, dtype=torch.bool)
        return _Taker(link, unused, never, absent, value, value[link.roots], single)
    present = {source: torch.ones(width, dtype=torch.bool) for source in steady}
    structural = _steady_before(link, steady, present)
    constant = structural & _all_of(seen.constant[link.indices], link.roots, width)
    values = seen.value.cpu()[link.indices].double()
    value[link.roots] = values
    zero = _all_of((seen.value == 0)[link.indices], link.roots, width)
    foldable = constant & zero if has_border(layer) else constant
    return _Taker(link, unused, constant, foldable | absent, value, values, single)


def _keeper(takers: list[_Taker], mergeable: Tensor) -> int | None:
    """Return the constant unit that can stand for the others, if there are others."""
    if int(mergeable.sum()) < 2:
        return None
    size = torch.full((len(mergeable),), torch.inf, dtype=torch.double)
    for taker in takers:
        needed = mergeable & ~(taker.unused | taker.foldable)
        if not bool(needed.any()):
            continue
        if int(getattr(taker.link.layer, "groups", 1)) > 1 or not bool(taker.single[needed].all()):
            return None
        able = taker.constant & taker.single
        size = torch.minimum(size, torch.where(able, taker.value.abs(), torch.zeros_like(size)))
    size = torch.where(mergeable, size, torch.zeros_like(size))
    best = int(size.argmax())
    return best if 0 < float(size[best]) < torch.inf else None


def _fold(taker: _Taker, cut: Tensor) -> Fold | None:
    """Return what goes into the bias: constants that are cut, used, and exact at the border."""
    goes = torch.zeros_like(taker.unused)
    goes[cut] = True
    goes &= taker.foldable & taker.constant & ~taker.unused
    chosen = goes[taker.link.roots]
    if not bool(chosen.any()) or taker.link.layer is None:
        return None
    return Fold(taker.link.layer, taker.link.indices[chosen], taker.values[chosen])


def _merge(taker: _Taker, cut: Tensor, mergeable: Tensor, keeper: int) -> Merge | None:
    goes = torch.zeros_like(mergeable)
    goes[cut] = True
    goes &= mergeable & ~taker.foldable & ~taker.unused
    if not bool(goes.any()) or taker.link.layer is None:
        return None
    link = taker.link
    chosen = goes[link.roots]
    into = int(link.indices[link.roots == keeper][0])
    factors = taker.value[link.roots[chosen]] / taker.value[keeper]
    return Merge(taker.link.layer, link.indices[chosen], into, factors)
