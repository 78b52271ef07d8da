"""The data that a refit fits to, those it is checked on, and the network it has to stay close to.

Enters: batches in the user's form and the weights before removal. Leaves: two sets of samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_prune._types import Forward, Likelihood
from lightning_prune.passes.batches import batch_size, default_forward, take_samples
from lightning_prune.passes.teacher import Teacher

EVERY = 10
"""One sample in so many is held out. More leave fewer to fit to, fewer judge worse."""


@dataclass(frozen=True)
class Calibration:
    """What surviving weights are fitted to.

    Args:
        dense: The weights before anything was removed; the reference.
        batches: Samples to fit to, in the form that ``forward`` reads. Labels are not used.
        held_out: Samples to check on: a change that makes them worse is refused. If there are none,
            those of ``batches`` are used.
        forward: ``forward(module, batch) -> logits``.
        likelihood: How the logits are read: ``"categorical"`` (softmax over axis 1),
            ``"bernoulli"`` (one logit an output), ``"gaussian"`` (the output is the prediction).
    """

    dense: Teacher
    batches: list[Any]
    held_out: list[Any]
    forward: Forward = default_forward
    likelihood: Likelihood = "categorical"
    generated: list[Any] = field(default_factory=list)

    @property
    def fitted_to(self) -> list[Any]:
        """All samples to fit to, real and generated."""
        return [*self.batches, *self.generated]

    @property
    def checked_on(self) -> list[Any]:
        """The samples that a change has to stand on."""
        return self.held_out or self.fitted_to

    def faults(self, model: nn.Module) -> list[str]:
        """List what a refit of ``model`` lacks; empty if all is there."""
        found = []
        if not self.fitted_to:
            found.append("calibration.batches: expected at least one batch, but got none")
        if not self.dense.fits(model):
            found.append("calibration.dense: expected the weights of this model, but got another's")
        return found


def hold_out(
    batches: Iterable[Any], every: int = EVERY, *, place: int | None = None
) -> tuple[list[Any], list[Any]]:
    """Split batches: each ``every``-th sample is held out, counted over all batches.

    Args:
        batches: In the user's form.
        every: One sample in so many is held out.
        place: Which one of them, counted from 0; by default the last. Different places hold out
            different samples.

    Returns:
        The batches without these samples, and these samples; empty ones are left out.

    Example:
        >>> fit, held_out = hold_out([torch.arange(4), torch.arange(4, 8)], 5)
        >>> fit, held_out
        ([tensor([0, 1, 2, 3]), tensor([5, 6, 7])], [tensor([4])])
    """
    fit: list[Any] = []
    held_out: list[Any] = []
    seen, place = 0, every - 1 if place is None else place
    for batch in batches:
        size = batch_size(batch)
        index = torch.arange(seen, seen + size)
        seen += size
        for part, chosen in (
            (fit, index % every != place),
            (held_out, index % every == place),
        ):
            if bool(chosen.any()):
                part.append(take_samples(batch, chosen.nonzero()[:, 0]))
    return fit, held_out
