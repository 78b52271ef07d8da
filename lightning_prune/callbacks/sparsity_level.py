"""How sparse is the model that a metric was measured on, and is the pruning over?

Enters: a Trainer with pruners among its callbacks. Leaves: the answers that checkpointing and early
stopping need, where a metric of a denser model must not be held against a sparser one.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_prune._targets import Threshold, target_fault
from lightning_prune.callbacks.batch_sources import callbacks_of
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback, pruners_of
from lightning_prune.masking import count_removed

DIGITS = 4
"""Sparsities that agree to so many decimals are one level; file names show as many."""


def check_target(target: Any) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: It is neither ``None`` nor a share in [0, 1).
    """
    if target is not None and (isinstance(target, Threshold) or target_fault(target)):
        raise ValueError(
            "Expected argument `target` to be a share removed in [0, 1), or None for the last "
            f"target of the pruner's schedule, but got {target!r}."
        )


def check_pruners(trainer: Trainer, name: str, *, needs_end: bool, target: float | None) -> None:
    """Refuse a Trainer in which a callback cannot learn what it has to know.

    Args:
        trainer: About to fit.
        name: The callback's, for the message.
        needs_end: Whether it has to know when pruning is over.
        target: Its argument, which says that where a schedule does not.

    Raises:
        PruningSetupError: There is no pruner, or one whose schedule does not know its last epoch.
    """
    pruners = pruners_of(trainer)
    if not pruners:
        raise PruningSetupError(
            f"{name}: expected a SaliencyPruningCallback among the Trainer's callbacks, but got "
            f"{[type(c).__name__ for c in callbacks_of(trainer)]}. Add one, or use the class of "
            "Lightning's own that this one extends."
        )
    unknown = [p.schedule for p in pruners if p.schedule.last_epoch is None]
    if needs_end and target is None and unknown:
        raise PruningSetupError(
            f"{name}: expected a schedule that knows its last epoch, but got {unknown}. Say by "
            f"{name}(target=...) from which share removed on pruning is over."
        )


def sparsity_in_force(trainer: Trainer) -> float:
    """Return the share removed of all weights that the pruners of a Trainer prune.

    Masks come into force before a training step, so in the hooks after a validation this is the
    sparsity of the weights that were validated.
    """
    removed = total = 0
    for pruner in pruners_of(trainer):
        removed += count_removed(pruner._pruner.keeper.in_force)[0]
        total += sum(weight.numel() for weight in pruner._pruner.parameters.values())
    return removed / max(1, total)


def pruning_is_over(trainer: Trainer, target: float | None) -> bool:
    """Return whether the masks of the last target are in force, in every pruner of a Trainer.

    Args:
        trainer: While fitting.
        target: The share removed that counts as the last target; ``None`` asks the schedules.
    """
    return all(_is_over(pruner, target) for pruner in pruners_of(trainer))


def _is_over(callback: SaliencyPruningCallback, target: float | None) -> bool:
    if target is not None:
        # What was asked for counts as well: whole weights or groups may fall short of it a little.
        history = callback.history
        asked = history[-1]["target"] if history else 0.0
        removed, total = count_removed(callback._pruner.keeper.in_force)
        reached = total > 0 and removed >= round(target * total)
        return reached or (isinstance(asked, float) and asked >= target)
    last = callback.schedule.last_epoch
    return last is not None and callback._pruner.state.next_count > last


class MeasuredBefore:
    """Tell a metric that was measured on the weights of now from one that is older than an event.

    A metric stays in ``trainer.callback_metrics`` until it is logged again. Between an event and
    the next validation it belongs to a model that is no more.

    Args:
        monitor: The metric's name.
    """

    def __init__(self, monitor: str | None) -> None:
        self._monitor = monitor
        self._value: Tensor | None = None
        self._events: list[int] = []

    def note(self, trainer: Trainer) -> None:
        """Remember, at the end of a validation, what it measured and after which events."""
        value = trainer.callback_metrics.get(self._monitor or "")
        self._value = None if value is None else value.detach().clone()
        self._events = _events(trainer)

    def an_event(self, trainer: Trainer) -> bool:
        """Return whether the value of now is that of a validation before the last event.

        All processes give the same answer, and all have to ask.
        """
        value = trainer.callback_metrics.get(self._monitor or "")
        if value is None or self._value is None or self._events == _events(trainer):
            return False
        same = torch.equal(value, self._value.to(value.device))
        return trainer.strategy.reduce_boolean_decision(same, all=False)


def _events(trainer: Trainer) -> list[int]:
    return [len(pruner.history) for pruner in pruners_of(trainer)]
