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
from lightning_prune.masking import layers_left_out, sparsity
from lightning_prune.schedules import EpochSchedule, Schedule
from lightning_prune.selection import Selection
from lightning_prune.selection.ranking import complete_masks

MANY = 0.25
"""From this share on zeros are no accident, and most likely those of an earlier pruning."""


def warn_of_masks(
    schedule: Schedule, selection: Selection, parameters: Mapping[str, Tensor], masks: Masks
) -> None:
    """Warn of zeros without masks, and of masks that are less than the schedule counts on.

    Args:
        schedule: When how much is pruned.
        selection: In which pieces.
        parameters: What is pruned, by name.
        masks: Those in force, from the arguments, an earlier fit or a checkpoint.
    """
    if (share := unheld_zeros(parameters, masks)) >= MANY:
        rank_zero_warn(
            f"{100 * share:.1f} % of the weights to prune are exactly 0, but no mask holds them: "
            "they will grow back as soon as the training touches them. If the network was pruned "
            "before, give the pruner (or the recipe) what prune() has returned, or an earlier "
            "pruner's `.masks`, as `masks=`. If they are meant to be trained, ignore this."
        )
    reached = schedule.reached if isinstance(schedule, EpochSchedule) else None
    if reached is None:
        return
    whole = complete_masks(dict(parameters), masks)
    if not selection.reaches(whole, reached):
        missing = [name for name in parameters if name not in masks]
        rank_zero_warn(
            f"The recipe has no pruning stages, because the masks that it was given remove "
            f"{100 * reached:g} % of their weights or more, but of all weights to prune it is "
            f"{100 * sparsity(whole):.1f} %, and so it stays"
            + (
                f": {missing} have no masks. Give masks for them too, all True where nothing is "
                "removed yet, and there are stages; or leave these parameters out by `exclude=`."
                if missing
                else ". Give it the masks that are in force, or none."
            )
        )


def warn_of_layers(left_out: Mapping[str, str]) -> None:
    """Warn of layers that stay as they are though nobody has excluded them.

    Args:
        left_out: Name -> why a parameter is not pruned.
    """
    if (text := layers_left_out(left_out)) is not None:
        rank_zero_warn(text)


def warn_of_length(trainer: Trainer, schedule: Schedule, clock: Clock) -> None:
    """Warn of a fit of another length than planned.

    Args:
        trainer: Whose loaders are set up, so that steps can be counted in epochs.
        schedule: When how much is pruned.
        clock: What the schedule counts.
    """
    last, total, unit = schedule.last_epoch, clock.total(trainer), clock.unit
    made_for = schedule.epochs if isinstance(schedule, EpochSchedule) else None
    if made_for in (None, total) or not total or getattr(trainer, "fast_dev_run", False):
        return
    if last is not None and total <= last:  # which others say
        return
    by_epochs = clock.steps is None and total == trainer.max_epochs
    limit = f"max_epochs={total}" if by_epochs else f"max_steps={trainer.max_steps}"
    fewer = by_epochs or total > made_for
    rank_zero_warn(
        f"The pruning schedule was made for {made_for} {unit}s, but the fit has {total} "
        f"({limit}): pruning, and what a recipe does after it, take other shares of the fit "
        f"than planned. Give the recipe epochs={total}, or the Trainer "
        f"{f'max_epochs={made_for}' if fewer else 'more max_steps'}."
    )


def unheld_zeros(parameters: Mapping[str, Tensor], masks: Masks) -> float:
    """Return the share of all trained weights that are exactly 0 although no mask removes them.

    Parameters that are made of zeros do not count: zero as a whole (LoRA, the last layer of a
    residual branch), or an identity. Nor do frozen ones, whose zeros stay.

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
        >>> unheld_zeros({"recurrent": torch.nn.Parameter(torch.eye(8))}, {})
        0.0
    """
    unheld = weights = 0
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        weights += parameter.numel()
        zero = parameter.detach() == 0
        if bool(zero.all()) or _is_identity(~zero):
            continue
        unheld += int((zero & masks[name].to(zero.device)).sum() if name in masks else zero.sum())
    return unheld / max(1, weights)


def _is_identity(nonzero: Tensor) -> bool:
    """Tell whether each output is made of one input at most, and none of the inputs is left out.

    So are ``eye_`` and ``dirac_``, also scaled or one below the other (the gates of a recurrent
    layer), and bilinear upsampling. What pruning leaves has no such order. Where there are fewer
    outputs than inputs, it is the outputs of which none is left out.
    """
    if nonzero.ndim < 2:
        return False
    if nonzero.ndim > 2 and nonzero.shape[1] > 1:  # kernels; of one input, its single weights
        nonzero = nonzero.flatten(2).any(2)
    inputs = nonzero.flatten(1)
    of_each = inputs.sum(1)
    return int(of_each.max()) == 1 and bool(of_each.all() | inputs.any(0).all())
