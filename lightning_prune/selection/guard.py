"""The guard against layer collapse: no parameter is emptied, the others make up for it.

A global ranking can take every weight of a layer whose scores are small as a whole; then nothing
passes that layer any more and no training brings it back. The strongest weights of each parameter
are therefore out of reach, up to a minimum, and the walk over the weakest goes on elsewhere.

Source: Tanaka, Kunin, Yamins and Ganguli, 2020, "Pruning neural networks without any data by
iteratively conserving synaptic flow" (which names the layer collapse).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.selection.ranking import weakest_first


def guarded_minimum(numel: int, alive: int, min_density: float) -> int:
    """Return how many weights of a parameter are out of reach.

    At least one, and ``ceil(min_density * numel)``; but never more than are still there, for an
    earlier mask may have gone further.

    Example:
        >>> guarded_minimum(30, 30, 0.0), guarded_minimum(30, 30, 0.25), guarded_minimum(30, 0, 0.1)
        (1, 8, 0)
    """
    return min(alive, max(1, math.ceil(min_density * numel)))


@dataclass(frozen=True)
class Units:
    """The groups of one parameter, each kept or removed as one piece.

    Args:
        scores: One score a unit, of shape (G,); larger is more important.
        alive: How many weights each unit still holds, of shape (G,), int64; 0 for one that is gone.
        numel: The size of the parameter.
        minimum: How many weights have to stay (:func:`guarded_minimum`).
    """

    scores: Tensor
    alive: Tensor
    numel: int
    minimum: int

    @property
    def removed(self) -> int:
        """How many weights of the parameter are gone already."""
        return self.numel - int(self.alive.sum())

    def protected(self) -> Tensor:
        """Mark the strongest units, of shape (G,), that hold the minimum together."""
        keys = self.scores.masked_fill(self.alive == 0, -torch.inf)
        strongest = weakest_first(keys).flip(0)
        held = self.alive[strongest]
        marked = torch.zeros_like(self.alive, dtype=torch.bool)
        marked[strongest] = (held.cumsum(0) - held < self.minimum) & (held > 0)
        return marked


def remove_weakest(parameters: Sequence[Units], budget: int) -> tuple[list[Tensor], list[int]]:
    """Remove the weakest units that are not protected, as many as fit into ``budget`` weights.

    The units of all parameters are walked together, the weakest first, up to the first that does
    not fit; protected ones are passed over.

    Args:
        parameters: The units of each parameter, on any devices.
        budget: How many weights may go now, at most.

    Returns:
        For each parameter the units that stay, a bool tensor of shape (G,) (units that were gone
        before do not), and the places of the parameters where a unit would have gone but for the
        guard.
    """
    device = parameters[0].scores.device
    sizes = torch.cat([units.alive.to(device) for units in parameters])
    guarded = torch.cat([units.protected().to(device) for units in parameters])
    order = weakest_first(torch.cat([units.scores.to(device) for units in parameters]))
    held, passed = sizes[order], guarded[order]
    reach = torch.where(passed, 0, held).cumsum(0)
    fits = reach <= budget
    stop = int(fits.sum())  # `reach` only grows, so what fits is a start of the walk
    left = budget - int(reach[stop - 1]) if stop else budget
    gone = torch.zeros_like(guarded)
    walked = order[:stop]
    gone[walked] = ~guarded[walked]
    # The guard stepped in where a unit was passed over before the last one removed, and where it
    # would have fitted into what is left of the budget.
    taken = torch.nonzero(~passed[:stop] & (held[:stop] > 0))
    last = int(taken[-1]) if taken.numel() else -1
    places = torch.arange(stop, device=device)
    spared = passed[:stop] & ((places < last) | (held[:stop] <= left))
    short = torch.zeros_like(guarded)
    short[walked[spared]] = True
    lengths = [units.scores.numel() for units in parameters]
    kept = torch.split(~gone & (sizes > 0), lengths)
    return (
        [part.to(units.scores.device) for part, units in zip(kept, parameters, strict=True)],
        [i for i, part in enumerate(torch.split(short, lengths)) if bool(part.any())],
    )
