"""Targets that a user writes down: epoch by epoch, one, or as anything that can be a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_prune._targets import (
    Target,
    Threshold,
    as_target,
    count_faults,
    epoch_faults,
    is_epoch,
    raise_faults,
    target_faults,
)
from lightning_prune.schedules.schedule import CallableSchedule, Schedule


@dataclass(frozen=True)
class EpochSchedule(Schedule):
    """Targets written out epoch by epoch.

    Args:
        targets: Epoch (counted from 0) -> target. Shares must not decrease with the epoch, because
            a removed weight stays removed. Thresholds may: scores shrink as a network grows sure.
        epochs: The length of the fit that it is made for: one of another length is warned of. By
            default it is for any.
        reached: The share that the masks, which the pruner is given, are counted on to have removed
            before; a fit where they have not is warned of.

    Raises:
        TypeError: ``targets`` is not a mapping.
        ValueError: An epoch or a target cannot be used; the message lists every fault.

    Example:
        >>> schedule = EpochSchedule({2: 0.5, 4: 0.8})
        >>> [schedule(epoch) for epoch in range(6)]
        [None, None, 0.5, None, 0.8, None]
    """

    targets: dict[int, float | Threshold]
    epochs: int | None = field(default=None, repr=False)
    reached: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check every epoch and target, and put them in order."""
        if not isinstance(self.targets, Mapping):
            raise TypeError(
                f"Expected argument `targets` to be a mapping epoch -> target, such as "
                f"{{2: 0.5, 4: 0.8}}, but got {self.targets!r}."
            )
        faults = [
            f"epoch {epoch!r}: expected a whole number >= 0"
            for epoch in self.targets
            if not is_epoch(epoch)
        ]
        if self.epochs is not None:
            faults += count_faults(epochs=self.epochs)
        if self.reached is not None:
            faults += target_faults({"reached": self.reached})
        ordered = {int(e): self.targets[e] for e in sorted(filter(is_epoch, self.targets))}
        raise_faults(faults + target_faults(ordered))
        ordered = {epoch: as_target(target) for epoch, target in ordered.items()}
        object.__setattr__(self, "targets", ordered)

    def __call__(self, epoch: int) -> Target | None:
        """Return the target written down for ``epoch``."""
        return self.targets.get(epoch)

    @property
    def last_epoch(self) -> int | None:
        """The largest epoch written down; -1, before the first, for an empty schedule."""
        return max(self.targets, default=-1)


@dataclass(frozen=True)
class OneShotSchedule(Schedule):
    """One event: everything at once.

    Args:
        target: The share removed, in [0, 1), or a threshold.
        epoch: The epoch whose validation decides, counted from 0.

    Raises:
        ValueError: ``epoch`` is not a whole number >= 0, or ``target`` cannot be used.

    Example:
        >>> schedule = OneShotSchedule(0.9, epoch=3)
        >>> schedule(2), schedule(3), schedule(4)
        (None, 0.9, None)
    """

    target: float | Threshold
    epoch: int

    def __post_init__(self) -> None:
        """Check both arguments."""
        raise_faults(epoch_faults(epoch=self.epoch) + target_faults({"target": self.target}))

    def __call__(self, epoch: int) -> Target | None:
        """Return the target in its one epoch."""
        return self.target if epoch == self.epoch else None

    @property
    def last_epoch(self) -> int | None:
        """The epoch of the event."""
        return self.epoch


def as_schedule(
    schedule: Schedule | Mapping[int, Target] | Callable[[int], Target | None],
) -> Schedule:
    """Return a schedule for whatever a user may pass as one.

    Args:
        schedule: A :class:`Schedule`, a mapping epoch -> target, or a callable epoch -> target or
            ``None``.

    Raises:
        TypeError: It is none of them (also: a schedule's class in place of an instance).
        ValueError: A mapping with unusable epochs or targets.

    Example:
        >>> as_schedule({2: 0.5})
        EpochSchedule(targets={2: 0.5})
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Mapping):
        return EpochSchedule(dict(schedule))
    other: Any = schedule  # whatever the annotation promises, a user may have passed anything
    if callable(other) and not isinstance(other, type):
        return CallableSchedule(other)
    raise TypeError(
        "Expected argument `schedule` to be a mapping epoch -> target, such as {2: 0.5, 4: 0.8}, a "
        "callable epoch -> target or None, or one of the package's schedules, such as "
        f"CubicSchedule(0.9, start_epoch=2, end_epoch=8), but got {schedule!r}."
    )
