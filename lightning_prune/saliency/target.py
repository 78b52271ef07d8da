"""Logits -> the rows to backpropagate.

Enters: the model's output for one batch, and labels where the target asks for them. Leaves: :class:`Rows`, vectors v in
the space of the outputs such that

    score = sum over rows of (v . dz/dw)^2

is the wanted score. For the categorical likelihood with p = softmax(z) every target is made of one term a class,
``weight_y (e_y - p)``, with

    probability          all classes, weight p_y         sum_y (dP_y/dw)^2
    label_probability    the label,   weight p_y         (dP_label/dw)^2
    fisher               all classes, weight sqrt(p_y)   sum_y P_y (d log P_y/dw)^2
    empirical_fisher     the label,   weight 1           (d log P_label/dw)^2

An orthogonal change of basis among the terms of one prediction leaves their sum of squares unchanged, and the
eigenvectors of the terms' Gram matrix pack nearly all of it into the first few rows: that is what ``tolerance`` spends.
All of it is computed in float64, since 1 - p of a sure prediction has no digits left in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_prune.exceptions import NonFiniteScoresError

Target: TypeAlias = Literal["probability", "label_probability", "fisher", "empirical_fisher"]
Likelihood: TypeAlias = Literal["categorical", "bernoulli", "gaussian"]

ROTATED_CLASSES = 12
"""How many of a prediction's strongest terms are rotated into eigenvectors; the others stay as they are."""

IGNORED_LABEL = -100
"""Positions with this label are no predictions, as in torch's cross entropy."""


@dataclass(frozen=True)
class Rows:
    """Vectors in output space, in a compact form: S rows over M predictions of C classes.

    Row s belongs to prediction ``prediction[s]`` (sample-major, ``sample * positions + position``) and is
    ``sum_j coefficient[s, j] (e_classes[s, j] - p)``.

    Attributes:
        prediction: (S,) long.
        classes: (S, m) long, the classes a row is made of.
        coefficient: (S, m) float64.
        probability: (M, C) float64, or None where a row is just its coefficients (bernoulli, gaussian).
        energy: (S,) float64, the squared norm of each row.
        total: The squared norm of all rows there would be at tolerance 0.
        dropped: The part of ``total`` that was left out.
        shape: The logits' shape.
        class_axis: Whether axis 1 of the logits counts classes.
    """

    prediction: Tensor
    classes: Tensor
    coefficient: Tensor
    probability: Tensor | None
    energy: Tensor
    total: float
    dropped: float
    shape: torch.Size
    class_axis: bool

    @property
    def positions(self) -> int:
        """Predictions a sample."""
        count = self.shape[1:].numel()
        return count // self.shape[1] if self.class_axis else count

    @property
    def sample(self) -> Tensor:
        """(S,) the sample of each row."""
        return self.prediction // self.positions

    def vectors(self, rows: Tensor) -> Tensor:
        """Write out rows as gradients of the output.

        Args:
            rows: (R,) indices of rows.

        Returns:
            (R, *logits.shape[1:]) float64, zero outside of each row's own position.
        """
        prediction, classes, coefficient = self.prediction[rows], self.classes[rows], self.coefficient[rows]
        if self.probability is None:
            values = coefficient.sum(1, keepdim=True)
        else:
            p = self.probability[prediction]
            values = -coefficient.sum(1, keepdim=True) * p
            values.scatter_add_(1, classes, coefficient)
            # At the likeliest class the line above computes c - sum * p with p near 1: write it without the cancellation.
            top = p.argmax(1, keepdim=True)
            at_top = (coefficient * (classes == top)).sum(1, keepdim=True)
            p_top = p.gather(1, top)
            rest = p.scatter(1, top, 0.0).sum(1, keepdim=True)
            others = (coefficient * (classes != top)).sum(1, keepdim=True)
            values.scatter_(1, top, at_top * rest - others * p_top)
        positions = self.positions
        full = values.new_zeros(len(rows), positions, values.shape[1])
        full[torch.arange(len(rows), device=full.device), prediction % positions] = values
        if self.class_axis:
            full = full.transpose(1, 2)
        return full.reshape(len(rows), *self.shape[1:])


def output_rows(
    logits: Tensor,
    *,
    target: Target = "probability",
    likelihood: Likelihood = "categorical",
    tolerance: float = 0.0,
    labels: Tensor | None = None,
    rotate: bool = True,
) -> Rows:
    """Choose the rows to backpropagate for one batch.

    Args:
        logits: (N, C) or (N, C, ...) for the categorical likelihood, (N, ...) for the others.
        target: Which score, see the module's docstring.
        likelihood: ``"categorical"`` (softmax over axis 1), ``"bernoulli"`` (one logit an output; its two classes give
            2 (dP/dw)^2), ``"gaussian"`` (the output is the prediction, unit variance).
        tolerance: Share of the rows' energy that may be left out, in [0, 1).
        labels: (N, ...) class indices, or the logits' shape for the other likelihoods.
        rotate: Rotate the terms of a prediction into eigenvectors, which makes fewer rows carry the energy.

    Raises:
        ValueError: If the logits' shape fits no prediction of this likelihood, or labels are missing or misshaped.
        NonFiniteScoresError: If the logits are not finite; the message names the first such sample.
    """
    check_target(target, likelihood)
    check_finite(logits)
    check_labels(logits, labels, target, likelihood)
    z = logits.detach().double()
    if likelihood != "categorical":
        return _independent_outputs(z, target, likelihood, tolerance, labels)
    z = z.movedim(1, -1).reshape(-1, z.shape[1])
    p = z.softmax(-1)
    classes, weight = _class_terms(p, target, None if labels is None else labels.reshape(-1))
    return _spend(p, classes, weight, tolerance, rotate, logits.shape)


def class_rows(logits: Tensor, target: Target) -> Tensor:
    """Return all rows of one prediction a sample, the class terms themselves: (C, N, C) in the logits' dtype.

    The short way to what ``output_rows(..., rotate=False)`` describes, for the targets that sum over classes.
    """
    check_finite(logits)
    check_labels(logits, None, target, "categorical")
    p = logits.detach().double().softmax(-1)
    top = p.argmax(1, keepdim=True)
    rest = p.scatter(1, top, 0.0).sum(1, keepdim=True)
    weight = p if target == "probability" else p.sqrt()
    terms = weight.t()[:, :, None] * -p
    # 1 - p, which has no digits left at the likeliest class unless it is summed from the others.
    terms.diagonal(dim1=0, dim2=2).copy_(weight * (1 - p).scatter(1, top, rest))
    return terms.to(logits.dtype)


def check_finite(logits: Tensor) -> None:
    """Raise NonFiniteScoresError naming the first sample whose logits are NaN or infinite."""
    if bool(torch.isfinite(logits).all()):
        return
    finite = torch.isfinite(logits).reshape(logits.shape[0], -1).all(1)
    first = int((~finite).nonzero()[0])
    raise NonFiniteScoresError(
        f"Expected finite logits, but sample {first} of the batch has {logits[first].flatten()[:4].tolist()}"
        f" ({int((~finite).sum())} of {len(finite)} samples are affected)."
    )


def check_target(target: str, likelihood: str) -> None:
    """Raise ValueError if there is no such target or likelihood, or if they do not go together."""
    if target not in get_args(Target):
        raise ValueError(f"Expected argument `target` to be one of {get_args(Target)} but got {target!r}.")
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"Expected argument `likelihood` to be one of {get_args(Likelihood)} but got {likelihood!r}.")
    if target == "label_probability" and likelihood == "gaussian":
        raise ValueError(
            "Expected target='label_probability' with a likelihood over classes, but got 'gaussian', whose labels have a "
            "density and no probability. Use target='empirical_fisher' or 'probability'."
        )


def check_labels(logits: Tensor, labels: Tensor | None, target: Target, likelihood: Likelihood) -> None:
    """Raise ValueError if logits or labels do not fit target and likelihood."""
    shape = tuple(logits.shape)
    if likelihood == "categorical" and (logits.ndim < 2 or shape[1] < 2):
        raise ValueError(
            f"Expected logits of shape (N, C) or (N, C, ...) with at least 2 classes for likelihood='categorical', but "
            f"got {shape}. For one logit an output use likelihood='bernoulli', for regression 'gaussian'."
        )
    if not logits.is_floating_point() or logits.ndim < 1:
        raise ValueError(f"Expected floating point logits with a sample axis, but got {logits.dtype} of shape {shape}.")
    if target not in ("label_probability", "empirical_fisher"):
        return
    wanted = shape if likelihood != "categorical" else (shape[0], *shape[2:])
    if labels is None:
        raise ValueError(
            f"Expected labels of shape {wanted} for target={target!r}, but the batch has none. Yield (x, y) from the "
            "loader, or use target='probability' or 'fisher', which need no label."
        )
    if tuple(labels.shape) != wanted:
        raise ValueError(f"Expected labels of shape {wanted} for target={target!r}, but got {tuple(labels.shape)}.")
    if likelihood == "categorical":
        valid = ((labels >= 0) & (labels < shape[1])) | (labels == IGNORED_LABEL)
        if labels.is_floating_point() or not bool(valid.all()):
            raise ValueError(
                f"Expected integer labels in [0, {shape[1]}) for target={target!r}, but got {labels.dtype} with the range "
                f"[{labels.min().item()}, {labels.max().item()}]."
            )


def output_weights(z: Tensor, target: Target, likelihood: Likelihood, labels: Tensor | None) -> Tensor:
    """Return what multiplies each output's gradient, shaped like the outputs ``z`` (float64).

    For the categorical likelihood: the weights of the class terms, zero for the classes that make none.
    """
    if likelihood == "categorical":
        flat = z.movedim(1, -1).reshape(-1, z.shape[1])
        classes, weight = _class_terms(flat.softmax(-1), target, None if labels is None else labels.reshape(-1))
        weights = torch.zeros_like(flat).scatter_(1, classes, weight)
        return weights.reshape(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)
    y = torch.zeros_like(z) if labels is None else labels.to(z)
    if likelihood == "gaussian":
        return y - z if target == "empirical_fisher" else torch.ones_like(z)
    p, q = z.sigmoid(), (-z).sigmoid()
    # (dP/dw)^2 = (p q)^2 (dz/dw)^2 for either class, hence the factor 2 where both are summed.
    return {
        "probability": 2**0.5 * p * q,
        "label_probability": p * q,
        "fisher": (p * q).sqrt(),
        "empirical_fisher": torch.where(y == 1, q, torch.where(y == 0, -p, y - p)),
    }[target]


def _independent_outputs(
    z: Tensor, target: Target, likelihood: Likelihood, tolerance: float, labels: Tensor | None
) -> Rows:
    weight = output_weights(z, target, likelihood, labels).reshape(-1, 1)
    energy = weight.square().squeeze(1)
    keep, dropped = _largest(energy, tolerance * float(energy.sum()))
    rows = (keep, torch.zeros_like(keep)[:, None], weight[keep], None, energy[keep])
    return Rows(*rows, float(energy.sum()), dropped, z.shape, False)


def _class_terms(p: Tensor, target: Target, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which classes make a term, (M, m) long, and the terms' weights, (M, m)."""
    if target in ("probability", "fisher"):
        classes = torch.arange(p.shape[1], device=p.device).expand(p.shape)
        return classes, p if target == "probability" else p.sqrt()
    if labels is None:
        raise ValueError(f"Expected labels for target={target!r} but got None.")
    ignored = labels == IGNORED_LABEL
    classes = labels.long().masked_fill(ignored, 0)[:, None]
    weight = p.gather(1, classes) if target == "label_probability" else torch.ones_like(p[:, :1])
    return classes, weight.masked_fill(ignored[:, None], 0.0)


def _spend(p: Tensor, classes: Tensor, weight: Tensor, tolerance: float, rotate: bool, shape: torch.Size) -> Rows:
    """Drop terms, rotate what is left, drop directions; never more than ``tolerance`` of the energy in all."""
    norms = _inner_products(p, classes)
    energy = weight.square() * norms
    total = float(energy.sum())
    allowance = tolerance * total
    # A quarter goes to whole terms: this empties sure samples and keeps the eigenproblems small.
    keep, dropped = _largest(energy.flatten(), allowance / 4)
    if not rotate or classes.shape[1] == 1:
        keep, dropped = _largest(energy.flatten(), allowance)
        prediction, column = keep // energy.shape[1], keep % energy.shape[1]
        term = classes[prediction, column][:, None]
        rows = (prediction, term, weight[prediction, column][:, None], p, energy.flatten()[keep])
        return Rows(*rows, total, dropped, shape, True)
    prediction, term, coefficient, row_energy = _rotated(p, classes, weight, energy, keep)
    keep, more = _largest(row_energy, allowance - dropped)
    rows = (prediction[keep], term[keep], coefficient[keep], p, row_energy[keep])
    return Rows(*rows, total, dropped + more, shape, True)


def _rotated(
    p: Tensor, classes: Tensor, weight: Tensor, energy: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the kept terms of each prediction into eigenvectors of their Gram matrix, the strongest ones only.

    Returns prediction (S,), classes (S, m), coefficient (S, m), energy (S,) with m = min(ROTATED_CLASSES, terms).
    """
    kept = torch.zeros_like(energy).flatten().index_fill(0, keep, 1.0).reshape(energy.shape)
    alive = kept.any(1).nonzero().squeeze(1)
    m = min(ROTATED_CLASSES, classes.shape[1])
    strength, columns = (energy * kept)[alive].topk(m, dim=1)
    block = classes[alive].gather(1, columns)
    block_weight = weight[alive].gather(1, columns) * (strength > 0)
    gram = _inner_products(p[alive], block, pairs=True) * block_weight[:, :, None] * block_weight[:, None, :]
    values, vectors = torch.linalg.eigh(gram)
    coefficient = (vectors * block_weight[:, :, None]).transpose(1, 2)
    # The other terms stay as they are: one unit coefficient a row.
    rest = kept.index_put((alive[:, None], columns), torch.zeros_like(strength)).flatten().nonzero().squeeze(1)
    rest_prediction = rest // energy.shape[1]
    rest_column = rest % energy.shape[1]
    rest_class, rest_coefficient = classes[rest_prediction, rest_column], weight[rest_prediction, rest_column]
    return (
        torch.cat([alive.repeat_interleave(m), rest_prediction]),
        torch.cat([block.repeat_interleave(m, 0), rest_class[:, None].expand(-1, m)]),
        torch.cat([coefficient.reshape(-1, m), _first_column(rest_coefficient, m)]),
        torch.cat([values.clamp_min(0.0).flatten(), energy.flatten()[rest]]),
    )


def _first_column(values: Tensor, width: int) -> Tensor:
    out = values.new_zeros(len(values), width)
    out[:, 0] = values
    return out


def _inner_products(p: Tensor, classes: Tensor, *, pairs: bool = False) -> Tensor:
    """Return (e_i - p) . (e_j - p) for all pairs of classes (M, m, m), or for i = j only (M, m).

    Near p_top = 1 the plain formula delta_ij - p_i - p_j + sum p^2 cancels; the terms of the likeliest class are written
    with rest = 1 - p_top, which is summed from the small probabilities instead.
    """
    top = p.argmax(1, keepdim=True)
    p_top = p.gather(1, top)
    small = p.scatter(1, top, 0.0)
    rest = small.sum(1, keepdim=True)
    rest_squares = small.square().sum(1, keepdim=True)
    q = p.gather(1, classes)
    is_top = classes == top
    diagonal = torch.where(is_top, rest.square() + rest_squares, (1 - q).square() + p_top.square() + rest_squares - q.square())
    if not pairs:
        return diagonal
    with_top = rest_squares - rest * p_top - q
    both = (p_top.square() + rest_squares)[:, :, None] - q[:, :, None] - q[:, None, :]
    both = torch.where(is_top[:, :, None], with_top[:, None, :], both)
    both = torch.where(is_top[:, None, :], with_top[:, :, None], both)
    return both.diagonal_scatter(diagonal, dim1=1, dim2=2)


def _largest(energy: Tensor, allowance: float) -> tuple[Tensor, float]:
    """Return the indices that have to be kept so that what is left out sums to at most ``allowance``, and that sum."""
    if allowance <= 0:
        return (energy > 0).nonzero().squeeze(1), 0.0
    ordered, order = energy.sort()
    running = ordered.cumsum(0)
    count = int((running <= allowance).sum())
    return order[count:].sort().values, float(running[count - 1]) if count else 0.0
