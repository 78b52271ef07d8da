"""The rows of one batch in a compact form, and the art of needing few of them.

A categorical target is a sum of terms ``weight_y (e_y - p)`` over classes y. An orthogonal change
of basis among the terms of one prediction leaves their sum of squares unchanged, and the
eigenvectors of the terms' Gram matrix pack nearly all of it into the first few rows. What may be
left out is spent first on whole terms, which empties sure samples and unlikely classes, then on
directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.passes.precision import running_sum
from lightning_prune.saliency.softmax import Softmax

ROTATED_CLASSES = 12
"""How many of a prediction's strongest terms are rotated into eigenvectors; the others stay."""

PRESELECTED_CLASSES = 64
"""With more classes than this, the likeliest are looked for first and the others only counted."""


@dataclass(frozen=True)
class Rows:
    """Vectors in output space: S rows over M predictions.

    Row s belongs to prediction ``prediction[s]`` (sample-major, ``sample * positions + position``)
    and is ``sum_j coefficient[s, j] (e_classes[s, j] - p)``.

    Attributes:
        prediction: (S,) long.
        classes: (S, m) long, the classes a row is made of.
        coefficient: (S, m).
        softmax: The M predictions, or None where a row is just its coefficient (bernoulli,
            gaussian).
        energy: (S,) the squared norm of each row.
        total: The squared norm of all rows there would be at tolerance 0.
        dropped: The part of ``total`` that was left out.
        shape: The logits' shape.
    """

    prediction: Tensor
    classes: Tensor
    coefficient: Tensor
    softmax: Softmax | None
    energy: Tensor
    total: float
    dropped: float
    shape: torch.Size

    @property
    def positions(self) -> int:
        """Predictions a sample."""
        count = self.shape[1:].numel()
        return count if self.softmax is None else count // self.shape[1]

    @property
    def sample(self) -> Tensor:
        """(S,) the sample of each row."""
        return self.prediction // self.positions

    def vectors(self, rows: Tensor) -> Tensor:
        """Write out rows as gradients of the output.

        Args:
            rows: (R,) indices of rows.

        Returns:
            (R, *logits.shape[1:]), zero outside of each row's own position.
        """
        prediction, coefficient = self.prediction[rows], self.coefficient[rows]
        values = (
            coefficient
            if self.softmax is None
            else self.softmax.take(prediction).combine(self.classes[rows], coefficient)
        )
        if self.positions > 1:
            full = values.new_zeros(len(rows), self.positions, values.shape[1])
            full[torch.arange(len(rows), device=full.device), prediction % self.positions] = values
            values = full if self.softmax is None else full.transpose(1, 2)
        return values.reshape(len(rows), *self.shape[1:])


def independent_rows(weight: Tensor, tolerance: float) -> Rows:
    """Return one row an output with its weight, the weakest left out; weight (N, ...)."""
    flat = weight.reshape(-1, 1)
    energy = flat.square().squeeze(1)
    total = float(energy.sum())
    keep, dropped = largest(energy, tolerance * total)
    return Rows(
        keep,
        torch.zeros_like(keep)[:, None],
        flat[keep],
        None,
        energy[keep],
        total,
        dropped,
        weight.shape,
    )


def term_rows(
    softmax: Softmax, classes: Tensor, weight: Tensor, tolerance: float, shape: torch.Size
) -> Rows:
    """Return the given terms as rows, weak ones left out; classes and weight (M, m).

    Terms below an equal share of the allowance are left out, which takes no sorting.
    """
    energy = weight.square() * softmax.squared_norms().gather(1, classes)
    total = float(energy.sum())
    prediction, column = (energy > tolerance * total / energy.numel()).nonzero(as_tuple=True)
    kept = energy[prediction, column]
    dropped = max(0.0, total - float(kept.sum())) if tolerance else 0.0
    terms = (classes[prediction, column][:, None], weight[prediction, column][:, None])
    return Rows(prediction, *terms, softmax, kept, total, dropped, shape)


def rotated_rows(softmax: Softmax, weight: Tensor, tolerance: float, shape: torch.Size) -> Rows:
    """Return the terms of all classes, rotated; weight (M, C).

    No more than ``tolerance`` of the energy is left out.
    """
    energy = weight.square().mul_(softmax.squared_norms())
    total = float(energy.sum(dtype=torch.float64))
    allowance = tolerance * total
    classes, dropped = _likely_classes(energy, total, allowance / 8)
    energy, weight = energy.gather(1, classes).double(), weight.gather(1, classes).double()
    keep, more = largest(energy.flatten(), allowance / 8)
    dropped += more
    prediction, classes, coefficient, strength = _rotate(softmax, classes, weight, energy, keep)
    keep, more = largest(strength, allowance - dropped)
    chosen = (prediction[keep], classes[keep], coefficient[keep].to(softmax.p.dtype))
    return Rows(*chosen, softmax, strength[keep], total, dropped + more, shape)


def _likely_classes(energy: Tensor, total: float, allowance: float) -> tuple[Tensor, float]:
    """Return (M, m) classes outside of which there is at most ``allowance``, and what there is."""
    count = PRESELECTED_CLASSES
    while 2 * count <= energy.shape[1] and allowance > 0:
        strongest, classes = energy.topk(count, dim=1, sorted=False)
        outside = max(0.0, total - float(strongest.sum(dtype=torch.float64)))
        if outside <= allowance:
            return classes, outside
        count *= 4
    return torch.arange(energy.shape[1], device=energy.device).expand(energy.shape), 0.0


def _rotate(
    softmax: Softmax, classes: Tensor, weight: Tensor, energy: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the strongest kept terms of each prediction into eigenvectors of their Gram matrix.

    Returns prediction (S,), classes (S, m), coefficient (S, m) and energy (S,), with
    m = min(ROTATED_CLASSES, terms).
    """
    kept = torch.zeros_like(energy).flatten().index_fill_(0, keep, 1.0).reshape(energy.shape)
    alive = kept.any(1).nonzero().squeeze(1)
    kept = kept[alive]
    m = min(ROTATED_CLASSES, classes.shape[1])
    strength, columns = (energy[alive] * kept).topk(m, dim=1)
    block = classes[alive].gather(1, columns)
    block_weight = weight[alive].gather(1, columns) * (strength > 0)
    gram = (
        softmax.take(alive).inner_products(block)
        * block_weight[:, :, None]
        * block_weight[:, None, :]
    )
    values, vectors = torch.linalg.eigh(gram)
    coefficient = (vectors * block_weight[:, :, None]).transpose(1, 2)
    # The other terms stay as they are: one coefficient a row.
    row, column = kept.scatter_(1, columns, 0.0).nonzero(as_tuple=True)
    rest = alive[row]
    rest_coefficient = weight.new_zeros(len(rest), m)
    rest_coefficient[:, 0] = weight[rest, column]
    return (
        torch.cat([alive.repeat_interleave(m), rest]),
        torch.cat([block.repeat_interleave(m, 0), classes[rest, column][:, None].expand(-1, m)]),
        torch.cat([coefficient.reshape(-1, m), rest_coefficient]),
        torch.cat([values.clamp_min(0.0).flatten(), energy[rest, column]]),
    )


def largest(energy: Tensor, allowance: float) -> tuple[Tensor, float]:
    """Return the indices that have to be kept, and the sum of what is left out.

    That sum is at most ``allowance``.
    """
    if allowance <= 0:
        return (energy > 0).nonzero().squeeze(1), 0.0
    ordered, order = energy.sort()
    running = running_sum(ordered)
    count = int((running <= allowance).sum())
    return order[count:].sort().values, float(running[count - 1]) if count else 0.0
