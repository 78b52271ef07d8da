"""Class labels -> the condition that a conditional VAE's encoder and decoder get.

Sohn et al. 2015, "Learning structured output representation using deep conditional generative
models": p(x|z, y) and q(z|x, y), with y as a one-hot vector beside their other inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def condition_of(labels: Tensor | None, classes: int | None, n: int, like: Tensor) -> Tensor | None:
    """Return labels as the rows of a one-hot matrix (N, K); None for an unconditional VAE.

    Args:
        labels: Class indices (N,) of an integer dtype; one index () stands for all.
        classes: K; None for an unconditional VAE, which ignores the labels.
        n: N.
        like: A tensor of the dtype and on the device that the condition should have.

    Raises:
        ValueError: A conditional VAE got no labels, or such that are no class indices.

    Example:
        >>> condition_of(torch.tensor([2, 0]), 3, 2, torch.zeros(()))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if classes is None:
        return None
    wanted = f"Expected labels of shape ({n},), integers from 0 to {classes - 1}, for a VAE "
    wanted += f"conditional on {classes} classes, but got "
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{wanted}{labels!r}. Give each input's label, or use a VAE with `classes=None`."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{wanted}dtype {labels.dtype}. Give class indices.")
    labels = labels.to(like.device, torch.int64)
    labels = labels.expand(n) if labels.ndim == 0 else labels
    if labels.shape != (n,):
        raise ValueError(f"{wanted}shape {tuple(labels.shape)}. Give one class index an input.")
    if n and bool(((labels < 0) | (labels >= classes)).any()):
        found = f"values from {int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{wanted}{found}. Say how many classes there are by `classes=`.")
    return F.one_hot(labels, classes).to(like.dtype)


def uniform_labels(n: int, classes: int, device: torch.device) -> Tensor:
    """Draw ``n`` labels (n,), each class as likely as any other, from torch's global generator."""
    return torch.randint(classes, (n,), device=device)


def beside(x: Tensor, condition: Tensor | None) -> Tensor:
    """Return features (N, D) with the condition (N, K) appended, if there is one.

    Example:
        >>> beside(torch.zeros(1, 2), torch.ones(1, 1))
        tensor([[0., 0., 1.]])
    """
    return x if condition is None else torch.cat([x, condition], dim=1)
