"""Early stopping that waits for the last target: a dense model's best is no measure for it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override

from lightning_prune.callbacks.scoring import is_fitting
from lightning_prune.callbacks.sparsity_level import (
    MeasuredBefore,
    check_pruners,
    check_target,
    pruning_is_over,
)


class SparsityEarlyStopping(EarlyStopping):
    """Stop when a metric no longer improves, but only once the pruning is over.

    Pruning makes a metric worse at each event, and Lightning's ``EarlyStopping`` would end the fit
    there, before the schedule does. This one neither counts nor stops (for whatever reason: also
    thresholds and NaN) until the masks of the last target are in force in every pruner of the
    Trainer, and a validation has measured them. Then it starts afresh, with no best score. That the
    metric is logged at all is checked from the first epoch on.

    Args:
        monitor: The metric to watch.
        target: The share removed, in [0, 1), from which on to count; by default the last target of
            the pruners' schedules. Needed if a schedule does not know its end (a callable).
        **kwargs: As for :class:`lightning.pytorch.callbacks.EarlyStopping`: ``mode``, ``patience``,
            ``min_delta``, ...

    Raises:
        ValueError: ``target`` is no share.
        PruningSetupError: At the start of a fit: the Trainer has no pruner, or one whose schedule
            does not know its end, and there is no ``target``.

    Example:
        >>> from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
        >>> pruner = SaliencyPruningCallback({2: 0.5, 4: 0.8})
        >>> stopping = SparsityEarlyStopping("val_loss", patience=5)
        >>> callbacks = [pruner, stopping]  # for a Trainer; it counts from epoch 5 on
    """

    def __init__(self, monitor: str, *, target: float | None = None, **kwargs: Any) -> None:
        super().__init__(monitor, **kwargs)
        check_target(target)
        self.target = target
        self._measured_before = MeasuredBefore(monitor)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_pruners(trainer, type(self).__name__, needs_end=True, target=self.target)
        super().setup(trainer, pl_module, stage)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer):
            self._measured_before.note(trainer)
        super().on_validation_end(trainer, pl_module)

    @override
    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        if not pruning_is_over(trainer, self.target):
            if not getattr(trainer, "fast_dev_run", False):
                self._validate_condition_metric(trainer.callback_metrics)
            self.wait_count = 0
            self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        elif not self._measured_before.an_event(trainer):
            super()._run_early_stopping_check(trainer)
