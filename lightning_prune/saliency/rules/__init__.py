"""One file a kind of layer; importing the package registers all of them."""

from lightning_prune.saliency.rules import conv, embedding, linear, norm

__all__ = ["conv", "embedding", "linear", "norm"]
