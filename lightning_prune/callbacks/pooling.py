"""Small batches scored together: what a batch costs beside its samples is paid once.

Enters: batches whose logits are known. Leaves: the same samples as one larger batch. Scores are
sums over samples, so it does not matter how they are cut; and where a sure network leaves
few samples of a batch to look at, four batches of 64 take hardly longer than one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SAMPLES = 512
"""A pool of so many samples is full."""

BYTES = 64 * 2**20
"""And so is one whose inputs take so many bytes."""


class Pool:
    """Batches that wait to be scored, copied: a loader may use its buffers again."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._parts: list[list[Tensor]] = []
        self._spec: Any = None
        self._samples = self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether it is time to :meth:`take` what is there."""
        return self._samples >= SAMPLES or self._bytes >= BYTES

    def put(self, batch: Any, logits: Tensor) -> bool:
        """Add a batch if it can stand beside those that are there; tell whether it could.

        It has to be made of tensors alone, with axis 0 for its N samples, of the shapes and types
        that the others have, with finite logits (N, ...): errors name a sample of their batch.
        """
        leaves, spec = pytree.tree_flatten((batch, logits))
        samples = len(logits)
        if not all(isinstance(leaf, Tensor) and _counts(leaf, samples) for leaf in leaves):
            return False
        if not bool(torch.isfinite(logits).all()) or (self._parts and not self._fits(leaves, spec)):
            return False
        with torch.inference_mode(False):
            self._parts.append([leaf.detach().clone() for leaf in leaves])
        self._spec = spec
        self._samples += samples
        self._bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        return True

    def take(self) -> tuple[Any, Tensor] | None:
        """Return all batches as one, and its logits, and forget them; ``None`` without any."""
        if not self._parts:
            return None
        joined = [torch.cat(same) for same in zip(*self._parts, strict=True)]
        batch, logits = pytree.tree_unflatten(joined, self._spec)
        self._clear()
        return batch, logits

    def _fits(self, leaves: list[Tensor], spec: Any) -> bool:
        return bool(spec == self._spec) and all(
            a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and a.device == b.device
            for a, b in zip(leaves, self._parts[0], strict=True)
        )


def _counts(leaf: Tensor, samples: int) -> bool:
    return leaf.ndim > 0 and leaf.shape[0] == samples and leaf.layout is torch.strided
