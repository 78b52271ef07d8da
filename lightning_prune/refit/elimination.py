"""What each weight of a row costs when the row is taken apart weight by weight.

Enters: the Gram matrices of a layer's columns, its rows, what survives. Leaves: a price for each
survivor. A weight's own price, ``w^2 / [H^-1]_ii``, counts on all the others to make up for it: of
neighbouring pixels each is cheap to remove, as long as the rest stays, and a row can lose all of
them at the price of none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.refit.least_squares import inverse_diagonals

MOST_SURVIVORS = 64
"""Longer rows are priced weight by weight as they are: an event removes a small part of them."""

ROWS = 1024
"""So many rows are taken apart at once: at 64 survivors, 32 MiB a matrix."""

LATER = 1 + 1e-6
"""A later step costs at least so many times the one before: a difference that float32 can hold."""


def elimination_costs(grams: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Return what each weight costs at its turn when the cheapest goes first, row by row.

    At each step the weight with the least ``w_i^2 / [(H_SS)^-1]_ii`` leaves its row, the others
    make up for it, ``w_S <- w_S - w_i [H^-1]_Si / [H^-1]_ii``, and S is the smaller by it. A weight
    costs what its step did, or a millionth more than the one before it if that is more: it cannot
    go first. Rows with more than ``MOST_SURVIVORS`` have the costs of the first step throughout.

    Args:
        grams: (G, K, K) the matrices H, positive definite, float64; one for each group.
        weights: (G, D, K) the rows, float64.
        keep: (G, D, K) bool, True = a survivor.

    Returns:
        (G, D, K) costs, in the unit of w^2 H; 0 for the removed.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.

    Source: Frantar, Singh and Alistarh, 2022, "Optimal Brain Compression: a framework for accurate
    post-training quantization and pruning".

    Example:
        >>> gram = torch.tensor([[2.0, 1.9], [1.9, 2.0]], dtype=torch.float64)
        >>> w = torch.tensor([[1.0, 1.1]], dtype=torch.float64)
        >>> elimination_costs(gram[None], w[None], torch.ones(1, 1, 2, dtype=torch.bool))
        tensor([[[0.1950, 8.4050]]], dtype=torch.float64)
        >>> w.square() / inverse_diagonals(gram, torch.tensor([[True, True]]))
        tensor([[0.1950, 0.2360]], dtype=torch.float64)
    """
    counts = keep.sum(2)
    costs = torch.zeros_like(weights)
    long = keep & (counts > MOST_SURVIVORS)[..., None]
    for g in long.flatten(1).any(1).nonzero()[:, 0].tolist():
        found = weights[g].square() / inverse_diagonals(grams[g], long[g])
        costs[g] = torch.where(long[g], found, 0.0)
    short = ((counts > 0) & (counts <= MOST_SURVIVORS)).nonzero()
    for start in range(0, len(short), ROWS):
        g, r = short[start : start + ROWS].unbind(1)
        # Each row's survivors first, in their order; what fills up to the longest row is not alive.
        order = keep[g, r].long().argsort(dim=1, descending=True, stable=True)
        order = order[:, : int(counts[g, r].max())]
        alive = keep[g, r].gather(1, order)
        blocks = grams[g[:, None, None], order[:, :, None], order[:, None, :]]
        found = _taken_apart(blocks, weights[g, r].gather(1, order), alive)
        costs[g, r] = costs[g, r].scatter(1, order, found)
    return costs


def _taken_apart(blocks: Tensor, weights: Tensor, alive: Tensor) -> Tensor:
    """Return the costs (R, k) of rows with their parts of H, (R, k, k)."""
    inner = alive[:, :, None] & alive[:, None, :]
    blocks = blocks.masked_fill(~inner, 0.0) + torch.diag_embed((~alive).to(blocks))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))
    weights, costs = weights * alive, torch.zeros_like(weights)
    highest = torch.zeros_like(weights[:, 0])
    row = torch.arange(len(weights), device=weights.device)
    for _ in range(weights.shape[1]):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        step = torch.where(alive, weights.square() / diagonal, torch.inf)
        cost, index = step.min(1)
        going = alive.any(1)
        highest = torch.where(going, torch.maximum(highest * LATER, cost), highest)
        costs[row[going], index[going]] = highest[going]
        column = inverse[row, :, index]
        share = column / inverse[row, index, index][:, None]
        weights = weights - share * weights[row, index][:, None]
        inverse = inverse - share[:, :, None] * column[:, None, :]
        alive = alive.scatter(1, index[:, None], False)
        # What has left would be divided by an inverse of 0.
        inverse = torch.where(torch.diag_embed(~alive), 1.0, inverse)
    return costs
