"""Targets that make no event, and what is said of them.

Enters: a schedule, and where a fit begins, has been or ends. Leaves: warnings. A schedule that is
not carried out in full without a word would be taken for one that is.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_prune._targets import Target, describe_target
from lightning_prune.callbacks.clock import Clock
from lightning_prune.callbacks.pruning_state import PruningState
from lightning_prune.masking import count_removed
from lightning_prune.schedules import Schedule, planned_targets


class Unreached:
    """Say of targets, at the start and at the end of a fit, that they are not reached.

    Args:
        schedule: When how much.
        clock: What the schedule counts.
        own_loader: Whether weights are scored on a loader of their own.
    """

    def __init__(self, schedule: Schedule, clock: Clock, *, own_loader: bool = False) -> None:
        self._why = "no validation has run" if not own_loader else "scoring_loader had no batch"
        self.schedule = schedule
        self.clock = clock
        self._told: int | None = None  # from this count on it has been said

    def look_ahead(self, trainer: Trainer) -> None:
        """Warn if the fit that starts now is going to end before the schedule does."""
        self._told = None
        last, total, unit = self.schedule.last_epoch, self.clock.total(trainer), self.clock.unit
        if last is None or total is None or _is_trial(trainer) or not 0 < total <= last:
            return
        self._told = total
        by_epochs = unit == "epoch" and total == trainer.max_epochs
        limit = f"max_epochs={total}" if by_epochs else f"max_steps={trainer.max_steps}"
        rank_zero_warn(
            f"The pruning schedule has targets up to {unit} {last}, but the fit ends after {unit} "
            f"{total - 1} ({limit}): the last targets will not be reached."
        )

    def look_back(self, trainer: Trainer, state: PruningState) -> None:
        """Warn if the run that starts now begins behind targets that were never reached.

        Args:
            trainer: Of the fit.
            state: With the masks in force.
        """
        passed, unit = self.clock.passed(trainer), self.clock.unit
        left = planned_targets(self.schedule, range(passed))
        if not left or _reached(list(left.values())[-1], state):
            return
        origin = (
            "from a checkpoint without a state of this pruner"
            if trainer.ckpt_path
            else "where its Trainer has come to before"
        )
        rank_zero_warn(
            f"The run goes on at {unit} {passed}, {origin}: the targets of the {unit}s "
            f"{list(left)} are past and left out. Give them later {unit}s."
        )

    def already(self, count: int, target: Target, sparsity: float) -> None:
        """Say that a target makes no event, as so much is removed already."""
        rank_zero_info(
            f"{self.clock.unit.capitalize()} {count}: nothing to prune, {describe_target(target)} "
            f"is asked for and {100 * sparsity:.1f} % are removed already."
        )

    def end(self, trainer: Trainer, state: PruningState) -> None:
        """Warn of what has made no event when a fit has ended, and was not said before.

        Args:
            trainer: Of the fit.
            state: With the masks in force. An event that waits there is still carried out.
        """
        unit, passed, last = self.clock.unit, self.clock.passed(trainer), self.schedule.last_epoch
        start = state.next_count if state.pending is None else state.pending.count + 1
        if missed := list(planned_targets(self.schedule, range(start, passed))):
            rank_zero_warn(
                f"The pruning targets of {unit}s {missed} were not reached: {self._why} "
                f"in these {unit}s, nor after them, to score the weights in."
            )
        stops = [self.clock.total(trainer) if last is None else last + 1, self._told]
        stop = min((stop for stop in stops if stop is not None), default=0)
        targets = planned_targets(self.schedule, range(max(start, passed), stop))
        left = [count for count, target in targets.items() if not _reached(target, state)]
        if left and not _is_trial(trainer):
            rank_zero_warn(
                f"The fit ended in epoch {max(0, trainer.current_epoch - 1)}, before the pruning "
                f"schedule did: the targets of {unit}s {_shown(left)} were not reached. Give them "
                f"earlier {unit}s, or let the fit go on: SparsityEarlyStopping, in the place of "
                "EarlyStopping, waits for the schedule."
            )


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _reached(target: Target, state: PruningState) -> bool:
    """Tell whether a target has nothing left to do, as far as that can be known."""
    removed, total = count_removed(state.masks)
    asked = [record["target"] for record in state.history]
    asked += [state.pending.target] if state.pending is not None else []
    if not isinstance(target, float):
        return target in asked
    shares = [share for share in asked if isinstance(share, float)]
    # Whole units come near a share, and need not come up to it.
    done = total > 0 and round(target * total) <= removed
    return done or (bool(shares) and target <= shares[-1])


def _shown(counts: Iterable[int]) -> str:
    counts = list(counts)
    shown = [*counts[:3], "...", *counts[-2:]] if len(counts) > 8 else counts
    return f"[{', '.join(map(str, shown))}]"
