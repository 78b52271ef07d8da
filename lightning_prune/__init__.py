"""Saliency pruning for PyTorch Lightning, with a generative model beside the network.

The way of the data, room by room:

    saliency    batches -> scores: how much does each parameter matter?
    selection   scores -> masks: which weights stay?
    schedules   epoch -> target: how many, and when?
    masking     masks -> a model that keeps them, and statistics about it
    augment     batch -> batch with generated samples
    callbacks   Lightning's hooks -> calls to the rooms above
"""

from lightning_prune.callbacks import (
    Rewind,
    SaliencyPruningCallback,
    SparsityCheckpoint,
    SparsityEarlyStopping,
    VAEAugmentCallback,
)
from lightning_prune.masking import SparsityMetric, sparsity
from lightning_prune.saliency import RandomSigns, SaliencyAccumulator, squared_gradients
from lightning_prune.schedules import (
    ConstantRateSchedule,
    CubicSchedule,
    EpochSchedule,
    ExponentialSchedule,
    LinearSchedule,
    OneShotSchedule,
    Schedule,
)
from lightning_prune.selection import Selection, Threshold

__all__ = [
    "ConstantRateSchedule",
    "CubicSchedule",
    "EpochSchedule",
    "ExponentialSchedule",
    "LinearSchedule",
    "OneShotSchedule",
    "RandomSigns",
    "Rewind",
    "SaliencyAccumulator",
    "SaliencyPruningCallback",
    "Schedule",
    "Selection",
    "SparsityCheckpoint",
    "SparsityEarlyStopping",
    "SparsityMetric",
    "Threshold",
    "VAEAugmentCallback",
    "sparsity",
    "squared_gradients",
]
