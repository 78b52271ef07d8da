"""What a schedule is, how a whole run is asked of it, and how it shows itself before the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune._targets import (
    Target,
    Threshold,
    as_target,
    count_faults,
    raise_faults,
    target_faults,
)
from lightning_prune.schedules.display import draw, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Schedule(ABC):
    """From an epoch to the target that is due in it, or ``None``."""

    @abstractmethod
    def __call__(self, epoch: int) -> Target | None:
        """Return the target due in ``epoch`` (counted from 0), ``None`` if there is none."""

    @property
    def last_epoch(self) -> int | None:
        """The last epoch with a target; ``None`` if the schedule does not know."""
        return None

    def table(self, epochs: int) -> str:
        """Return the events of a run as a table to print.

        Args:
            epochs: How many epochs the run has (or rounds of steps, if the pruner counts those).

        Raises:
            ValueError: ``epochs`` is not a whole number >= 1, or a target cannot be used.

        Example:
            >>> from lightning_prune.schedules import EpochSchedule
            >>> print(EpochSchedule({2: 0.5, 4: 0.8, 9: 0.9}).table(epochs=6))
            epoch |  target | note
                2 |  50.0 % | removes 50.0 % of all weights
                4 |  80.0 % | removes 30.0 % of all weights, 60.0 % of those left
            The schedule goes on to epoch 9; a run of 6 epochs ends after epoch 5.
        """
        return table_of(planned_targets(self, _run(epochs)), epochs, self.last_epoch)

    def plot(self, epochs: int, ax: Axes | None = None) -> Axes:
        """Draw the share removed over the epochs of a run; thresholds are marked.

        Args:
            epochs: How many epochs the run has.
            ax: Matplotlib axes to draw on; ``None`` makes new ones.

        Returns:
            The axes: ``ax.figure.savefig("schedule.png")`` writes the picture.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: ``epochs`` is not a whole number >= 1, or a target cannot be used.
        """
        return draw(planned_targets(self, _run(epochs)), epochs, ax)


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
        >>> planned_targets(CallableSchedule({1: 0.5, 4: 0.75}.get), range(10))
        {1: 0.5, 4: 0.75}
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


def _run(epochs: int) -> range:
    if faults := count_faults(epochs=epochs):
        raise ValueError(f"A run cannot be shown: {faults[0]}.")
    return range(epochs)
