"""When is how much pruned? From an epoch to a target.

A schedule is a function from ``trainer.current_epoch`` (counted from 0) to a target, or to ``None``
where nothing is due. A target is the share of all prunable weights that is removed *by then* (not
the share of those still there), or a :class:`~lightning_prune.Threshold`. A schedule has no memory:
the same epoch gives the same answer, which is what makes an interrupted run resumable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_prune._targets import (
    Target,
    Threshold,
    as_target,
    count_faults,
    epoch_faults,
    is_epoch,
    raise_faults,
    target_fault,
    target_faults,
)


class Schedule(ABC):
    """From an epoch to the target that is due in it, or ``None``."""

    @abstractmethod
    def __call__(self, epoch: int) -> Target | None:
        """Return the target due in ``epoch`` (counted from 0), ``None`` if there is none."""

    @property
    def last_epoch(self) -> int | None:
        """The last epoch with a target; ``None`` if the schedule does not know."""
        return None


@dataclass(frozen=True)
class EpochSchedule(Schedule):
    """Targets written out epoch by epoch.

    Args:
        targets: Epoch (counted from 0) -> target. Shares must not decrease with the epoch, because
            a removed weight stays removed. Thresholds may: scores shrink as a network grows sure.

    Raises:
        TypeError: ``targets`` is not a mapping.
        ValueError: An epoch or a target cannot be used; the message lists every fault.

    Example:
        >>> schedule = EpochSchedule({2: 0.5, 4: 0.8})
        >>> [schedule(epoch) for epoch in range(6)]
        [None, None, 0.5, None, 0.8, None]
    """

    targets: dict[int, float | Threshold]

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
        ordered = {int(e): self.targets[e] for e in sorted(filter(is_epoch, self.targets))}
        raise_faults(faults + target_faults(ordered))
        ordered = {epoch: as_target(target) for epoch, target in ordered.items()}
        object.__setattr__(self, "targets", ordered)

    def __call__(self, epoch: int) -> Target | None:
        """Return the target written down for ``epoch``."""
        return self.targets.get(epoch)

    @property
    def last_epoch(self) -> int | None:
        """The largest epoch written down; ``None`` for an empty schedule."""
        return max(self.targets, default=None)


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


@dataclass(frozen=True)
class _RampSchedule(Schedule):
    """From ``initial_sparsity`` to ``sparsity`` along ``1 - (1 - progress)^power``."""

    sparsity: float
    start_epoch: int
    end_epoch: int
    every_n_epochs: int = 1
    initial_sparsity: float = 0.0

    _power: ClassVar[int]

    def __post_init__(self) -> None:
        """Check all arguments and report every fault at once."""
        faults = epoch_faults(start_epoch=self.start_epoch, end_epoch=self.end_epoch)
        if not faults and self.start_epoch > self.end_epoch:
            faults.append(
                f"end_epoch: expected an epoch >= start_epoch={self.start_epoch}, but got "
                f"{self.end_epoch}"
            )
        faults += count_faults(every_n_epochs=self.every_n_epochs)
        ends = {"initial_sparsity": self.initial_sparsity, "sparsity": self.sparsity}
        faults += [
            f"{k}: shares only, but got {t!r}" for k, t in ends.items() if isinstance(t, Threshold)
        ]
        raise_faults(faults + target_faults(ends))

    def __call__(self, epoch: int) -> Target | None:
        """Return the share due in ``epoch``; ``None`` between events and while it is 0."""
        if not self.start_epoch <= epoch <= self.end_epoch:
            return None
        if epoch == self.end_epoch:
            return self.sparsity or None
        if (epoch - self.start_epoch) % self.every_n_epochs:
            return None
        progress = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        distance = self.initial_sparsity - self.sparsity
        return self.sparsity + distance * (1 - progress) ** self._power or None

    @property
    def last_epoch(self) -> int | None:
        """The epoch in which the final share is reached."""
        return self.end_epoch


@dataclass(frozen=True)
class LinearSchedule(_RampSchedule):
    """The same share of all weights at every event, up to ``sparsity``.

    ``s(e) = s_0 + (s_1 - s_0) * (e - start) / (end - start)``. Arguments, events and errors are
    those of :class:`CubicSchedule`.

    Example:
        >>> schedule = LinearSchedule(0.8, start_epoch=1, end_epoch=5, every_n_epochs=2)
        >>> [schedule(epoch) for epoch in range(7)]
        [None, None, None, 0.4, None, 0.8, None]
    """

    _power = 1


@dataclass(frozen=True)
class CubicSchedule(_RampSchedule):
    """Fast at first, when there are many weights to spare, and slow at the end.

    ``s(e) = s_1 + (s_0 - s_1) * (1 - (e - start) / (end - start))^3`` at the epochs ``start``,
    ``start + every_n_epochs``, ..., and always at ``end``. While ``s(e)`` is 0 there is nothing to
    do and the answer is ``None``.

    Args:
        sparsity: ``s_1``, the share removed at the end, in [0, 1).
        start_epoch: Where the ramp starts, counted from 0.
        end_epoch: Where it ends, >= ``start_epoch``.
        every_n_epochs: Epochs from one event to the next, >= 1.
        initial_sparsity: ``s_0``, the share removed at the start, <= ``sparsity``.

    Raises:
        ValueError: An argument is out of its range; the message lists every fault.

    Example:
        >>> schedule = CubicSchedule(0.8, start_epoch=0, end_epoch=4)
        >>> [schedule(epoch) and round(schedule(epoch), 4) for epoch in range(6)]
        [None, 0.4625, 0.7, 0.7875, 0.8, None]

    Source: Zhu and Gupta, 2017, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression".
    """

    _power = 3


@dataclass(frozen=True)
class ConstantRateSchedule(Schedule):
    """Every round removes the same share of the weights *still there*.

    ``s = 1 - (1 - rate)^k`` after the k-th round; the rounds are at ``start_epoch``,
    ``start_epoch + every_n_epochs``, ... In between the network trains on.

    Args:
        rate: The share of the surviving weights that a round removes, in (0, 1); 0.2 is usual.
        rounds: The number of rounds, >= 1.
        start_epoch: The epoch of the first round, counted from 0.
        every_n_epochs: Epochs from one round to the next, >= 1.

    Raises:
        ValueError: An argument is out of its range; the message lists every fault.

    Example:
        >>> schedule = ConstantRateSchedule(0.2, rounds=3, start_epoch=1, every_n_epochs=2)
        >>> [schedule(epoch) and round(schedule(epoch), 3) for epoch in range(7)]
        [None, 0.2, None, 0.36, None, 0.488, None]

    Source: Renda, Frankle and Carbin, 2020, "Comparing rewinding and fine-tuning in neural network
    pruning".
    """

    rate: float
    rounds: int
    start_epoch: int = 0
    every_n_epochs: int = 1

    def __post_init__(self) -> None:
        """Check all arguments and report every fault at once."""
        faults = epoch_faults(start_epoch=self.start_epoch)
        faults += count_faults(rounds=self.rounds, every_n_epochs=self.every_n_epochs)
        if isinstance(self.rate, Threshold) or target_fault(self.rate) or self.rate == 0:
            faults.append(f"rate: expected a share in (0, 1), but got {self.rate!r}")
        raise_faults(faults)

    def __call__(self, epoch: int) -> Target | None:
        """Return the share removed in all once the round of ``epoch`` is done."""
        rounds_before, rest = divmod(epoch - self.start_epoch, self.every_n_epochs)
        if rest or not 0 <= rounds_before < self.rounds:
            return None
        return float(1 - (1 - self.rate) ** (rounds_before + 1))

    @property
    def last_epoch(self) -> int | None:
        """The epoch of the last round."""
        return self.start_epoch + (self.rounds - 1) * self.every_n_epochs


@dataclass(frozen=True)
class CallableSchedule(Schedule):
    """A schedule out of a function of the user's, checked each time it is called.

    Args:
        function: From an epoch to a target or ``None``. It must give the same answer for the same
            epoch: it is asked before the fit, and again after a resume.

    Example:
        >>> schedule = CallableSchedule(lambda epoch: 0.1 * epoch if epoch % 2 == 0 else None)
        >>> schedule(2), schedule(3)
        (0.2, None)
    """

    function: Callable[[int], float | Threshold | None]

    def __call__(self, epoch: int) -> Target | None:
        """Return the function's answer.

        Raises:
            ValueError: The answer is neither ``None`` nor a target.
        """
        return planned_targets(self, range(epoch, epoch + 1)).get(epoch)


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


def planned_targets(schedule: Schedule, epochs: range) -> dict[int, Target]:
    """Ask a schedule for every epoch of a run before the run.

    Args:
        schedule: Any schedule, also one of a user's own class.
        epochs: The epochs of the run.

    Returns:
        The epochs with a target, in order.

    Raises:
        ValueError: A target cannot be used or a share decreases; the message lists every fault.

    Example:
        >>> planned_targets(ConstantRateSchedule(0.5, rounds=2), range(10))
        {0: 0.5, 1: 0.75}
        >>> planned_targets(CallableSchedule(lambda epoch: 0.5 - 0.1 * epoch), range(2))
        Traceback (most recent call last):
            ...
        ValueError: The schedule cannot be used:
        - epoch 1: shares must not decrease (a removed weight stays removed), but 0.4 follows 0.5
    """
    answers = schedule.function if isinstance(schedule, CallableSchedule) else schedule
    planned = {epoch: target for epoch in epochs if (target := answers(epoch)) is not None}
    raise_faults(target_faults(planned))
    return {epoch: as_target(target) for epoch, target in planned.items()}
