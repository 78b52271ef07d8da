"""The proof: two models give the same outputs, or there is no smaller model.

Enters: outputs of the masked model and of the smaller one. Leaves: nothing, or an error that says
where and by how much they differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EXACT = 1e-9
"""Largest difference in float64, relative to the largest output: sums in another order differ by
about 1e-16 times the number of layers, a wrong cut by much more."""

COARSE = 1000
"""The same in units of round-off, for a model that can't be run in float64."""


class RemovalError(RuntimeError):
    """A smaller model could not be made, or does not compute what the masked one does."""


def disagreement(expected: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, str]:
    """Return the largest difference relative to the outputs' scale, and what differs.

    Every output has its own scale, its largest absolute value. NaN and infinity have to be in the
    same places. Integer outputs have to be equal.

    Example:
        >>> disagreement([torch.tensor([2.0, 4.0])], [torch.tensor([2.0, 3.0])])
        (0.25, 'output 0')
    """
    if len(expected) != len(got):
        return float("inf"), f"the number of outputs: {len(expected)} and {len(got)}"
    worst, where = 0.0, ""
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.shape != b.shape:
            return float("inf"), f"the shape of output {i}: {tuple(a.shape)} and {tuple(b.shape)}"
        difference = _difference(a.detach(), b.detach())
        if difference > worst:
            worst, where = difference, f"output {i}"
    return worst, where


def _difference(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not bool(b[finite].isfinite().all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    a, b = a[finite], b[finite]
    largest = float((a - b).abs().max())
    return largest / max(float(a.abs().max()), 1e-30) if largest else 0.0


def check_rounding(
    exact: Sequence[Tensor], masked: Sequence[Tensor], small: Sequence[Tensor], units: int = 32
) -> None:
    """Check the smaller model in its own dtype.

    Both models round. The smaller one adds fewer numbers, in another order, so it may be off the
    float64 result by about as much as the masked one is: ten times the largest such error and
    ``units`` units of round-off of the outputs' scale are let through (in float64 :data:`EXACT`).

    Args:
        exact: Outputs of the masked model in float64 (or, without that, in its own dtype), for
            several inputs one after another.
        masked: Those of the masked model in its own dtype.
        small: Those of the smaller model in its own dtype.
        units: See above.

    Raises:
        RemovalError: It is off by more.
    """
    pairs = list(zip(exact, masked, strict=True))
    errors = [_difference(a, b.to(a.dtype)) for a, b in pairs if b.is_floating_point()]
    largest = max((each for each in errors if each < float("inf")), default=0.0)
    for (a, _), c in zip(pairs, small, strict=True):
        if not c.is_floating_point():
            continue  # compared in float64, where a tie does not fall the other way
        allowed = max(10 * largest + units * torch.finfo(c.dtype).eps, EXACT)
        off = _difference(a, c.to(a.dtype))
        if not off <= allowed:
            raise RemovalError(
                f"Expected the smaller model's outputs in {c.dtype} to be within round-off "
                f"({allowed:.1e} of their scale) of the masked model's, but one is off by "
                f"{off:.1e}; no model is returned. Its numbers may be out of this dtype's range: "
                "try shrinking the model in float32."
            )
