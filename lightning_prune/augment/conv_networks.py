"""The two halves of a convolutional VAE, for signals, pictures and volumes of any size.

They keep the contract of networks.py. The way down halves every axis until few positions are left;
the way up doubles them and cuts what is too much, so that odd sizes come back exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_prune.augment.conditional import beside
from lightning_prune.augment.networks import Reshape

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

POSITIONS = 64
"""Axes are halved until no more positions than these are left."""


class ConvSizes(NamedTuple):
    """What a convolutional VAE's layers work on, from the input to the innermost."""

    channels: tuple[int, ...]
    extents: tuple[tuple[int, ...], ...]

    @property
    def features(self) -> int:
        """Elements of the innermost layer."""
        return self.channels[-1] * math.prod(self.extents[-1])


def conv_sizes(shape: Sequence[int], dimensions: int, width: int) -> ConvSizes:
    """Return the channels and extents of each layer for inputs of a shape.

    Args:
        shape: (channels, *extents), or the extents alone: one channel then.
        dimensions: How many axes are extents.
        width: Channels of the outermost layer; they double at each halving, up to four times that.

    Example:
        >>> conv_sizes((1, 28, 28), 2, 16)
        ConvSizes(channels=(1, 16, 32), extents=((28, 28), (14, 14), (7, 7)))
    """
    channels = [math.prod(shape[: len(shape) - dimensions])]
    extents = [tuple(shape[len(shape) - dimensions :])]
    while len(extents) == 1 or math.prod(extents[-1]) > POSITIONS:
        channels.append(width * min(4, 2 ** (len(extents) - 1)))
        extents.append(tuple(math.ceil(extent / 2) for extent in extents[-1]))
    return ConvSizes(tuple(channels), tuple(extents))


class ConvEncoder(nn.Module):
    """Halve by convolutions of stride 2, then one linear layer: (N, *shape) -> (N, 2 L)."""

    def __init__(self, sizes: ConvSizes, latent: int, classes: int = 0) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[len(sizes.extents[0])]
        layers: list[nn.Module] = [Reshape((sizes.channels[0], *sizes.extents[0]))]
        for outer, inner in zip(sizes.channels, sizes.channels[1:], strict=False):
            layers += [convolution(outer, inner, 3, stride=2, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers, Reshape((sizes.features,)))
        self.head = nn.Linear(sizes.features + classes, 2 * latent)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return mean and log-variance; the one-hot labels join the last layer's features."""
        parameters: Tensor = self.head(beside(self.features(x), condition))
        return parameters


class ConvDecoder(nn.Module):
    """One linear layer, then double by transposed convolutions: (N, L + K) -> (N, *shape).

    Kernels of 4 at stride 2 cover all outputs evenly, which keeps chequers out of the samples
    (Odena et al. 2016, "Deconvolution and checkerboard artifacts").
    """

    def __init__(
        self, sizes: ConvSizes, shape: Sequence[int], latent: int, classes: int = 0
    ) -> None:
        super().__init__()
        transposed = TRANSPOSED[len(sizes.extents[0])]
        layers: list[nn.Module] = [
            nn.Linear(latent + classes, sizes.features),
            Reshape((sizes.channels[-1], *sizes.extents[-1])),
        ]
        for level in range(len(sizes.channels) - 1, 0, -1):
            inner, outer = sizes.channels[level], sizes.channels[level - 1]
            layers += [
                nn.ReLU(),
                transposed(inner, outer, 4, stride=2, padding=1),
                Crop(sizes.extents[level - 1]),
            ]
        self.layers = nn.Sequential(*layers, Reshape(shape))

    def forward(self, z: Tensor) -> Tensor:
        """Return the likelihood's natural parameter for each element."""
        output: Tensor = self.layers(z)
        return output


class Crop(nn.Module):
    """(N, C, *larger) -> (N, C, *extents): cut each axis at its end."""

    def __init__(self, extents: Sequence[int]) -> None:
        super().__init__()
        self.extents = tuple(extents)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` cut to size."""
        for axis, extent in enumerate(self.extents, start=2):
            x = x.narrow(axis, 0, extent)
        return x
