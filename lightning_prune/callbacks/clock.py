"""What a schedule counts: epochs, or rounds of optimizer steps.

Enters: a Trainer somewhere in its fit. Leaves: the count a schedule is asked with. Everything else
in this room speaks of "the count" and does not care which of the two it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_prune._targets import count_faults
from lightning_prune.callbacks.batch_sources import callbacks_of


@dataclass(frozen=True)
class Clock:
    """Count epochs or, with ``steps``, rounds of so many optimizer steps, both from 0.

    Round r ends with optimizer step ``(r + 1) * steps``, as ``trainer.global_step`` counts them.

    Args:
        steps: The length of a round; ``None`` counts epochs.

    Raises:
        ValueError: ``steps`` is not a whole number >= 1.

    Example:
        >>> Clock().unit, Clock(100).unit
        ('epoch', 'round')
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        """Check the length of a round."""
        if self.steps is not None and (faults := count_faults(every_n_train_steps=self.steps)):
            raise ValueError(faults[0])

    @property
    def unit(self) -> str:
        """What is counted, for messages."""
        return "epoch" if self.steps is None else "round"

    def passed(self, trainer: Trainer) -> int:
        """Return how many epochs or rounds are over."""
        return trainer.current_epoch if self.steps is None else trainer.global_step // self.steps

    def latest(self, trainer: Trainer) -> int:
        """Return the count at which an event may fall due now.

        That is the running epoch (events wait for its validation), or the last complete round.
        """
        return trainer.current_epoch if self.steps is None else self.passed(trainer) - 1

    def total(self, trainer: Trainer) -> int | None:
        """Return how many epochs or rounds the fit will have, ``None`` if that is not known."""
        if self.steps is not None:
            return None if trainer.max_steps == -1 else trainer.max_steps // self.steps
        epochs = trainer.max_epochs
        limits = [None if epochs is None or epochs < 0 else epochs, _epochs_of_steps(trainer)]
        return min((limit for limit in limits if limit is not None), default=None)

    def in_force(self, event_epoch: int, trainer: Trainer) -> bool:
        """Tell, before a training step, whether the masks of a decided event are due.

        Those of an epoch wait for its end: checkpoints with its metrics hold the weights that they
        were measured on.
        """
        return self.steps is not None or event_epoch < trainer.current_epoch


def _epochs_of_steps(trainer: Trainer) -> int | None:
    """Return how many epochs ``max_steps`` allows, the last one in part; ``None`` if not known."""
    known = trainer.fit_loop._combined_loader is not None  # before, batches are an earlier fit's
    batches = trainer.num_training_batches if known else 0
    changing = getattr(trainer, "reload_dataloaders_every_n_epochs", 0) or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)
    )
    if trainer.max_steps == -1 or batches in (0, math.inf) or changing:
        return None
    if not trainer.lightning_module.automatic_optimization:
        return None
    steps = math.ceil(batches / trainer.accumulate_grad_batches)
    return max(1, math.ceil(trainer.max_steps / steps))
