"""What a model's output has to look like to be read as it is said to be."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_prune._types import Forward, Likelihood
from lightning_prune.passes.batches import read_labels

IGNORED_LABEL = -100
"""Positions with this label are no predictions, as in torch's cross entropy."""

SURE = 60.0
"""A logit beside zeros that leaves nothing in doubt, in any precision."""


def check_classes(logits: Tensor) -> None:
    """Raise ValueError if logits (N, C) or (N, C, ...) are no distribution over several classes.

    A softmax over one class is 1 whatever the input, its argmax 0: everything would be known and
    nothing could be learnt, without a word.
    """
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            "Expected logits of shape (N, C) or (N, C, ...) with at least 2 classes for "
            f"likelihood='categorical', but got {tuple(logits.shape)}. For one logit an output use "
            "likelihood='bernoulli', for regression 'gaussian'."
        )


def ignored_positions(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Return which positions their labels leave out, (N, ...) bool; ``None`` if none can be.

    A sample's only prediction is never left out: without a label it predicts all the same.

    Args:
        logits: (N, C, ...).
        labels: (N, ...) class indices, or anything else.
    """
    if labels is None or logits.ndim < 3 or labels.is_floating_point():
        return None
    if labels.shape != (logits.shape[0], *logits.shape[2:]):
        return None
    ignored = (labels == IGNORED_LABEL).to(logits.device)
    return ignored if bool(ignored.any()) else None


def without_ignored(forward: Forward, likelihood: Likelihood) -> Forward:
    """Return a forward pass whose logits are constants at the positions that labels leave out.

    There the network can be neither far from another one nor uncertain.
    """
    if likelihood != "categorical":
        return forward

    def run(model: nn.Module, batch: Any) -> Tensor:
        logits = forward(model, batch)
        ignored = ignored_positions(logits, read_labels(batch))
        if ignored is None:
            return logits
        logits = logits.masked_fill(ignored[:, None], 0.0)
        logits[:, 0] = logits[:, 0].masked_fill(ignored, SURE)
        return logits

    return run


def doubt_of_classes(logits: Tensor, labels: Tensor | None) -> str | None:
    """Return what labels say against reading axis 1 of the logits as classes, if they do.

    Args:
        logits: (N, C) or (N, C, ...), of a few samples.
        labels: Theirs, if there are any.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3)
        >>> doubt_of_classes(logits, torch.tensor([0, 2]))
        >>> doubt_of_classes(logits, torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]))
        >>> "likelihood='bernoulli'" in doubt_of_classes(logits, torch.ones(2, 3))
        True
    """
    if labels is None or logits.ndim < 2:
        return None
    if labels.shape == logits.shape:
        return _doubt_of_one_class(labels)
    if logits.ndim < 3 or labels.is_floating_point():
        return None
    read = (logits.shape[0], *logits.shape[2:])
    if labels.shape != logits.shape[:-1] or labels.shape == read:
        return None
    rest = ", ".join(map(str, logits.shape[1:]))
    return (
        f"The logits of a batch of N are (N, {rest}), and its labels "
        f"(N, {', '.join(map(str, labels.shape[1:]))}): the classes seem to be the last axis, but "
        f"likelihood='categorical' reads them off axis 1, {logits.shape[1]} of them, as torch's "
        "cross entropy does. Scores would be those of other probabilities: turn the logits, "
        "forward=lambda module, batch: module(batch[0]).movedim(-1, 1)."
    )


def _doubt_of_one_class(labels: Tensor) -> str | None:
    """Return what to say of labels (N, C, ...) that are no distributions over C classes."""
    y = labels.double()
    bits = bool(((y >= 0) & (y <= 1)).all())
    if bits and bool(((y.sum(1) - 1).abs() < 1e-2).all()):  # also one that was smoothed and rounded
        return None
    better = "'bernoulli', one logit an output" if bits else "'gaussian', for regression"
    return (
        f"The labels have the logits' shape, (N, {', '.join(map(str, labels.shape[1:]))}), and do "
        "not add up to 1 over axis 1: they are no probabilities of classes that exclude each "
        "other, but likelihood='categorical' reads the logits as such, by a softmax. If the loss "
        f"has none, give likelihood={better}."
    )
