"""How is a trained model pruned without a Trainer? A model and batches in, masks out."""

from lightning_prune.offline.staged import prune

__all__ = ["prune"]
