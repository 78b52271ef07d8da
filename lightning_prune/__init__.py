"""Saliency pruning for PyTorch Lightning, with a generative model beside the network.

The way of the data, room by room:

    saliency    batches -> scores: how much does each parameter matter?
    selection   scores -> masks: which weights stay?
    schedules   epoch -> target: how many, and when?
    masking     masks -> a model that keeps them, and statistics about it
    refit       masks, inputs -> surviving weights that make up for the removed ones
    removal     masks -> a smaller model that computes the same
    augment     batch -> batch with generated samples
    offline     a trained model, batches -> masks, without a Trainer
    callbacks   Lightning's hooks -> calls to the rooms above
"""

from lightning_prune.callbacks import (
    BatchNormStatistics,
    DistillationCallback,
    GeneratorTraining,
    LearningRateDecay,
    Rewind,
    SaliencyPruningCallback,
    SparsityCheckpoint,
    SparsityEarlyStopping,
    VAEAugmentCallback,
    recipes,
)
from lightning_prune.masking import SparsityMetric, sparsity
from lightning_prune.offline import prune
from lightning_prune.removal import (
    carry_optimizer,
    compare,
    export_onnx,
    export_program,
    load_compressed,
    load_shrunk,
    save_compressed,
    save_shrunk,
    shrink,
    shrink_with_report,
    sparsify,
    to_semi_structured,
)
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
    "BatchNormStatistics",
    "ConstantRateSchedule",
    "CubicSchedule",
    "DistillationCallback",
    "EpochSchedule",
    "ExponentialSchedule",
    "GeneratorTraining",
    "LearningRateDecay",
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
    "carry_optimizer",
    "compare",
    "export_onnx",
    "export_program",
    "load_compressed",
    "load_shrunk",
    "prune",
    "recipes",
    "save_compressed",
    "save_shrunk",
    "shrink",
    "shrink_with_report",
    "sparsify",
    "sparsity",
    "squared_gradients",
    "to_semi_structured",
]
