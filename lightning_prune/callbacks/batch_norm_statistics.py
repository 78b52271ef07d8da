"""Batch norm after pruning: running statistics of the network that is left, not of those before.

Enters: training batches. Leaves: running means and variances that are averages over these batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_prune._targets import count_faults
from lightning_prune.callbacks.averages import averaged_copies, averaging_after
from lightning_prune.callbacks.batch_norm_pass import average, batch_norms, estimate_statistics
from lightning_prune.callbacks.fed_inputs import Call, InputCheck, first_call
from lightning_prune.callbacks.preflight import PruningSetupError, refuse_trainer
from lightning_prune.callbacks.reading import on_device, undisturbed
from lightning_prune.callbacks.reporting import give_back, without_lent
from lightning_prune.callbacks.saliency_pruning import pruners_of
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import change_tensors, default_call
from lightning_prune.passes.isolation import evaluating, unlogged


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
    batches and the statistics are averaged. What ``forward`` logs in the pass is not logged.

    Wrong inputs would ruin every layer, so without ``forward=`` it is looked whether the model gets
    them: in the fit's first training step and its first validation step the input of the first
    layer that the batch reaches is compared with that of a pass over the same batch. If neither
    agrees (the step calls ``self(x / 255)`` and the batch holds x), or it cannot be seen (the model
    is compiled, or a batch is one sample), the statistics stay as training leaves them, with a
    warning. A training step that augments at
    random (mixup, noise) never agrees, and is in order where the validation step does: the pass
    goes over the batches as they are. A layer that no batch reaches, such as an auxiliary head that
    only ``training_step`` calls, keeps its statistics, and is warned of if they are of batches.

    Args:
        batches: How many training batches to use; by default all of an epoch, or of a loader
            without a length at most as many as the fit has had.
        forward: ``forward(module, batch)`` where ``module(x)`` is not enough, or not what a
            training step calls. Taken as it is; what it returns is not looked at.

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
        self._start()

    def _start(self) -> None:
        self._events: int | None = None  # pruning events when the statistics were estimated
        self._rehearsed = self._validated = self._warned = False
        # The user's own forward is not questioned.
        self._inputs = InputCheck(agrees=self.forward is not default_call)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_trainer(trainer)
            self._start()

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
            self._inputs.expect(self._rehearse(trainer, pl_module, batch))
            self._inputs.watch(pl_module)

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Call | None:
        def run(batch: Any) -> None:
            rehearse(pl_module, batch, self.forward)

        with isolate_rng(), unlogged(pl_module), trainer.precision_plugin.forward_context():
            if not self._inputs.agrees:
                return first_call(pl_module, run, batch)
            run(batch)
            return None

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        # Other callbacks run passes of their own after it. By hand the step may yet call the model.
        if pl_module.automatic_optimization:
            self._inputs.compare()

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validated or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = True
        if any(isinstance(layer, _BatchNorm) for layer in pl_module.modules()):
            self._inputs.watch(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._inputs.watching:
            return
        self._inputs.let_go()
        # After the step, as other callbacks watch what it calls.
        with suppress(Exception):  # what cannot be compared is no reason to end a fit
            self._inputs.expect(self._rehearse(trainer, pl_module, batch))
        self._inputs.compare()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._inputs.compare()
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
        if not layers or not self._rehearsed:  # a fit without a step leaves no other weights
            return
        if not trainer.strategy.reduce_boolean_decision(self._inputs.agrees, all=True):
            self._warn(_OTHER_INPUTS)
            return
        reading = trainer.precision_plugin.forward_context()
        with isolate_rng(), undisturbed(trainer), unlogged(pl_module), reading:
            batches = islice(_training_batches(trainer, pl_module), self._limit(trainer))
            seen = estimate_statistics(pl_module, list(layers.values()), batches, self.forward)
        if trainer.world_size > 1:
            seen = average(trainer, list(layers.values()), seen)
        # Statistics that no step has touched are nobody's loss.
        left = [
            name
            for (name, layer), count in zip(layers.items(), seen, strict=True)
            if count == 0 and layer.num_batches_tracked > 0
        ]
        if max(seen) == 0:
            self._warn(_NO_BATCHES)
        elif left:
            self._warn(
                f"BatchNormStatistics: the running statistics of {', '.join(left)} stay as "
                "training left them, as a pass over the batches does not reach these layers. If "
                "the network that you hand over has them, give a `forward=lambda module, batch: "
                "...` that does."
            )

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(message)

    def _limit(self, trainer: Trainer) -> int | None:
        """Return how many batches to take at most, ``None`` for all there are."""
        if self.batches is None and math.isinf(trainer.num_training_batches):
            return trainer.fit_loop.epoch_loop.total_batch_idx + 1  # it may never end
        return self.batches

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._inputs.compare()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._inputs.compare()
        give_back(self)

    def __getstate__(self) -> dict[str, Any]:
        return without_lent(self)


_OTHER_INPUTS = (
    "BatchNormStatistics: the running statistics stay as training left them. Expected "
    "training_step or validation_step to feed the first layer what `module(x)` feeds it for the "
    "same batch, but neither is seen to, so new statistics could be those of other inputs. If the "
    "step prepares its input, repeat it in `forward=lambda module, batch: ...`, or do it in the "
    "model's forward, the loader or `on_after_batch_transfer`; if it does not (the model is "
    "compiled, a batch is one sample, or the step calls other parts of the model), give the call "
    "as `forward=`."
)
_NO_BATCHES = (
    "BatchNormStatistics: the running statistics stay as training left them, as the training "
    "loader yields no batches a second time, or a pass over them reaches no batch norm."
)


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
