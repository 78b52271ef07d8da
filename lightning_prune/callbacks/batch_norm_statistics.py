"""Batch norm after pruning: running statistics of the network that is left, not of those before.

Enters: training batches. Leaves: running means and variances that are averages over these batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_prune._targets import count_faults
from lightning_prune.callbacks.averages import averaged_copies, averaging_after
from lightning_prune.callbacks.preflight import PruningSetupError, refuse_trainer
from lightning_prune.callbacks.reading import on_device, undisturbed
from lightning_prune.callbacks.reporting import give_back, without_lent
from lightning_prune.callbacks.saliency_pruning import pruners_of
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import change_tensors, default_call
from lightning_prune.passes.isolation import evaluating


class BatchNormStatistics(Callback):
    """Estimate the running statistics of batch norms anew when the training is over.

    A running mean is a moving average over the last steps: of weights that were still moving, and
    with few steps since the last event even of weights that are gone. Here means and variances
    become plain averages over one pass of the training batches through the final network, each
    batch counting the same (as ``torch.optim.swa_utils.update_bn`` does it), with everything else
    in eval mode. Weights and the layers' ``momentum`` stay, and so does the random state.

    It happens after the last training step and before the last epoch's validation, so that the
    last metrics and checkpoints are those of the network that is handed over; and once more at the
    end of the fit if that has changed the weights (an average of weights is put in, or the last
    event comes in force), or if early stopping has ended it: the last metrics and checkpoint are
    then from before. Put it after the pruner in the list of callbacks, and after one that
    averages weights. A layer that is in eval mode (frozen), or keeps no statistics, is left alone;
    a model without batch norm costs nothing. In distributed training each process sees its own
    batches and the statistics are averaged.

    Args:
        batches: How many training batches to use; by default all of an epoch, or of a loader
            without a length at most as many as the fit has had.
        forward: ``forward(module, batch)`` where ``module(x)`` is not enough; what it returns is
            not looked at.

    Raises:
        ValueError: ``batches`` is not a whole number >= 1.
        PruningSetupError: In a fit, before its first step: the model cannot be run on a batch, or a
            callback behind this one will put averaged weights in.

    Example:
        >>> BatchNormStatistics(batches=100).batches
        100
    """

    def __init__(
        self,
        batches: int | None = None,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        if batches is not None and (faults := count_faults(batches=batches)):
            raise ValueError(faults[0])
        self.batches = batches
        self.forward = default_call if forward is None else forward
        self._events: int | None = None  # pruning events when the statistics were estimated
        self._rehearsed = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_trainer(trainer)
            self._events, self._rehearsed = None, False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if batch_norms(pl_module) and (behind := averaging_after(trainer, self)):
            raise PruningSetupError(
                f"BatchNormStatistics: expected to stand behind {', '.join(behind)} in the list of "
                "callbacks, which will put other weights in when the training ends, but stands "
                "before. Change their order, or leave it out (`batch_norm=False` in a recipe)."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._rehearsed or batch is None:
            return
        # What has to work after the last step is tried before the first.
        self._rehearsed = True
        if batch_norms(pl_module):
            with isolate_rng(), trainer.precision_plugin.forward_context():
                rehearse(pl_module, batch, self.forward)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if _is_last_step(trainer):
            self._estimate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Stopped early; or averaged weights have just taken the place of the last ones.
        if self._events is None or any(averaged_copies(trainer)):
            self._estimate(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._events is not None and self._events != _events(trainer):
            self._estimate(trainer, pl_module)

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._events = _events(trainer)
        layers = batch_norms(pl_module)
        if not layers:
            return
        with isolate_rng(), undisturbed(trainer), trainer.precision_plugin.forward_context():
            batches = islice(_training_batches(trainer, pl_module), self._limit(trainer))
            seen = estimate_statistics(pl_module, layers, batches, self.forward)
        if seen == 0:
            rank_zero_warn(
                "BatchNormStatistics: the training loader yields no batches a second time, so the "
                "running statistics stay as they are."
            )
        elif trainer.world_size > 1:
            for layer in layers:
                for statistic in (layer.running_mean, layer.running_var):
                    statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))

    def _limit(self, trainer: Trainer) -> int | None:
        """Return how many batches to take at most, ``None`` for all there are."""
        if self.batches is None and math.isinf(trainer.num_training_batches):
            return trainer.fit_loop.epoch_loop.total_batch_idx + 1  # it may never end
        return self.batches

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        give_back(self)

    def __getstate__(self) -> dict[str, Any]:
        return without_lent(self)


def batch_norms(module: nn.Module) -> list[Any]:
    """Return the batch norms that are learning statistics: in train mode, with running ones."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    ]


def rehearse(module: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]) -> None:
    """Run a batch once, in eval mode, and say what is missing if that fails.

    Raises:
        PruningSetupError: The batch cannot be read, or the model does not accept it.
    """
    try:
        with torch.no_grad(), evaluating(module):
            forward(module, change_tensors(batch, Tensor.clone))
    except BatchFormatError as error:
        raise PruningSetupError(
            f"BatchNormStatistics: {error} Or leave it out (`batch_norm=False` in a recipe)."
        ) from error


def estimate_statistics(
    module: nn.Module,
    layers: list[Any],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = default_call,
) -> int:
    """Make running statistics the averages over batches, each batch counting the same.

    Args:
        module: The model; all but ``layers`` is in eval mode meanwhile.
        layers: Its batch norms to estimate.
        batches: In the form that ``forward`` reads.
        forward: ``forward(module, batch)``.

    Returns:
        How many batches there were. After none, or an exception, the statistics are as before.
    """
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [[getattr(layer, name).clone() for name in names] for layer in layers]
    momenta = [layer.momentum for layer in layers]
    seen, done = 0, False
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
        with torch.no_grad(), evaluating(module):
            for batch in batches:
                for layer in layers:
                    layer.training = True
                forward(module, batch)
                seen += 1
        done = seen > 0
    finally:
        for layer, momentum, kept in zip(layers, momenta, before, strict=True):
            layer.momentum = momentum
            layer.training = True
            for name, value in zip(names, () if done else kept, strict=False):
                getattr(layer, name).copy_(value)
    return seen


def _is_last_step(trainer: Trainer) -> bool:
    """Tell, at the end of a training batch, whether the fit is known to have no more."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def _events(trainer: Trainer) -> int:
    return sum(len(pruner.history) for pruner in pruners_of(trainer))


def _training_batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    source = trainer.fit_loop._combined_loader
    if source is None:
        return
    loaders = CombinedLoader(source.iterables, source._mode)  # Lightning's own is in use
    loaders.limits = source.limits
    for batch, _, _ in iter(loaders):
        # When the fit has ended the strategy may have taken the model off the device.
        yield move_data_to_device(on_device(trainer, batch), module.device)
