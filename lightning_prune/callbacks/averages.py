"""Averaged copies of the model keep the masks too.

Lightning's ``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` hold a
second copy of the weights, and write it to checkpoints and, at the end, to the model. After an
event that copy still remembers the removed weights. An average of zeros is zero, so it is enough to
zero it at every event, and whenever masks come from elsewhere (at fit start, on resuming); no work
is left for the steps between.

``WeightAveraging`` lends its averaged weights to the model for each validation. What is measured
and scored there are the averaged weights: the R of an event is theirs, and belongs to the metrics
and checkpoints of that epoch. A criterion that reads the weights as well (``"taylor"``,
``"magnitude"``) reads those in training, at the moment of the event. A rewind goes back with the
weights in training only; the average forgets the old ones at its own pace.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune._types import Masks
from lightning_prune.callbacks.batch_sources import callbacks_of


def averaged_copies(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the averaged copies of the model that the Trainer's callbacks hold.

    Found are those of Lightning's own averaging callbacks, and every
    ``torch.optim.swa_utils.AveragedModel`` that any other callback holds as an attribute.

    Args:
        trainer: A Trainer after its callbacks' ``setup``, where the copies are made.
    """
    for callback in callbacks_of(trainer):
        yield from _copies_of(callback)


def mask_averages(trainer: Trainer, masks: Masks) -> int:
    """Zero the masked weights in every averaged copy of the model.

    To be called after every event, and once at fit start and after a checkpoint was loaded. Do not
    call it during a validation, where the copy holds the weights in training: both are masked
    then, but nothing is gained. A copy of only a part of the model, whose parameters have other
    names, is left alone.

    Args:
        trainer: In a fit.
        masks: The masks in force, by the model's parameter names; ``True`` = kept.

    Returns:
        In how many copies weights were zeroed, or were zero already.
    """
    copies = 0
    for copy in averaged_copies(trainer):
        parameters = dict(copy.named_parameters())
        held = [name for name in masks if name in parameters]
        held = [name for name in held if parameters[name].shape == masks[name].shape]
        for name in held:
            # Not a multiplication: that would leave -0.0 and NaN behind.
            weight = parameters[name].detach()  # possibly on another device than the masks
            weight.masked_fill_(~masks[name].to(weight.device), 0.0)
        copies += bool(held)
    return copies


def averaging_after(trainer: Trainer, callback: Callback) -> list[str]:
    """Name the callbacks behind ``callback`` that put averaged weights in when training ends."""
    callbacks = callbacks_of(trainer)
    behind = callbacks[callbacks.index(callback) + 1 :] if callback in callbacks else []
    return [
        type(other).__name__
        for other in behind
        if not isinstance(other, StochasticWeightAveraging) and any(_copies_of(other))
    ]


def _copies_of(callback: Callback) -> Iterator[nn.Module]:
    if isinstance(callback, StochasticWeightAveraging):
        if isinstance(callback._average_model, nn.Module):
            yield callback._average_model
        return
    for value in vars(callback).values():
        if isinstance(value, AveragedModel):
            yield value.module
