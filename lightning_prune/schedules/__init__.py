"""When is how much pruned? From an epoch to a target.

A schedule is a function from ``trainer.current_epoch`` (counted from 0) to a target, or to ``None``
where nothing is due. A target is the share of all prunable weights that is removed *by then* (not
the share of those still there), or a :class:`~lightning_prune.Threshold`. A schedule has no memory:
the same epoch gives the same answer, which is what makes an interrupted run resumable.
"""

from __future__ import annotations

from lightning_prune.schedules.explicit import EpochSchedule, OneShotSchedule, as_schedule
from lightning_prune.schedules.ramps import CubicSchedule, ExponentialSchedule, LinearSchedule
from lightning_prune.schedules.rounds import ConstantRateSchedule
from lightning_prune.schedules.schedule import CallableSchedule, Schedule, planned_targets

__all__ = [
    "CallableSchedule",
    "ConstantRateSchedule",
    "CubicSchedule",
    "EpochSchedule",
    "ExponentialSchedule",
    "LinearSchedule",
    "OneShotSchedule",
    "Schedule",
    "as_schedule",
    "planned_targets",
]
