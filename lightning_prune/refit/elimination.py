"""What each weight of a row costs when the row is taken apart weight by weight.

Enters: the Gram matrix of a layer's columns, its rows, what survives. Leaves: a price for each
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


def elimination_costs(gram: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Return what each weight costs at its turn when the cheapest goes first, row by row.

    At each step the weight with the least ``w_i^2 / [(H_SS)^-1]_ii`` leaves its row, the others
    make up for it, ``w_S <- w_S - w_i [H^-1]_Si / [H^-1]_ii``, and S is the smaller by it. A weight
    costs what its step did, or an earlier one if that did more. Rows with more than
    ``MOST_SURVIVORS`` have the costs of the first step throughout.

    Args:
        gram: (K, K) the matrix H, positive definite, float64.
        weights: (D, K) the rows, float64.
        keep: (D, K) bool, True = a survivor.

    Returns:
        (D, K) costs, in the unit of w^2 H; 0 for the removed.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.

    Source: Frantar, Singh and Alistarh, 2022, "Optimal Brain Compression: a framework for accurate
    post-training quantization and pruning".

    Example:
        >>> gram = torch.tensor([[2.0, 1.9], [1.9, 2.0]], dtype=torch.float64)
        >>> w = torch.tensor([[1.0, 1.1]], dtype=torch.float64)
        >>> elimination_costs(gram, w, torch.tensor([[True, True]]))
        tensor([[0.1950, 8.4050]], dtype=torch.float64)
        >>> w.square() / inverse_diagonals(gram, torch.tensor([[True, True]]))
        tensor([[0.1950, 0.2360]], dtype=torch.float64)
    """
    counts = keep.sum(1)
    long = keep & (counts > MOST_SURVIVORS)[:, None]
    costs = torch.where(long, weights.square() / inverse_diagonals(gram, long), 0.0)
    few = ((counts > 0) & (counts <= MOST_SURVIVORS)).nonzero()[:, 0]
    for start in range(0, len(few), ROWS):
        rows = few[start : start + ROWS]
        # Each row's survivors first, in their order; what fills up to the longest row is not alive.
        order = keep[rows].long().argsort(dim=1, descending=True, stable=True)
        order = order[:, : int(counts[rows].max())]
        alive = keep[rows].gather(1, order)
        found = _taken_apart(gram, weights[rows].gather(1, order), order, alive)
        costs[rows] = costs[rows].scatter(1, order, found)
    return costs


def _taken_apart(gram: Tensor, weights: Tensor, order: Tensor, alive: Tensor) -> Tensor:
    """Return the costs (R, k) of rows whose entries are the columns ``order`` of H."""
    inner = alive[:, :, None] & alive[:, None, :]
    blocks = gram[order[:, :, None], order[:, None, :]].masked_fill(~inner, 0.0)
    blocks = blocks + torch.diag_embed((~alive).to(blocks))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))
    weights, costs = weights * alive, torch.zeros_like(weights)
    highest = torch.zeros_like(weights[:, 0])
    row = torch.arange(len(weights), device=weights.device)
    for _ in range(weights.shape[1]):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        step = torch.where(alive, weights.square() / diagonal, torch.inf)
        cost, index = step.min(1)
        going = alive.any(1)
        highest = torch.where(going, torch.maximum(highest, cost), highest)
        costs[row[going], index[going]] = highest[going]
        column = inverse[row, :, index]
        share = column / inverse[row, index, index][:, None]
        weights = weights - share * weights[row, index][:, None]
        inverse = inverse - share[:, :, None] * column[:, None, :]
        alive = alive.scatter(1, index[:, None], False)
        # What has left would be divided by an inverse of 0.
        inverse = torch.where(torch.diag_embed(~alive), 1.0, inverse)
    return costs
