"""Logits that somebody else has computed: used where they are seen to be the batch's own.

Enters: logits given for a batch, and those of the parts of it that the engine runs. Leaves: of
which samples they agree, and which samples are to be scored again.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GivenLogits:
    """Compare given logits with found ones, sample by sample.

    Args:
        logits: (N, ...) as given.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.detach()
        self._confirmed = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        self.doubted = False

    def confirm(self, samples: Tensor, found: Tensor) -> Tensor:
        """Tell, (n,) bool, of which samples the given logits are right.

        Args:
            samples: (n,) indices into the batch.
            found: (n, ...) their logits.
        """
        right = alike(found.detach(), self.logits[samples])
        self.doubted |= not bool(right.all())
        self._confirmed[samples[right]] = True
        return right

    @property
    def confirmed(self) -> Tensor:
        """(N,) bool: what has been seen to be right."""
        return self._confirmed

    @property
    def rest(self) -> Tensor:
        """Indices of the samples of which it has not."""
        return (~self._confirmed).nonzero().squeeze(1)


def usable(logits: Tensor | None, samples: int) -> Tensor | None:
    """Return logits that may be those of a batch of so many samples, else ``None``."""
    if logits is None or logits.shape[:1] != (samples,) or not bool(torch.isfinite(logits).all()):
        return None
    return logits


def alike(found: Tensor, given: Tensor) -> Tensor:
    """Tell, (n,) bool, where two computations of logits agree as far as their precision goes."""
    if found.shape != given.shape:
        return torch.zeros(len(found), dtype=torch.bool, device=found.device)
    loose = 1e-6 if given.dtype == torch.float64 else 1e-3
    scale = float(found.abs().amax()) + 1e-6
    return (found - given).abs().reshape(len(found), -1).amax(1) <= loose * scale
