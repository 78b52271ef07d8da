"""Features of the network that is being pruned in place of a VAE's own encoder.

Enters: the output of one of the network's layers, detached. Leaves: the posterior's parameters.
Only heads and a decoder are new; the network's own parameters are neither trained by the VAE nor
part of its state. Where features come from, the caller knows (:attr:`FeatureHeads.source`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.augment.conditional import beside
from lightning_prune.augment.networks import dense_sizes
from lightning_prune.augment.vae import VAE


class FeatureHeads(nn.Module):
    """Two linear layers from a network's features to the posterior: (N, F) -> (N, 2 L).

    An encoder in the sense of networks.py, except that it does not look at the inputs it is called
    with: it takes the features that were offered for them, or has ``source`` compute them.

    Args:
        features: F, the elements of one input's features.
        latent: L.
        classes: K, for a conditional VAE; 0 for none.
    """

    def __init__(self, features: int, latent: int, classes: int = 0) -> None:
        super().__init__()
        inner = dense_sizes(features).inner
        self.features = features
        self.hidden = nn.Linear(features + classes, inner)
        self.head = nn.Linear(inner, 2 * latent)
        self.source: Callable[[Tensor], Tensor] | None = None
        """Inputs in units of the range (N, *shape) -> their features (N, ...)."""
        self._offered: Tensor | None = None

    def offer(self, features: Tensor | None) -> None:
        """Set the features (N, ...) of the batch that the next call is about; None for none."""
        self._offered = features

    def forward(self, unit: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return mean and log-variance for inputs in units of the range.

        Raises:
            RuntimeError: No features were offered, and there is no source of any.
            ValueError: The features are not those of these inputs, or of another width.
        """
        features = self._offered
        if features is None:
            if self.source is None:
                raise RuntimeError(
                    "Expected the network whose features the VAE encodes, but the VAE is apart "
                    "from it. Use it during a fit or after one, in the callback that was given "
                    "`encoder=`; sampling needs no network."
                )
            features = self.source(unit)
        if len(features) != len(unit) or features[:1].numel() != self.features:
            raise ValueError(
                f"Expected features of {len(unit)} inputs with {self.features} elements each, but "
                f"got shape {tuple(features.shape)}."
            )
        flat = features.detach().reshape(len(unit), self.features).to(self.head.weight.dtype)
        parameters: Tensor = self.head(F.relu(self.hidden(beside(flat, condition))))
        return parameters

    def __getstate__(self) -> dict[str, Any]:
        """Copy and save without the network."""
        return {**vars(self), "source": None, "_offered": None}


def use_features(vae: VAE, features: int) -> FeatureHeads:
    """Replace a VAE's encoder by heads on features of F elements, and return these.

    Example:
        >>> import torch
        >>> from lightning_prune.augment.vae import DenseVAE
        >>> vae = DenseVAE((8, 8))
        >>> heads = use_features(vae, 20)
        >>> heads.source = lambda unit: unit.flatten(1)[:, :20]
        >>> vae.elbo(torch.rand(3, 8, 8)).shape
        torch.Size([3])
    """
    vae.encoder = heads = FeatureHeads(features, vae.latent, vae.classes or 0)
    return heads
