"""Prune while fine-tuning: Lightning's hooks, turned into calls to the other rooms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune._targets import Target as PruningTarget
from lightning_prune._targets import Threshold
from lightning_prune._types import Masks, Scores
from lightning_prune.callbacks import preflight, pruning_state, reporting
from lightning_prune.callbacks.pruning_state import PendingEvent, PruningRecord, make_record
from lightning_prune.callbacks.scoring import (
    ScoringOptions,
    ScoringPass,
    batch_sources,
    callbacks_of,
    is_fitting,
    is_last_validation,
    refused_in,
)
from lightning_prune.masking import MaskKeeper, sparsity
from lightning_prune.saliency import Likelihood, Target
from lightning_prune.schedules import Schedule, as_schedule, planned_targets
from lightning_prune.selection import keep_by_target, resolve_criterion


class SaliencyPruningCallback(Callback):
    """Score a network's weights during validation, remove the least important, train on.

    In an epoch with a target the validation batches (and generated ones, see
    :class:`~lightning_prune.VAEAugmentCallback`) are scored; the masks that follow are put in force
    before the first training step of the next epoch, so that every checkpoint with this epoch's
    metrics holds the weights they were measured on. If the fit ends first, they are put in force at
    its very end. From then on a removed weight is exactly 0.0 after every optimizer step. The model
    keeps its parameters, names and state_dict keys; when the fit is over nothing is left on it.

    Args:
        schedule: When how much is pruned: a mapping epoch -> target, a callable epoch -> target or
            ``None``, or a :class:`~lightning_prune.schedules.Schedule`. Epochs count from 0. A
            target is the share of all prunable weights removed by then, in [0, 1), or
            :class:`~lightning_prune.Threshold`.
        criterion: ``"taylor"`` (w^2 R), ``"saliency"`` (R, the published score), ``"magnitude"``,
            ``"random"``, or a callable (scores, parameters) -> scores. The ranking by w^2 R is far
            better than that by R. Magnitude and random need no scoring pass and no validation.
        target: Which R, as in :func:`~lightning_prune.squared_gradients`.
        likelihood: What the model's output means, as there.
        tolerance: The share of the score's output energy that may be left out to save time.
        forward: ``forward(module, batch) -> logits`` for batches that the default cannot read.
        parameters: Full names of the parameters to prune; by default the weights of all layers with
            two or more axes, neither biases nor norms.
        seed: For ``criterion="random"``.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: An argument out of its range. Faults that only the Trainer or the model can show
            are raised at fit start, before the first step, all in one message.

    Example:
        >>> pruner = SaliencyPruningCallback({2: 0.5, 4: 0.8})
        >>> pruner.schedule
        EpochSchedule(targets={2: 0.5, 4: 0.8})
        >>> pruner.sparsity, pruner.history
        (0.0, [])
    """

    def __init__(
        self,
        schedule: Schedule
        | dict[int, float | Threshold]
        | Callable[[int], float | Threshold | None],
        *,
        criterion: Callable[[Scores, Mapping[str, Tensor]], Scores] | str = "taylor",
        target: Target = "probability",
        likelihood: Likelihood = "categorical",
        tolerance: float = 1e-3,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        parameters: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = as_schedule(schedule)
        self._criterion = resolve_criterion(criterion, seed=seed)
        self._options = ScoringOptions(target, likelihood, tolerance, forward)
        if isinstance(parameters, str):
            raise TypeError(f"Expected `parameters` to be a list of names, but got {parameters!r}.")
        self._names = None if parameters is None else list(parameters)
        self._keeper = MaskKeeper()
        self._scores: Scores = {}
        self._history: list[PruningRecord] = []
        self._pending: PendingEvent | None = None
        self._next_epoch = 0  # the targets of all earlier epochs are dealt with
        self._restored = False
        # Only while fitting:
        self._parameters: dict[str, nn.Parameter] = {}
        self._pass: ScoringPass | None = None
        self._batch_checked = False
        self._logged_epoch = -1
        self._prefix = "prune"

    # ------------------------------------------------------------------ what a user reads

    @property
    def masks(self) -> Masks:
        """The masks in force, by parameter name, ``True`` = kept; empty before the first event."""
        return self._keeper.masks

    @property
    def scores(self) -> Scores:
        """The scores by which the last event decided (the criterion's), by name, on the CPU."""
        return dict(self._scores)

    @property
    def sparsity(self) -> float:
        """The share of all prunable weights that is removed."""
        return sparsity(self.masks)

    @property
    def history(self) -> list[PruningRecord]:
        """One record for each pruning event, oldest first."""
        return [record.copy() for record in self._history]

    def report(self) -> str:
        """Return the events so far as a table to print."""
        return reporting.table(self._history)

    # ------------------------------------------------------------------ before the first step

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        preflight.refuse_trainer(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruners = [c for c in callbacks_of(trainer) if isinstance(c, SaliencyPruningCallback)]
        index = pruners.index(self)
        parameters, events = preflight.check_setup(
            trainer,
            pl_module,
            schedule=self.schedule,
            criterion=self._criterion,
            names=self._names,
            taken={name for other in pruners[:index] for name in other._parameters},
            held=pruning_state.held(self.masks, self._pending),
        )
        preflight.warn_if_cut_short(trainer, self.schedule)
        rank_zero_info(reporting.plan_line(self._criterion.name, parameters, events))
        self._batch_checked = not self._criterion.needs_scores or events == {}
        self._logged_epoch = -1
        self._prefix = "prune" if index == 0 else f"prune_{index + 1}"
        self._parameters = parameters
        self._keeper.attach(parameters, trainer.optimizers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restored:  # a new run: what an earlier one left undone is not made up for
            self._next_epoch = trainer.current_epoch
            self._pending = None
        if self._batch_checked:
            return
        preflight.refuse_empty_validation(trainer, self._criterion.name)
        batch = preflight.peek_batch(trainer)
        if batch is not None:
            self._check_batch(pl_module, batch)

    # ------------------------------------------------------------------ scoring

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            is_fitting(trainer)
            and self._criterion.needs_scores
            and is_last_validation(trainer)
            and self._target_due(trainer.current_epoch) is not None
        ):
            self._pass = ScoringPass(pl_module, list(self._parameters), self._options)

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
        if trainer.sanity_checking and not self._batch_checked:
            self._check_batch(pl_module, batch)
        if self._pass is not None:
            with refused_in(trainer.current_epoch):
                self._pass.add(batch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_fitting(trainer):
            return
        epoch = trainer.current_epoch
        if self._pass is not None and (target := self._target_due(epoch)) is not None:
            with refused_in(epoch):
                self._pass.add_generated(trainer, pl_module)
                result = self._pass.finish(trainer)
            if result is not None:
                self._pending = PendingEvent(epoch, target, **vars(result))
            self._end_pass()
        self._log(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if not self._criterion.needs_scores and (target := self._target_due(epoch)) is not None:
            self._pending = PendingEvent(epoch, target)
        if self._logged_epoch != epoch:  # no validation in this epoch
            self._log(trainer, pl_module)

    # ------------------------------------------------------------------ masks in force

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keeper.follow(trainer.optimizers)
        self._prune_after_epoch(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A run resumed between two epochs may come here without on_train_epoch_start.
        self._prune_after_epoch(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._keeper.zero_gradients()  # before they are clipped: they count in no norm

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = self._next_epoch if self._pending is None else self._pending.epoch + 1
        missed = planned_targets(self.schedule, range(start, trainer.current_epoch))
        if missed:
            rank_zero_warn(reporting.missed_line(missed))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pending is not None:
            self._prune(trainer, pl_module, self._pending)
            reporting.log_after_fit(trainer, self._metrics())
        if self._history:
            rank_zero_info(f"Pruning, event by event:\n{self.report()}")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def state_key(self) -> str:
        """Tell apart several pruners in one Trainer, which prune different parameters."""
        return self._generate_state_key(parameters=self._names)

    @override
    def state_dict(self) -> dict[str, Any]:
        return pruning_state.pack(self.masks, self._history, self._pending, self._next_epoch)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        masks, self._history, self._pending, self._next_epoch = pruning_state.unpack(state_dict)
        self._keeper.update(masks)
        self._scores = {}
        self._restored = True

    # ------------------------------------------------------------------ the work

    def _check_batch(self, pl_module: LightningModule, batch: Any) -> None:
        accumulator = self._options.accumulator(pl_module, list(self._parameters))
        preflight.check_batch(accumulator, pl_module, batch)
        self._batch_checked = True

    def _target_due(self, epoch: int) -> PruningTarget | None:
        """Return the target to reach after ``epoch``; also one whose own epoch was missed."""
        due = list(planned_targets(self.schedule, range(self._next_epoch, epoch + 1)).values())
        if not due:
            return None
        total = sum(parameter.numel() for parameter in self._parameters.values())
        if isinstance(due[-1], float) and round(due[-1] * total) < round(self.sparsity * total):
            self._next_epoch = epoch + 1
            rank_zero_info(reporting.already_line(epoch, due[-1], self.sparsity))
            return None
        return due[-1]

    def _prune_after_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pending is not None and self._pending.epoch < trainer.current_epoch:
            self._prune(trainer, pl_module, self._pending)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, event: PendingEvent) -> None:
        """Put the masks of an event in force. If anything is wrong the weights stay as they are."""
        start = time.perf_counter()
        before = self.masks
        raw = {n: score.to(self._parameters[n].device) for n, score in event.scores.items()}
        with refused_in(event.epoch):
            scores = self._criterion(raw, self._parameters)
            masks = keep_by_target(scores, event.target, masks=before)
        for source in batch_sources(trainer):
            source.before_pruning(trainer, pl_module)
        self._keeper.update(masks)
        self._scores = {name: score.cpu() for name, score in scores.items()}
        self._pending, self._next_epoch = None, event.epoch + 1
        seconds = time.perf_counter() - start
        record = make_record(event, scores, before=before, after=masks, seconds=seconds)
        self._history.append(record)
        rank_zero_info(reporting.event_line(record))
        emptied = [name for name, share in record["density"].items() if share == 0]
        if emptied:
            rank_zero_warn(f"Pruning has removed every weight of {emptied} in epoch {event.epoch}.")
        reporting.log_histograms(trainer, scores, before, self._prefix)

    def _metrics(self) -> dict[str, float]:
        return reporting.metrics(self._history, self._parameters, self._prefix)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reporting.log_metrics(trainer, pl_module, self._metrics())
        self._logged_epoch = trainer.current_epoch

    def _let_go(self) -> None:
        self._keeper.release()
        self._end_pass()
        self._parameters, self._restored = {}, False

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._pass.close()
            self._pass = None
