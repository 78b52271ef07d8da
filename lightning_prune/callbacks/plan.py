"""The plan before the work: which parameters are pruned, which not and why, how many weights when.

Enters: a model, a schedule, the names a user gave. Leaves: numbers, and a table of them. Needs no
Trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_prune._lines import by_reason
from lightning_prune._targets import Target, Threshold, count_faults, describe_target
from lightning_prune.masking import find_prunable
from lightning_prune.schedules import Schedule, planned_targets


class PlannedEvent(NamedTuple):
    """One event to come.

    Attributes:
        epoch: Whose target it is, counted from 0.
        target: What will be asked for.
        removed_by_then: How many weights will be removed in all, ``None`` if the scores decide.
        newly_removed: How many of them by this event, ``None`` if the scores decide.
    """

    epoch: int
    target: Target
    removed_by_then: int | None
    newly_removed: int | None


@dataclass(frozen=True)
class PruningPlan:
    """What a fit is going to prune; ``print(plan)`` shows it as a table.

    The numbers of weights are exact where single weights are removed. Where whole structures or N:M
    groups are, an event removes the nearest number that such pieces allow.

    Attributes:
        parameters: Name -> number of weights, of what is pruned.
        left_out: Name -> why the parameter is not pruned.
        events: The events of the run; ``None`` if neither the run nor the schedule has a known end.
        total: The number of prunable weights.
        already: How many of them are removed before the first of the events.
        unit: What the events' epochs count: ``"epoch"``, or ``"round"`` of steps.
    """

    parameters: dict[str, int]
    left_out: dict[str, str]
    events: tuple[PlannedEvent, ...] | None
    total: int
    already: int = 0
    unit: str = "epoch"

    def summary(self, criterion: str | None = None) -> str:
        """Return the plan as a sentence; ``criterion`` is what weights are ranked by.

        Example:
            >>> from lightning_prune.schedules import EpochSchedule
            >>> schedule = EpochSchedule({2: 0.5, 4: 0.8})
            >>> make_plan(nn.Linear(10, 100), schedule, epochs=6).summary()
            'Pruning 1 parameter with 1,000 weights: epoch 2: 50.0 % (500), epoch 4: 80.0 % (800).'
        """
        plural = "" if len(self.parameters) == 1 else "s"
        head = f"Pruning {len(self.parameters)} parameter{plural} with {self.total:,} weights"
        head += "" if criterion is None else f" by {criterion!r}"
        if self.events is None:
            return f"{head}: when the schedule says so."
        when = [
            f"{self.unit} {event.epoch}: {describe_target(event.target)}"
            + ("" if event.removed_by_then is None else f" ({event.removed_by_then:,})")
            for event in self.events
        ]
        shown = when if len(when) <= 8 else [*when[:4], "...", *when[-2:]]
        return f"{head}: {', '.join(shown) or 'no event in this fit'}."

    def __str__(self) -> str:
        """Return the plan as a table for a terminal."""
        width = max(map(len, self.parameters))
        plural = "" if len(self.parameters) == 1 else "s"
        lines = [f"Pruned: {len(self.parameters)} parameter{plural} with {self.total:,} weights"]
        lines += [f"  {name:<{width}}  {size:>13,}" for name, size in self.parameters.items()]
        lines += ["Left out:"] * bool(self.left_out)
        lines += [f"  {line}" for line in by_reason(self.left_out)]
        if self.already:
            lines.append(f"Removed already: {self.already:,}")
        if self.events is None:
            return "\n".join([*lines, "Events: when the schedule says so"])
        if not self.events:
            return "\n".join([*lines, "Events: none in this run"])
        lines.append(
            f"{self.unit:>7}{'target':>11}{'removes':>13}{'removed by then':>17}{'left':>13}"
        )
        return "\n".join([*lines, *map(self._row, self.events)])

    def _row(self, event: PlannedEvent) -> str:
        cells = ["by scores"] * 3
        if event.removed_by_then is not None and event.newly_removed is not None:
            left = self.total - event.removed_by_then
            cells = [f"{n:,}" for n in (event.newly_removed, event.removed_by_then, left)]
        return (
            f"{event.epoch:>7}{describe_target(event.target):>11}"
            f"{cells[0]:>13}{cells[1]:>17}{cells[2]:>13}"
        )


def make_plan(
    module: nn.Module,
    schedule: Schedule,
    names: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    epochs: int | None = None,
    already: int = 0,
    unit: str = "epoch",
    held: Iterable[str] = (),
) -> PruningPlan:
    """Return what a run would prune; the module is only looked at.

    Args:
        module: The model.
        schedule: When how much.
        names: Names or patterns of what is pruned, ``None`` for the weights of all layers.
        exclude: Names or patterns of what is not.
        epochs: How many epochs (or rounds) the run has; ``None`` shows the whole schedule.
        already: How many weights are removed before the first event, >= 0.
        unit: What the schedule counts, for the table.
        held: Names of parameters that have masks already.

    Raises:
        TypeError: ``names`` or ``exclude`` is a single string.
        ValueError: They fit nothing in the module, nothing can be pruned, a target cannot be used,
            or ``epochs`` is not a whole number >= 1.

    Example:
        >>> from lightning_prune.schedules import EpochSchedule
        >>> model = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Linear(24, 10))
        >>> schedule = EpochSchedule({2: 0.5, 4: 0.8})
        >>> print(make_plan(model, schedule, exclude=["2.weight"], epochs=6))
        Pruned: 1 parameter with 1,536 weights
          0.weight          1,536
        Left out:
          a bias: 0.bias, 1.bias, 2.bias
          part of a BatchNorm1d: 1.weight
          excluded by '2.weight': 2.weight
          epoch     target      removes  removed by then         left
              2     50.0 %          768              768          768
              4     80.0 %          461            1,229          307
    """
    if epochs is not None and (faults := count_faults(epochs=epochs)):
        raise ValueError(f"A run cannot be planned: {faults[0]}.")
    prunable = find_prunable(module, names, exclude=exclude, held=held)
    sizes = {name: parameter.numel() for name, parameter in prunable.parameters.items()}
    total = sum(sizes.values())
    if epochs is None and schedule.last_epoch is not None:
        epochs = schedule.last_epoch + 1
    # A schedule without an event has no last epoch, and a function's is not known.
    events = None
    if epochs is not None:
        events = _count(planned_targets(schedule, range(epochs)), total, already)
    return PruningPlan(sizes, prunable.left_out, events, total, already, unit)


def _count(targets: Mapping[int, Target], total: int, already: int) -> tuple[PlannedEvent, ...]:
    """Say how many weights each event removes: what is removed stays removed."""
    events = []
    removed: int | None = already
    for epoch, target in targets.items():
        if isinstance(target, Threshold) or removed is None:
            # Nor is it known after a threshold: it may have removed more than the next share.
            removed = None
            events.append(PlannedEvent(epoch, target, None, None))
            continue
        by_then = max(round(target * total), removed)
        events.append(PlannedEvent(epoch, target, by_then, by_then - removed))
        removed = by_then
    return tuple(events)
