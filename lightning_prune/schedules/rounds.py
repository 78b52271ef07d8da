"""Round after round the same share of what is still there, as the lottery ticket's authors do."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune._targets import (
    Target,
    Threshold,
    count_faults,
    epoch_faults,
    raise_faults,
    target_fault,
)
from lightning_prune.schedules.schedule import Schedule


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
