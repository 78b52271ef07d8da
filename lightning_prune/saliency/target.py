"""Logits -> the rows to backpropagate.

Enters: the model's output for one batch, and labels where the target asks for them. Leaves:
:class:`Rows`, vectors v in the space of the outputs such that

    score = sum over rows of (v . dz/dw)^2

is the wanted score. For the categorical likelihood with p = softmax(z) every target is made of one
term a class, ``weight_y (e_y - p)``, with

    probability          all classes, weight p_y         sum_y (dP_y/dw)^2
    label_probability    the label,   weight p_y         (dP_label/dw)^2
    fisher               all classes, weight sqrt(p_y)   sum_y P_y (d log P_y/dw)^2
    empirical_fisher     the label,   weight 1           (d log P_label/dw)^2

Probabilities are computed in float64 up to :data:`DOUBLE_CLASSES` classes, in float32 beyond.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_prune._types import Likelihood
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.passes.outputs import IGNORED_LABEL, check_classes, ignored_positions
from lightning_prune.passes.precision import precise, precise_device
from lightning_prune.saliency.rows import Rows, independent_rows, rotated_rows, term_rows
from lightning_prune.saliency.softmax import Softmax

Target: TypeAlias = Literal["probability", "label_probability", "fisher", "empirical_fisher"]

DOUBLE_CLASSES = 512
"""Up to so many classes float64 costs nothing to speak of."""


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
        likelihood: ``"categorical"`` (softmax over axis 1), ``"bernoulli"`` (one logit an output;
            its two classes give 2 (dP/dw)^2), ``"gaussian"`` (the output is the prediction, unit
            variance).
        tolerance: Share of the rows' energy that may be left out, in [0, 1).
        labels: (N, ...) class indices, or the logits' shape for the other likelihoods. Of several
            positions a sample those labelled -100 are left out, whatever the target.
        rotate: Rotate the terms of a prediction into eigenvectors, which makes fewer rows carry the
            energy.

    Raises:
        ValueError: If the logits' shape fits no prediction of this likelihood, or labels are
            missing or misshaped.
        NonFiniteScoresError: If the logits are not finite; the message names the first such sample.
    """
    check_target(target, likelihood)
    check_finite(logits)
    check_labels(logits, labels, target, likelihood)
    z = logits.detach().to(precise_device(logits.device))
    if likelihood != "categorical":
        return independent_rows(output_weights(z.double(), target, likelihood, labels), tolerance)
    z = _flat(z)
    softmax = Softmax.of(
        z.double()
        if z.shape[1] <= DOUBLE_CLASSES
        else z.to(torch.promote_types(z.dtype, torch.float32))
    )
    if target not in ("probability", "fisher"):
        classes, weight = _label_terms(softmax.p, target, labels)
        return term_rows(softmax, classes, weight, tolerance, logits.shape)
    weight = _class_weights(softmax.p, target, logits, labels)
    if rotate:
        return rotated_rows(softmax, weight, tolerance, logits.shape)
    classes = torch.arange(weight.shape[1], device=weight.device).expand(weight.shape)
    return term_rows(softmax, classes, weight, tolerance, logits.shape)


def _flat(z: Tensor) -> Tensor:
    """Return logits (N, C, ...) as (N * positions, C)."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def class_rows(logits: Tensor, target: Target) -> Tensor:
    """Return all rows of one prediction a sample, (C, N, C) in the logits' dtype.

    These are the class terms themselves. The short way to what ``output_rows(..., rotate=False)``
    describes, for the targets that sum over classes.
    """
    check_finite(logits)
    check_labels(logits, None, target, "categorical")
    softmax = Softmax.of(precise(logits.detach()))
    p = softmax.p
    weight = p if target == "probability" else p.sqrt()
    terms = weight.t()[:, :, None] * -p
    terms.diagonal(dim1=0, dim2=2).copy_(weight * (1 - p).scatter(1, softmax.top, softmax.rest))
    return terms.to(logits)


def check_finite(logits: Tensor) -> None:
    """Raise NonFiniteScoresError naming the first sample whose logits are NaN or infinite."""
    # A sum is finite only if all its terms are; the reverse may fail, so look again before raising.
    if math.isfinite(float(logits.detach().sum())) or bool(torch.isfinite(logits).all()):
        return
    finite = torch.isfinite(logits).reshape(logits.shape[0], -1).all(1)
    first = int((~finite).nonzero()[0])
    raise NonFiniteScoresError(
        f"Expected finite logits, but sample {first} of the batch has "
        f"{logits[first].flatten()[:4].tolist()}"
        f" ({int((~finite).sum())} of {len(finite)} samples are affected)."
    )


def check_target(target: str, likelihood: str) -> None:
    """Raise ValueError if there is no such target or likelihood, or if they do not go together."""
    if target not in get_args(Target):
        raise ValueError(
            f"Expected argument `target` to be one of {get_args(Target)} but got {target!r}."
        )
    if likelihood not in get_args(Likelihood):
        raise ValueError(
            f"Expected argument `likelihood` to be one of {get_args(Likelihood)} "
            f"but got {likelihood!r}."
        )
    if target == "label_probability" and likelihood == "gaussian":
        raise ValueError(
            "Expected target='label_probability' with a likelihood over classes, but got "
            "'gaussian', whose labels have a density and no probability. "
            "Use target='empirical_fisher' or 'probability'."
        )


def check_labels(
    logits: Tensor, labels: Tensor | None, target: Target, likelihood: Likelihood
) -> None:
    """Raise ValueError if logits or labels do not fit target and likelihood."""
    shape = tuple(logits.shape)
    if likelihood == "categorical":
        check_classes(logits)
    if not logits.is_floating_point() or logits.ndim < 1:
        raise ValueError(
            f"Expected floating point logits with a sample axis, but got {logits.dtype} "
            f"of shape {shape}."
        )
    if target not in ("label_probability", "empirical_fisher"):
        return
    wanted = shape if likelihood != "categorical" else (shape[0], *shape[2:])
    if labels is None:
        raise ValueError(
            f"Expected labels of shape {wanted} for target={target!r}, but the batch has none. "
            "Yield (x, y) from the loader, or use target='probability' or 'fisher', which need no "
            "label."
        )
    if tuple(labels.shape) != wanted:
        raise ValueError(
            f"Expected labels of shape {wanted} for target={target!r}, "
            f"but got {tuple(labels.shape)}."
        )
    if likelihood == "categorical":
        valid = ((labels >= 0) & (labels < shape[1])) | (labels == IGNORED_LABEL)
        if labels.is_floating_point() or not bool(valid.all()):
            raise ValueError(
                f"Expected integer labels in [0, {shape[1]}) for target={target!r}, but got "
                f"{labels.dtype} with the range [{labels.min().item()}, {labels.max().item()}]. "
                f"What no prediction is made of (padding) is labelled {IGNORED_LABEL}."
            )


def output_weights(
    z: Tensor, target: Target, likelihood: Likelihood, labels: Tensor | None
) -> Tensor:
    """Return what multiplies each output's gradient, shaped like the outputs ``z`` (float64).

    For the categorical likelihood: the weights of the class terms, zero for the classes that make
    none.
    """
    if likelihood == "categorical":
        p = _flat(z).softmax(-1)
        if target in ("probability", "fisher"):
            weights = _class_weights(p, target, z, labels)
        else:
            weights = torch.zeros_like(p).scatter_(1, *_label_terms(p, target, labels))
        return weights.reshape(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)
    p, q = z.sigmoid(), (-z).sigmoid()
    if target == "empirical_fisher":  # the others may come along with labels of any shape
        y = torch.zeros_like(z) if labels is None else labels.to(z)
        bit = torch.where(y == 1, q, torch.where(y == 0, -p, y - p))
        return y - z if likelihood == "gaussian" else bit
    if likelihood == "gaussian":
        return torch.ones_like(z)
    # (dP/dw)^2 = (p q)^2 (dz/dw)^2 for either class, hence the factor 2 where both are summed.
    return {
        "probability": 2**0.5 * p * q,
        "label_probability": p * q,
        "fisher": (p * q).sqrt(),
    }[target]


def _class_weights(p: Tensor, target: Target, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the weights (M, C) of the terms of a target that sums over classes."""
    weight = p if target == "probability" else p.sqrt()
    ignored = ignored_positions(logits, labels)
    if ignored is None:
        return weight
    return weight.masked_fill(ignored.reshape(-1, 1).to(weight.device), 0.0)


def _label_terms(p: Tensor, target: Target, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the one class of each prediction that makes a term, and the term's weight.

    Both are (M, 1); the class is long.
    """
    if labels is None:
        raise ValueError(f"Expected labels for target={target!r} but got None.")
    labels = labels.reshape(-1).to(p.device)
    ignored = labels == IGNORED_LABEL
    classes = labels.long().masked_fill(ignored, 0)[:, None]
    weight = p.gather(1, classes) if target == "label_probability" else torch.ones_like(p[:, :1])
    return classes, weight.masked_fill(ignored[:, None], 0.0)
