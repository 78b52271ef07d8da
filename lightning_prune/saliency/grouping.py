"""Rows -> groups of samples that are run together, so that little is computed for nothing.

A sample that needs one row should not wait for one that needs nine. Samples are sorted by the
number of rows they need and cut into groups; or, where that is cheaper, every row becomes a sample
of its own (the sample is repeated).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.saliency.rows import Rows

FORWARD, BACKWARD = 1.0, 2.0
"""Costs of a sample forward and of a row backward; the unit is one sample's forward pass."""


@dataclass(frozen=True)
class Group:
    """Samples that are run together, and the rows that belong to them.

    Attributes:
        source: The batch's rows.
        samples: (n,) indices into the batch, repeats allowed.
        rows: (R,) indices of rows.
        order: (R,) which backward pass takes a row.
        place: (R,) which of the group's samples a row belongs to.
    """

    source: Rows
    samples: Tensor
    rows: Tensor
    order: Tensor
    place: Tensor

    def gradients(self, logits: Tensor) -> Tensor:
        """Return the gradients of the output, (K, n, *logits.shape[1:]), in the logits' dtype."""
        passes = int(self.order.max()) + 1 if len(self.order) else 0
        out = logits.new_zeros(passes, *logits.shape)
        out[self.order, self.place] = self.source.vectors(self.rows).to(logits)
        return out


def group_rows(
    rows: Rows, workspace: int, launch: float, width: int, alone: bool = False
) -> list[Group]:
    """Cut the rows of a batch into groups.

    The gradients of the outputs of one group take at most a quarter of the workspace.

    Args:
        rows: The batch's rows.
        workspace: Bytes of work space.
        launch: What starting a pass costs; the unit is one sample's forward pass.
        width: Bytes that the output gradients of all captured calls take for one sample; those of
            one group take at most a quarter of the workspace, which leaves room for what autograd
            holds between them.
        alone: Some parameters are scored by running each sample of a group by itself as well.
    """
    if not len(rows.prediction):
        return []
    by_sample, sample, within = _enumerate(rows)
    present, counts = torch.unique_consecutive(sample, return_counts=True)
    counts, order = counts.sort(descending=True, stable=True)
    most = max(1, workspace // (4 * 8 * max(1, rows.shape[1:].numel())))
    room = max(1, workspace // (4 * max(1, width)))
    needed = counts.tolist()
    pieces = _pieces(needed, _cuts(needed, launch), most, room)
    cost = sum(launch + _group_cost(b - a, needed[a], launch) for a, b in pieces)
    size = min(rows.shape[0], most, room)
    single = len(sample) * (FORWARD + BACKWARD) + -(-len(sample) // size) * 2 * launch
    if alone:
        cost += len(present) * (FORWARD + launch)
        single += len(sample) * (FORWARD + launch)
    if needed[0] > most or cost > single:
        return _single_rows(rows, size)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    place = rank.repeat_interleave(counts[rank])
    groups = []
    for start, stop in pieces:
        mine = (place >= start) & (place < stop)
        groups.append(
            Group(
                rows, present[order[start:stop]], by_sample[mine], within[mine], place[mine] - start
            )
        )
    return groups


def whole_batch(rows: Rows) -> Group:
    """Return one group with every sample of the batch, in its order."""
    by_sample, sample, within = _enumerate(rows)
    return Group(rows, torch.arange(rows.shape[0], device=sample.device), by_sample, within, sample)


def _enumerate(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows ordered by sample, their samples, and each row's number within its sample.

    All three are (S,).
    """
    sample, by_sample = rows.sample.sort(stable=True)
    _, counts = torch.unique_consecutive(sample, return_counts=True)
    within = torch.arange(len(sample), device=sample.device) - (
        counts.cumsum(0) - counts
    ).repeat_interleave(counts)
    return by_sample, sample, within


def _single_rows(rows: Rows, size: int) -> list[Group]:
    everything = torch.arange(len(rows.prediction), device=rows.prediction.device)
    return [
        Group(
            rows,
            rows.sample[part],
            part,
            torch.zeros_like(part),
            torch.arange(len(part), device=part.device),
        )
        for part in torch.split(everything, size)
    ]


def _cuts(counts: list[int], launch: float) -> list[int]:
    """Return the cheapest places to cut samples sorted by falling counts.

    Cuts lie where the count changes; ``best[i]`` is the least cost of the samples up to i.
    """
    bounds = [i for i in range(1, len(counts)) if counts[i] < counts[i - 1]] + [len(counts)]
    best, before = {0: 0.0}, {0: 0}
    for stop in bounds:
        best[stop], before[stop] = min(
            (cost + launch + _group_cost(stop - start, counts[start], launch), start)
            for start, cost in best.items()
        )
    cuts: list[int] = []
    at = len(counts)
    while before[at]:
        at = before[at]
        cuts.insert(0, at)
    return cuts


def _group_cost(samples: int, passes: int, launch: float) -> float:
    return samples * FORWARD + passes * (samples * BACKWARD + launch)


def _pieces(counts: list[int], cuts: list[int], most: int, room: int) -> list[tuple[int, int]]:
    """Return the groups' bounds: ``room`` samples, ``most`` samples times passes at the most."""
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, len(counts)], strict=True):
        step = max(1, min(room, most // counts[start]))
        pieces += [(i, min(i + step, stop)) for i in range(start, stop, step)]
    return pieces
