"""The user's range of inputs <-> [0, 1], learnt from the first batches.

Undoes a Normalize, a scaling to [-1, 1] or none at all, without being told which.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Units: TypeAlias = Literal["all", "channel", "feature"]
"""What has a range of its own: the whole input, each slice of its axis 0, or each element."""


class InputRange(nn.Module):
    """Map inputs linearly so that the values seen so far fill [0, 1], and back.

    Args:
        shape: Shape of one input.
        units: What has a range of its own.
        batches: How many batches widen the range; later ones leave it alone, so that one freak
            value late in the training cannot squeeze all others together.

    A unit whose values were all equal is shifted but not stretched, and an :class:`InputRange`
    that has seen nothing is the identity.

    Example:
        >>> normalised = InputRange((2,), "all", batches=10)
        >>> normalised.observe(torch.tensor([[-1.0, 3.0]]))
        >>> normalised(torch.tensor([[-1.0, 1.0]]))
        tensor([[0.0000, 0.5000]])
        >>> normalised.inverse(torch.tensor([[0.0, 0.5]]))
        tensor([[-1.,  1.]])
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, shape: tuple[int, ...], units: Units, *, batches: int) -> None:
        super().__init__()
        own = {"all": 0, "channel": 1, "feature": len(shape)}[units]
        widths = (*shape[:own], *(1 for _ in shape[own:]))
        self.axes = tuple(axis for axis in range(len(shape) + 1) if axis == 0 or axis > own)
        self.batches = batches
        self.register_buffer("low", torch.full(widths, torch.inf))
        self.register_buffer("high", torch.full(widths, -torch.inf))
        self.register_buffer("seen", torch.tensor(0))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Widen the range by a batch (N, *shape), if it is among the first ``batches``."""
        learning = self.seen < self.batches  # a tensor: no wait for the device
        low = x.amin(dim=self.axes, keepdim=True).squeeze(0)
        high = x.amax(dim=self.axes, keepdim=True).squeeze(0)
        learning = learning & low.isfinite() & high.isfinite()
        self.low.copy_(torch.where(learning, torch.minimum(self.low, low), self.low))
        self.high.copy_(torch.where(learning, torch.maximum(self.high, high), self.high))
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` in units of the range."""
        offset, width = self._affine()
        return (x - offset) / width

    def inverse(self, unit: Tensor) -> Tensor:
        """Return values in [0, 1] in the user's range."""
        offset, width = self._affine()
        return offset + width * unit

    def _affine(self) -> tuple[Tensor, Tensor]:
        width = self.high - self.low
        usable = (width > 0) & width.isfinite()
        offset = torch.where(self.low.isfinite(), self.low, torch.zeros_like(self.low))
        return offset, torch.where(usable, width, torch.ones_like(width))


def find_units(x: Tensor) -> Units:
    """Decide from a batch (N, *shape) what has a range of its own.

    Pictures and signals (two axes or more) have one range a channel if there are three axes, else
    one for all. For vectors it depends: the elements of a flattened picture share a scale, the
    columns of a table do not. They share one if at least half of the elements that vary do so over
    a tenth of the widest range or more.

    Example:
        >>> find_units(torch.rand(8, 3, 4, 4)), find_units(torch.rand(8, 4, 4))
        ('channel', 'all')
        >>> find_units(torch.rand(8, 3)), find_units(torch.rand(8, 3) * torch.tensor([1, 1e2, 1e5]))
        ('all', 'feature')
    """
    if x.ndim >= 4:
        return "channel"
    if x.ndim != 2:
        return "all"
    width = x.amax(0) - x.amin(0)
    varying = width[width > 0]
    if not varying.numel():
        return "all"
    alike = (varying >= 0.1 * varying.max()).float().mean()
    return "all" if bool(alike >= 0.5) else "feature"
