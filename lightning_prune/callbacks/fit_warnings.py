"""What a fit may well be meant to do, but is mostly a mistake: said once, before the first step.

Enters: a Trainer about to fit, a schedule, the weights and the masks in force. Leaves: warnings.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune._types import Masks
from lightning_prune.callbacks.clock import Clock
from lightning_prune.schedules import EpochSchedule, Schedule

MANY = 0.25
"""From this share on zeros are no accident, and most likely those of an earlier pruning."""


def warn(
    trainer: Trainer,
    schedule: Schedule,
    clock: Clock,
    parameters: Mapping[str, Tensor],
    masks: Masks,
) -> None:
    """Warn of a fit of another length than planned, and of zeros without masks.

    Args:
        trainer: About to fit.
        schedule: When how much is pruned.
        clock: What the schedule counts.
        parameters: What is pruned, by name.
        masks: Those in force, from the arguments, an earlier fit or a checkpoint.
    """
    _warn_of_length(trainer, schedule, clock)
    if (share := unheld_zeros(parameters, masks)) >= MANY:
        rank_zero_warn(
            f"{100 * share:.1f} % of the weights to prune are exactly 0, but no mask holds them: "
            "they will grow back as soon as the training touches them. If the network was pruned "
            "before, give the pruner (or the recipe) what prune() has returned, or an earlier "
            "pruner's `.masks`, as `masks=`."
        )


def _warn_of_length(trainer: Trainer, schedule: Schedule, clock: Clock) -> None:
    last, total, unit = schedule.last_epoch, clock.total(trainer), clock.unit
    if total is None or getattr(trainer, "fast_dev_run", False):
        return
    made_for = schedule.epochs if isinstance(schedule, EpochSchedule) else None
    limit = f"max_epochs={total}" if clock.steps is None else f"max_steps={trainer.max_steps}"
    cut_short = last is not None and total <= last  # which others say
    if made_for not in (None, total) and total > 0 and not cut_short:
        rank_zero_warn(
            f"The pruning schedule was made for {made_for} {unit}s, but the fit has {total} "
            f"({limit}): pruning, and what a recipe does after it, take other shares of the fit "
            f"than planned. Give the recipe epochs={total}, or the Trainer max_epochs={made_for}."
        )


def unheld_zeros(parameters: Mapping[str, Tensor], masks: Masks) -> float:
    """Return the share of all trained weights that are exactly 0 although no mask removes them.

    Parameters that are 0 as a whole do not count: some are made so (LoRA, the last layer of a
    residual branch). Nor do frozen ones, whose zeros stay.

    Args:
        parameters: By name.
        masks: ``True`` = kept; a parameter without one is complete.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[0.0, 0.0, 1.0, 2.0]]))
        >>> unheld_zeros({"w": weight, "lora_B": torch.nn.Parameter(torch.zeros(2, 2))}, {})
        0.25
        >>> unheld_zeros({"w": weight}, {"w": weight != 0})
        0.0
    """
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    zeros = {name: value == 0 for name, value in trained.items()}
    unheld = sum(
        int((zero & masks[name].to(zero.device)).sum() if name in masks else zero.sum())
        for name, zero in zeros.items()
        if not bool(zero.all())
    )
    return unheld / max(1, sum(zero.numel() for zero in zeros.values()))
