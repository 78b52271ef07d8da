"""Logits that somebody else has computed: used where they are seen to be the batch's own.

Enters: logits given for a batch, and those of the parts of it that the engine runs. Leaves: whether
they agree. Samples without a row are not run, and are taken as given where all others agree.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GivenLogits:
    """Compare given logits with found ones, without waiting for the device before the end.

    Args:
        logits: (N, ...) as given.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.detach().clone()
        self._alike: list[Tensor] = []

    def compare(self, samples: Tensor, found: Tensor) -> bool:
        """Look at some samples; return False if not even the shapes agree.

        Args:
            samples: (n,) indices into the batch.
            found: (n, ...) their logits.
        """
        fits = found.shape[1:] == self.logits.shape[1:]
        if fits:
            self._alike.append(alike(found.detach(), self.logits[samples]))
        else:
            self._alike.append(torch.zeros((), dtype=torch.bool, device=found.device))
        return fits

    @property
    def right(self) -> bool:
        """Whether all that was looked at agreed, and anything was."""
        return bool(self._alike) and bool(torch.stack(self._alike).all())


def usable(logits: Tensor | None, samples: int) -> Tensor | None:
    """Return logits that may be those of a batch of so many samples, else ``None``."""
    if logits is None or logits.shape[:1] != (samples,) or not bool(torch.isfinite(logits).all()):
        return None
    return logits


def alike(found: Tensor, given: Tensor) -> Tensor:
    """Tell, as a tensor, whether two computations agree as far as their precision goes."""
    loose = 1e-6 if given.dtype == torch.float64 else 1e-3
    return ((found - given).abs() <= loose * (found.abs().amax() + 1e-6)).all()
