"""A group of coupled units on the other ways that a forward takes.

Enters: the groups of one way, and one of the example's own. Leaves: why that cannot be cut, if on
the other way its units go elsewhere or through what mixes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_prune.removal.graph import Group


def by_layer(groups: Iterable[Group]) -> dict[str, Group]:
    """Return the groups by the full names of the layers that make their units."""
    return {name: group for group in groups for name in _makers(group)}


def obstacle_on(way: Mapping[str, Group], group: Group) -> str | None:
    """Return why a group cannot be cut on another way. A way that it has no part in is none.

    Args:
        way: That way's groups, of :func:`by_layer`.
        group: The group on the example's own way.
    """
    for name in _makers(group):
        there = way.get(name)
        if there is None:
            continue
        if there.obstacle is not None:
            return f"on another way that the forward takes {there.obstacle}"
        if there.root != group.root or _ends(there) != _ends(group):
            return "on another way that the forward takes its units are coupled otherwise"
    return None


def _makers(group: Group) -> list[str]:
    return [
        group.root,
        *(link.name for link in group.links if link.side in ("outputs", "channels")),
    ]


def _ends(group: Group) -> set[tuple[str, str | None, tuple[tuple[int, int], ...]]]:
    """Return the layers' sides that the units are at, and where in them each is."""
    return {
        (
            link.name,
            link.side,
            tuple(sorted(zip(link.roots.tolist(), link.indices.tolist(), strict=True))),
        )
        for link in group.links
        if link.layer is not None
    }
