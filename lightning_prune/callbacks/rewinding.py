"""What becomes of training at a pruning event: back to where it was at an earlier epoch.

Enters: the state of model, optimizers and learning rate schedules at the start of that epoch.
Leaves: the same put back, all of it or the learning rates alone; the masks are for others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune._targets import epoch_faults

What: TypeAlias = Literal["weights", "learning_rate"]

Snapshot: TypeAlias = dict[str, Any]
"""Plain tensors and containers, on the CPU: fit for a checkpoint."""


@dataclass(frozen=True)
class Rewind:
    """Go back to the start of an epoch at each pruning event.

    Args:
        what: ``"weights"``: the surviving weights, all other parameters and buffers, the
            optimizers' state and the learning rate schedules take the values that they had (lottery
            ticket with late rewinding: Frankle, Dziugaite, Roy and Carbin, 2020, "Linear mode
            connectivity and the lottery ticket hypothesis"). ``"learning_rate"``: the weights stay,
            the learning rate schedules start again from there (Renda, Frankle and Carbin, 2020,
            "Comparing rewinding and fine-tuning in neural network pruning").
        epoch: The epoch, counted from 0, to whose start is gone back; no later than the first
            event's. 0 is the initialisation for ``"weights"``.

    Raises:
        ValueError: ``what`` or ``epoch`` cannot be used.

    A copy of what is put back is kept in memory and in every checkpoint: for ``"weights"`` as much
    as the model and its optimizer state, for ``"learning_rate"`` a few numbers.

    Example:
        >>> Rewind("learning_rate", epoch=1)
        Rewind(what='learning_rate', epoch=1)
    """

    what: What = "weights"
    epoch: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        faults = epoch_faults(epoch=self.epoch)
        if self.what not in get_args(What):
            faults.append(f"what: expected one of {get_args(What)}, but got {self.what!r}")
        if faults:
            raise ValueError("\n- ".join(["Expected a usable Rewind:", *faults]))

    def snapshot(self, trainer: Trainer, module: LightningModule) -> Snapshot:
        """Return what :meth:`restore` needs, copied."""
        optimizers = trainer.optimizers
        kept: Snapshot = {
            "schedules": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "groups": [_hyperparameters(o.state_dict()["param_groups"]) for o in optimizers],
        }
        if self.what == "weights":
            kept["model"] = dict(module.state_dict())
            kept["optimizers"] = [o.state_dict() for o in optimizers]
        copied: Snapshot = _copied(kept)
        return copied

    def restore(self, trainer: Trainer, module: LightningModule, snapshot: Snapshot | None) -> None:
        """Put a snapshot back, in place: parameters, optimizers and schedules stay themselves.

        Masks are not known here: who has some puts them in force again.
        """
        if snapshot is None:  # rounds of steps may end before any epoch
            rank_zero_warn(
                f"{self} has nothing to go back to at the event of epoch {trainer.current_epoch}:"
                f" the fit has not seen the start of epoch {self.epoch}. The weights stay."
            )
            return
        snapshot = _copied(snapshot)  # an optimizer takes over the tensors that it loads
        if self.what == "weights":
            _load_in_place(module, snapshot["model"])
            for optimizer, state in zip(trainer.optimizers, snapshot["optimizers"], strict=False):
                since = _hyperparameters(optimizer.param_groups)
                optimizer.load_state_dict(_fitting(state, optimizer))
                for group, values in zip(optimizer.param_groups, since, strict=True):
                    for key, value in values.items():  # what others have written there since
                        group.setdefault(key, value)
        for optimizer, groups in zip(trainer.optimizers, snapshot["groups"], strict=False):
            for group, values in zip(optimizer.param_groups, groups, strict=False):
                group.update(values)
        for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedules"], strict=False):
            config.scheduler.load_state_dict(state)


def _hyperparameters(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


def _copied(value: Any) -> Any:
    """Copy containers and tensors; tensors to the CPU."""
    return pytree.tree_map(
        lambda leaf: (
            leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
        ),
        value,
    )


def _load_in_place(module: LightningModule, state: Mapping[str, Tensor]) -> None:
    present = dict(module.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, value in state.items():
            if isinstance(target := present.get(name), Tensor):
                target.copy_(value)


def _fitting(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's earlier state with the parameter groups it has gained since."""
    now = optimizer.state_dict()["param_groups"]
    groups = state["param_groups"]
    return {**state, "param_groups": [*groups, *now[len(groups) :]]}
