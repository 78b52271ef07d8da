"""A loss of our own in somebody else's training step: its gradients join the user's.

Enters: a generated batch, and an optimizer whose gradients are complete. Leaves: these gradients
with the term's added, scaled, shared out and averaged as Lightning does it with the user's loss.
"""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.augment.fitting import all_finite, average_in_place
from lightning_prune.augment.injection import Injection
from lightning_prune.callbacks.preflight import SHARDING
from lightning_prune.callbacks.running_means import mean_over_processes
from lightning_prune.passes.teacher import Teacher


def check_strategy(trainer: Trainer, name: str) -> None:
    """Refuse strategies that shard the parameters."""
    if isinstance(trainer.strategy, SHARDING):
        raise MisconfigurationException(
            f"{name}: expected whole parameters in each process for inject='train', but "
            f"{type(trainer.strategy).__name__} shards them. Leave 'train' out of `inject`, or "
            "train with DDP."
        )


def add_training_term(
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: Optimizer,
    batch: Any,
    injection: Injection,
    teacher: Teacher,
    *,
    mix: float = 1.0,
) -> Tensor | None:
    """Add the gradients of the distillation term to those of an optimizer's parameters.

    Parameters without a gradient of the user's are left alone: frozen, or of a skipped step. With
    ``accumulate_grad_batches`` the term is divided as the loss is. Non-finite gradients (in half
    precision an overflow now and then is the normal course of things) are left out.

    In automatic optimization this is called right after a batch's backward pass, when gradients
    still carry the AMP scaler's factor; in manual optimization right before the optimizer's step,
    when they do so only for optimizers that unscale on their own.

    Args:
        trainer: Of the fit.
        pl_module: The student.
        optimizer: Whose gradients are complete.
        batch: Generated inputs in the user's form.
        injection: How they reach the model, and the term's weight.
        teacher: The dense weights.
        mix: Factor of the weight, in [0, 1]; the same on all processes. 0 skips the term, forward
            passes and all.

    Returns:
        The unweighted loss, detached, or None if nothing was added.
    """
    if mix == 0.0:
        return None
    automatic = pl_module.automatic_optimization
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter.grad is not None
    ]
    if not parameters:
        return None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    shares = trainer.accumulate_grad_batches if automatic else 1
    with trainer.precision_plugin.forward_context():
        # The bare module: a wrapper for distributed training would start to reduce.
        loss, gradients = injection.gradients(
            pl_module, parameters, batch, teacher, scale=mix * scale / shares
        )
    if (average := mean_over_processes(trainer)) is not None:
        average_in_place(gradients, average)
    if not all_finite(gradients):
        return None
    keep_scale = automatic or getattr(optimizer, "_step_supports_amp_scaling", False)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.add_(gradient if keep_scale else gradient / scale)
    return loss
