"""The only room that knows Lightning: hooks in, calls to the other rooms out."""

from lightning_prune.callbacks import recipes
from lightning_prune.callbacks.batch_norm_statistics import BatchNormStatistics
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.generator_training import GeneratorTraining
from lightning_prune.callbacks.learning_rate_decay import LearningRateDecay
from lightning_prune.callbacks.rewinding import Rewind
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from lightning_prune.callbacks.sparsity_checkpoint import SparsityCheckpoint
from lightning_prune.callbacks.sparsity_stopping import SparsityEarlyStopping
from lightning_prune.callbacks.vae_augment import VAEAugmentCallback

__all__ = [
    "BatchNormStatistics",
    "DistillationCallback",
    "GeneratorTraining",
    "LearningRateDecay",
    "Rewind",
    "SaliencyPruningCallback",
    "SparsityCheckpoint",
    "SparsityEarlyStopping",
    "VAEAugmentCallback",
    "recipes",
]
