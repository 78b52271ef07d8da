"""Softmax probabilities with the digits that 1 - p loses.

With p near 1 at the likeliest class, 1 - p has no digits left; summed from the other, small
probabilities it has all of them. Everything here is written with that sum, ``rest``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Probabilities of M predictions over C classes.

    Attributes:
        p: (M, C) probabilities.
        top: (M, 1) the likeliest class.
        p_top: (M, 1) its probability.
        rest: (M, 1) the sum of the others, 1 - p_top.
        rest_squares: (M, 1) the sum of the others' squares.
    """

    p: Tensor
    top: Tensor
    p_top: Tensor
    rest: Tensor
    rest_squares: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Softmax:
        """Compute the probabilities of logits (M, C)."""
        p = logits.softmax(-1)
        p_top, top = p.max(1, keepdim=True)
        small = p.scatter(1, top, 0.0)
        rest = small.sum(1, keepdim=True)
        return cls(
            p, top, p_top, rest, torch.linalg.vector_norm(small, dim=1, keepdim=True).square()
        )

    def take(self, index: Tensor) -> Softmax:
        """Return the predictions in ``index``."""
        return Softmax(
            self.p[index],
            self.top[index],
            self.p_top[index],
            self.rest[index],
            self.rest_squares[index],
        )

    def squared_norms(self) -> Tensor:
        """Return |e_c - p|^2 for all classes c, (M, C)."""
        norms = self.p.mul(-2.0).add_(1.0 + self.p_top.square() + self.rest_squares)
        return norms.scatter_(1, self.top, self.rest.square() + self.rest_squares)

    def inner_products(self, classes: Tensor) -> Tensor:
        """Return (e_i - p) . (e_j - p) for all pairs of some classes, (M, m) to (M, m, m).

        The result is in float64.
        """
        q = self.p.gather(1, classes).double()
        p_top, rest, rest_squares = (
            self.p_top.double(),
            self.rest.double(),
            self.rest_squares.double(),
        )
        is_top = classes == self.top
        base = p_top.square() + rest_squares
        products = base[:, :, None] - q[:, :, None] - q[:, None, :]
        with_top = rest_squares - rest * p_top - q
        products = torch.where(is_top[:, :, None], with_top[:, None, :], products)
        products = torch.where(is_top[:, None, :], with_top[:, :, None], products)
        diagonal = torch.where(is_top, rest.square() + rest_squares, 1 - 2 * q + base)
        return products.diagonal_scatter(diagonal, dim1=1, dim2=2)

    def combine(self, classes: Tensor, coefficient: Tensor) -> Tensor:
        """Return sum_j coefficient_j (e_classes_j - p), (M, m) and (M, m) to (M, C)."""
        values = self.p * -coefficient.sum(1, keepdim=True)
        values.scatter_add_(1, classes, coefficient)
        at_top = coefficient * (classes == self.top)
        others = (coefficient - at_top).sum(1, keepdim=True)
        return values.scatter_(
            1, self.top, at_top.sum(1, keepdim=True) * self.rest - others * self.p_top
        )
