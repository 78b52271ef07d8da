"""A target that falls due -> a decision -> masks in force.

Enters: a Trainer at some point of its fit, and what a scoring pass has found. Leaves: masks on the
model, a record of the event. The callback says when; what happens then is here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_prune._targets import Target
from lightning_prune._types import Scores
from lightning_prune.callbacks import fit_warnings, preflight, pruning_state
from lightning_prune.callbacks.averages import mask_averages
from lightning_prune.callbacks.batch_sources import batch_sources, callbacks_of
from lightning_prune.callbacks.clock import Clock
from lightning_prune.callbacks.event import Chooser, Chosen, tell
from lightning_prune.callbacks.plan import PruningPlan, make_plan
from lightning_prune.callbacks.pruning_state import PendingEvent, PruningState
from lightning_prune.callbacks.refitting import Refitter
from lightning_prune.callbacks.resumption import skipped_epoch_end, skipped_validation
from lightning_prune.callbacks.rewinding import Rewind
from lightning_prune.callbacks.scorer import Scorer
from lightning_prune.callbacks.scoring import ScoringResult, is_last_validation
from lightning_prune.callbacks.unreached import Unreached
from lightning_prune.masking import MaskKeeper, count_removed
from lightning_prune.refit import Refit
from lightning_prune.schedules import Schedule, planned_targets
from lightning_prune.selection import Criterion, Selection
from lightning_prune.selection.ranking import complete_masks


class Pruner:
    """Decide on events and carry them out.

    Args:
        schedule: When how much is pruned.
        clock: What the schedule counts.
        criterion: By what weights are ranked.
        selection: What is removed as one piece, and what is spared.
        scorer: Who scores the weights.
        rewind: What is gone back to at an event.
        refit: Which refit follows the removal, ``None`` for none.

    Attributes:
        keeper: Holds the masks in force.
        state: What a resumed run has to know; its masks are the keeper's.
        scores: The scores by which the last event decided, on the CPU.
        parameters: What is pruned, while fitting.
        prefix: What stands before the slash of logged names.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        clock: Clock,
        criterion: Criterion,
        selection: Selection,
        scorer: Scorer,
        rewind: Rewind | None,
        refit: Refit | None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.schedule = schedule
        self.clock = clock
        self.criterion = criterion
        self.selection = selection
        self.scorer = scorer
        self.rewind = rewind
        self.refitter = Refitter(scorer, refit)
        self.keeper = MaskKeeper(preflight.as_masks(masks))
        self.state = PruningState()
        self.scores: Scores = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.prefix = "prune"
        self._chooser = Chooser(criterion, selection, self.refitter)
        self._chosen: Chosen | None = None  # ahead of another pruner's rewind
        self._restored = False
        self._unreached = Unreached(schedule, clock, own_loader=scorer.loader is not None)
        self._left_at: int | None = None  # the step at which a fit was interrupted

    # ------------------------------------------------------------------ the course of a fit

    def set_up(
        self,
        trainer: Trainer,
        module: LightningModule,
        names: list[str] | None,
        exclude: list[str] | None,
        taken: Collection[str],
    ) -> None:
        """Check that all fits together, and put the masks there are in force.

        Raises:
            PruningSetupError: It does not; the message lists every fault.
        """
        parameters, events = preflight.check_setup(
            trainer,
            module,
            schedule=self.schedule,
            clock=self.clock,
            criterion=self.criterion,
            selection=self.selection,
            names=names,
            exclude=exclude,
            rewind=self.rewind,
            refit=self.refitter.method,
            own_loader=self.scorer.loader is not None,
            taken=taken,
            held=pruning_state.held(self.keeper.in_force, self.state.pending),
        )
        fit_warnings.warn_of_masks(self.schedule, self.selection, parameters, self.keeper.in_force)
        plan = self.plan(module, names, exclude, self.clock.total(trainer))
        fit_warnings.warn_of_layers(plan.left_out)
        rank_zero_info(f"{plan.summary(self.criterion.name)}\n{plan}")
        units = preflight.unnamed_units(self.selection, parameters, names)
        self.scorer.prepare(list(parameters), self.criterion, idle=events == {}, units=units)
        self.parameters = parameters
        if self.keeper.in_force:
            self.keeper.update(complete_masks(dict(parameters), self.keeper.in_force))
        self.keeper.attach(parameters, trainer.optimizers)
        mask_averages(trainer, self.keeper.in_force)

    def plan(
        self,
        module: nn.Module,
        names: list[str] | None,
        exclude: list[str] | None,
        counts: int | None = None,
    ) -> PruningPlan:
        """Return what a fit of so many epochs (or rounds) is going to prune."""
        held = pruning_state.held(self.keeper.in_force, self.state.pending)
        already, _ = count_removed(self.keeper.in_force)
        unit = self.clock.unit
        return make_plan(module, self.schedule, names, exclude, counts, already, unit, held)

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a new run, where what was left undone is not made up, or go on with one."""
        fit_warnings.warn_of_length(trainer, self.schedule, self.clock)
        self._unreached.look_ahead(trainer)
        if self._restored:
            self._make_up(trainer, module)
            if skipped_epoch_end(trainer) is not None:  # and the next one's start
                self._take_snapshot(trainer, module)
                self.prune_if_due(trainer, module)  # before anybody's first batch
        elif trainer.global_step != self._left_at:
            passed = self.clock.passed(trainer)
            self.state = PruningState(history=self.state.history, next_count=passed)
            self._unreached.look_back(trainer, self._whole_state)
        self._left_at = None

    def _make_up(self, trainer: Trainer, module: LightningModule) -> None:
        """Decide what the checkpoint does not know yet and Lightning does not come back to."""
        skipped = skipped_validation if self._by_validation else skipped_epoch_end
        epoch = skipped(trainer)
        if epoch is None:
            return
        if self.clock.steps is not None:
            if self.scores_in(trainer):
                self.state.latest = self.scorer.score_validation(trainer, module)
        elif self.state.pending is None and self.due(trainer, epoch) is not None:
            self._decide(trainer, self.scorer.score(trainer, module), epoch)

    def start_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Look after new optimizers, take the snapshot to go back to, prune if that is due."""
        self.keeper.follow(trainer.optimizers)
        self._take_snapshot(trainer, module)
        self.prune_if_due(trainer, module)

    def _take_snapshot(self, trainer: Trainer, module: LightningModule) -> None:
        if self.rewind is not None and trainer.current_epoch == self.rewind.epoch:
            self.state.snapshot = self.rewind.snapshot(trainer, module)

    def end(self, trainer: Trainer) -> None:
        """Warn of targets that have made no event."""
        self._unreached.end(trainer, self._whole_state)

    def interrupt(self, trainer: Trainer) -> None:
        """Leave nothing behind on the model; the same Trainer may go on from here."""
        self._left_at = trainer.global_step or None
        self.let_go()

    def let_go(self) -> None:
        """Leave nothing behind on the model; masks and history stay."""
        self.keeper.release()
        self.scorer.let_go()
        self.parameters, self._chosen, self._restored = {}, None, False

    # ------------------------------------------------------------------ decisions

    @property
    def _by_validation(self) -> bool:
        """Whether events wait for the scores of a validation."""
        return self.criterion.needs_scores and self.scorer.loader is None

    def scores_in(self, trainer: Trainer) -> bool:
        """Tell whether the validation that begins now is to be scored."""
        if not self._by_validation:
            return False
        if self.clock.steps is not None:
            last = self.schedule.last_epoch
            return last is None or self.state.next_count <= last
        return is_last_validation(trainer) and self.due(trainer) is not None

    def scored(self, trainer: Trainer, result: ScoringResult | None) -> None:
        """Take what a validation has found: decide by it, or keep it for the next round."""
        if self.clock.steps is None:
            self._decide(trainer, result)
        elif result is not None:
            self.state.latest = result

    def after_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Mend what no hook has seen; decide on an event where rounds of steps are counted."""
        if not (module.automatic_optimization and trainer.optimizers):
            # Stepped past Lightning's optimizers: by an inner one, or in a second step of its own.
            self.keeper.zero_weights()
        if self.clock.steps is not None and self.state.pending is None:
            self._decide_now(trainer, module)

    def after_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Decide on an event that needs no validation."""
        if self.clock.steps is None and not self._by_validation:
            self._decide_now(trainer, module)

    def due(self, trainer: Trainer, count: int | None = None) -> Target | None:
        """Return the target to reach now; also one whose own epoch or round was missed."""
        count = self.clock.latest(trainer) if count is None else count
        targets = planned_targets(self.schedule, range(self.state.next_count, count + 1))
        if not targets:
            return None
        target = list(targets.values())[-1]
        removed, total = count_removed(self.keeper.in_force)  # none of none before the first event
        if isinstance(target, float) and round(target * total) < removed:
            self._done(count)
            self._unreached.already(count, target, removed / total)
            return None
        return target

    def _decide_now(self, trainer: Trainer, module: LightningModule) -> None:
        if self.due(trainer) is not None:
            known = self._by_validation
            result = self.state.latest if known else self.scorer.score(trainer, module)
            self._decide(trainer, result)

    def _decide(
        self, trainer: Trainer, result: ScoringResult | None, epoch: int | None = None
    ) -> None:
        count = self.clock.latest(trainer) if epoch is None else epoch
        target = self.due(trainer, count)
        if result is not None and target is not None:
            epoch = trainer.current_epoch if epoch is None else epoch
            self.state.pending = PendingEvent(count, epoch, target, **vars(result))

    # ------------------------------------------------------------------ events

    def prune_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        """Carry out the event that waits, if its time has come."""
        if (event := self._event_now(trainer)) is not None:
            self.prune(trainer, module, event)

    def _event_now(self, trainer: Trainer) -> PendingEvent | None:
        event = self.state.pending
        return event if event and self.clock.in_force(event.epoch, trainer) else None

    def prune(
        self, trainer: Trainer, module: LightningModule, event: PendingEvent, *, last: bool = False
    ) -> None:
        """Put the masks of an event in force. If anything is wrong the weights stay as they are.

        Args:
            trainer: In a fit.
            module: The model.
            event: What was decided.
            last: The fit is over: nothing is gone back to.
        """
        chosen = self._choose(trainer, module, event)
        start = time.perf_counter()
        for source in batch_sources(trainer):
            source.before_pruning(trainer, module)
        if self.rewind is not None and not last:
            self._go_back(self.rewind, trainer, module)
        masks = chosen.selected.masks
        of_others = [other.keeper.in_force for other in self._others(trainer)]
        self.refitter.refit(trainer, module, self.parameters, masks, of_others)
        self.keeper.update(masks)
        mask_averages(trainer, masks)
        self.scores = {name: score.cpu() for name, score in chosen.scores.items()}
        self.state.pending = self._chosen = None
        self._done(event.count)
        record = chosen.record(trainer.global_step, time.perf_counter() - start)
        self.state.history.append(record)
        tell(trainer, chosen, record, self.prefix)

    def _choose(self, trainer: Trainer, module: LightningModule, event: PendingEvent) -> Chosen:
        if self._chosen is None:
            masks = self.keeper.in_force
            self._chosen = self._chooser(trainer, module, event, self.parameters, masks)
        return self._chosen

    def _go_back(self, rewind: Rewind, trainer: Trainer, module: LightningModule) -> None:
        """Rewind; what other pruners rank is what was trained, what they removed stays removed."""
        others = self._others(trainer)
        for other in others:
            if (event := other._event_now(trainer)) is not None:
                other._choose(trainer, module, event)
        rewind.restore(trainer, module, self.state.snapshot)
        for other in others:
            other.keeper.enforce()

    def _others(self, trainer: Trainer) -> list[Pruner]:
        found = (getattr(callback, "_pruner", None) for callback in callbacks_of(trainer))
        return [pruner for pruner in found if isinstance(pruner, Pruner) and pruner is not self]

    def _done(self, count: int) -> None:
        """Note that all targets up to ``count`` are dealt with; scores are kept for later ones."""
        self.state.next_count = count + 1
        last = self.schedule.last_epoch
        if last is not None and last <= count:
            self.state.latest = None

    # ------------------------------------------------------------------ checkpoints

    @property
    def _whole_state(self) -> PruningState:
        return replace(self.state, masks=self.keeper.in_force)

    def __getstate__(self) -> dict[str, Any]:
        # A copy (deepcopy, pickle) takes masks and history along, not the model's parameters.
        return {**self.__dict__, "parameters": {}, "_chosen": None}

    def pack(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {**self._whole_state.pack(), "scoring": self.scorer.pack()}

    def unpack(self, packed: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        state = PruningState.unpack(packed)
        self.keeper.update(state.masks)
        self.state = replace(state, masks={})
        self.scores = {}
        self.scorer.unpack(packed["scoring"])
        self._restored = True
