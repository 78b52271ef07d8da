"""A truncated solution of a linear system that is known by its products only.

Enters: a symmetric positive definite operator and a right-hand side. Leaves: an approximate
solution, the better the more products are spent on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ENOUGH = 1e-10
"""Share of the residual's first norm, squared, at which to stop."""
REMEMBERED_BYTES = 2**28
"""What the directions that residuals are kept orthogonal to may take."""


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], right: Tensor, products: int
) -> tuple[Tensor, float]:
    """Minimise ``q(x) = x^T A x / 2 - b^T x`` over a Krylov space of ``products`` dimensions.

    Started from zero, so that q(x) < 0 whenever b is not zero, and lower after each product. Each
    residual is made orthogonal again to those before it: else round-off grows with each product,
    and after twenty of them another order of the same sums (threads, memory format) gives a
    solution that differs in its fifth digit. Of large vectors only the first residuals are
    remembered, as many as :data:`REMEMBERED_BYTES` hold.

    Args:
        product: x -> A x, with A symmetric and positive definite.
        right: b, a vector.
        products: How many products may be taken.

    Returns:
        x and q(x). Stops early where the residual vanishes, or where round-off has made A
        indefinite or not finite; x is then that of the product before.

    Source: Hestenes & Stiefel 1952, "Methods of conjugate gradients for solving linear systems";
    the orthogonalisation: Lanczos 1952, "Solution of systems of linear equations by minimized
    iterations".

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> x, _ = conjugate_gradient(lambda v: a @ v, torch.tensor([3.0, 4.0]), 2)
        >>> bool(torch.allclose(x, torch.ones(2)))
        True
    """
    x, residual = torch.zeros_like(right), right
    direction, norm = residual, residual @ residual
    first = float(norm)
    remembered: list[Tensor] = []
    at_most = REMEMBERED_BYTES // (right.element_size() * max(1, len(right)))
    for _ in range(products):
        if not float(norm) > ENOUGH * first:
            break
        if len(remembered) < at_most:
            remembered.append(residual / norm.sqrt())
        image = product(direction)
        bend = float(direction @ image)
        if not 0 < bend < float("inf"):
            break
        step = norm / bend
        x = x + step * direction
        residual = residual - step * image
        for one in remembered:
            residual = residual - (one @ residual) * one
        norm, previous = residual @ residual, norm
        direction = residual + norm / previous * direction
    # b = A x + residual, hence q = x^T (b - residual) / 2 - b^T x.
    return x, float(-0.5 * (x @ (right + residual)))
