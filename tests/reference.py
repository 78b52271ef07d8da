"""Slow twins: the definitions, written out one sample at a time with plain autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.passes.batches import default_forward, read_labels, take_samples


def squared_gradients(
    model: nn.Module,
    batch: Any,
    *,
    target: str = "probability",
    likelihood: str = "categorical",
    forward: Callable[[nn.Module, Any], Tensor] = default_forward,
) -> dict[str, Tensor]:
    """Return the sum over samples, positions and classes of the squared gradient.

    Each takes a backward pass of its own.
    """
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    size = len(forward(model, batch))
    labels = read_labels(batch)
    for n in range(size):
        logits = forward(model, take_samples(batch, torch.tensor([n])))
        label = None if labels is None else labels[n : n + 1]
        for value, weight in terms(logits, label, target, likelihood):
            gradients = torch.autograd.grad(
                value, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight * gradient.to_dense().square()
    return total


def terms(
    logits: Tensor, label: Tensor | None, target: str, likelihood: str
) -> list[tuple[Tensor, Tensor]]:
    """Return scalars and weights of one sample.

    The score is the sum of weight * (d scalar / dw)^2.
    """
    one = torch.ones((), dtype=logits.dtype)
    if likelihood == "categorical":
        z = logits.movedim(1, -1).reshape(-1, logits.shape[1])
        p, log_p = z.softmax(-1), z.log_softmax(-1)
        y = [None] * len(z) if label is None else label.flatten().tolist()
    elif likelihood == "bernoulli":
        z = logits.reshape(-1, 1)
        z = torch.cat([torch.zeros_like(z), z], 1)
        p, log_p = z.softmax(-1), z.log_softmax(-1)
        y = [None] * len(z) if label is None else label.flatten().long().tolist()
    else:
        out = logits.flatten()
        if target == "empirical_fisher":
            return [(-0.5 * (label.flatten()[o] - out[o]).square(), one) for o in range(len(out))]
        return [(out[o], one) for o in range(len(out))]
    found = []
    for t in range(len(p)):
        if len(p) > 1 and y[t] == -100:
            continue
        if target == "probability":
            found += [(p[t, c], one) for c in range(p.shape[1])]
        elif target == "fisher":
            found += [(log_p[t, c], p[t, c].detach()) for c in range(p.shape[1])]
        elif y[t] != -100:  # also the only one of a sample
            found.append((p[t, y[t]] if target == "label_probability" else log_p[t, y[t]], one))
    return found


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error relative to each parameter's largest score, over all parameters.

    A parameter whose true score is 0 (a bias before a layer norm over its positions, say) has only
    round-off, which is held against the largest score of all.
    """
    assert found.keys() == expected.keys()
    floor = 1e-12 * max(float(score.abs().max()) for score in expected.values()) + 1e-300
    return max(
        float((found[name] - score).abs().max() / score.abs().max().clamp_min(floor))
        for name, score in expected.items()
    )
