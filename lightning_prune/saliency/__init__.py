"""How much does each parameter matter? Batches in, :data:`~lightning_prune._types.Scores` out."""

from lightning_prune._types import Likelihood
from lightning_prune.passes.batches import (
    default_forward,
    read_inputs,
    read_labels,
    unwrap_logits,
)
from lightning_prune.saliency.accumulator import SaliencyAccumulator, squared_gradients
from lightning_prune.saliency.signs import RandomSigns
from lightning_prune.saliency.target import Target

__all__ = [
    "Likelihood",
    "RandomSigns",
    "SaliencyAccumulator",
    "Target",
    "default_forward",
    "read_inputs",
    "read_labels",
    "squared_gradients",
    "unwrap_logits",
]
