"""From one share to another, a little at every event: linear, cubic, exponential."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from lightning_prune._targets import (
    Target,
    Threshold,
    count_faults,
    epoch_faults,
    raise_faults,
    target_faults,
)
from lightning_prune.schedules.schedule import Schedule


@dataclass(frozen=True)
class _RampSchedule(Schedule):
    """From ``initial_sparsity`` to ``sparsity`` between two epochs, along a curve of its own."""

    sparsity: float
    start_epoch: int
    end_epoch: int
    every_n_epochs: int = 1
    initial_sparsity: float = 0.0

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
        return self._share(progress) or None

    @abstractmethod
    def _share(self, progress: float) -> float:
        """Return the share removed at ``progress``, in [0, 1), from start to end."""

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

    def _share(self, progress: float) -> float:
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - progress)


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

    def _share(self, progress: float) -> float:
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - progress) ** 3


@dataclass(frozen=True)
class ExponentialSchedule(_RampSchedule):
    """The share *kept* falls by the same factor at every event, and reaches the end exactly.

    ``s(e) = 1 - (1 - s_0) * ((1 - s_1) / (1 - s_0))^((e - start) / (end - start))``. Every event
    removes the same share of the weights still there, as :class:`ConstantRateSchedule` does; there
    the rate is given and the end follows, here the end is given and the rate follows. Arguments,
    events and errors are those of :class:`CubicSchedule`; the factor is the same at every event if
    ``every_n_epochs`` divides the ramp.

    Example:
        >>> schedule = ExponentialSchedule(0.875, start_epoch=0, end_epoch=3)
        >>> [schedule(epoch) and round(schedule(epoch), 4) for epoch in range(5)]
        [None, 0.5, 0.75, 0.875, None]
    """

    def _share(self, progress: float) -> float:
        kept = 1 - self.initial_sparsity
        # By expm1 and log1p, as 1 - kept * factor^progress loses digits in a shallow ramp; and
        # rounding must not carry a share past the last one, which would then be a step back.
        rate = math.log1p((self.initial_sparsity - self.sparsity) / kept)
        return min(self.sparsity, self.initial_sparsity - kept * math.expm1(progress * rate))
