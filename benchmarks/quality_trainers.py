"""The arms that run in a Trainer of Lightning's: its own ModelPruning, and our recipe.

A Trainer makes a step of networks as small as these take one and a half to two times as long, so
all other arms are plain loops; these two are what a user would call, so they are called as a user
would.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality_arms import EPOCHS, EVENTS, learning_rate
from benchmarks.quality_networks import Batches, train_part
from lightning_prune.callbacks import recipes
from lightning_prune.masking import find_prunable

MODEL_PRUNING = ("ModelPruning", "ModelPruning-same")
RECIPE: dict[str, dict[str, Any]] = {
    "recipe": {},
    "recipe-distill": {"distill": 0.5},
    "recipe-layers": {"refit": "layers"},
    "recipe-no-decay": {"decay": False},
    "recipe-one-shot": {"stages": 1},
    "recipe-no-batch-norm": {"batch_norm": False},
    "recipe-obs": {"criterion": "obs"},
    "recipe-taylor": {"criterion": "taylor"},
    "recipe-fisher": {"criterion": "taylor", "target": "fisher"},
}
"""Name -> what is other than in ``recipes.best(sparsity, epochs)``."""


class Classifier(L.LightningModule):
    """A network with cross entropy and Adam; its learning rate constant or decayed at the end."""

    def __init__(self, net: nn.Module, lr: float, *, decay: bool) -> None:
        super().__init__()
        self.net, self.lr, self.decay = net, lr, decay

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return Adam, with the plain loops' decay if asked for."""
        optimizer = torch.optim.Adam(self.parameters(), self.lr, fused=True)
        if not self.decay:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": decay, "interval": "step"},
        }


def in_trainer(
    dense: nn.Module, name: str, arm: str, *, target: float, lr: float, seed: int
) -> nn.Module:
    """Return a copy of ``dense`` that a Trainer has pruned and trained for 12 epochs."""
    module = Classifier(copy.deepcopy(dense).train(), lr, decay=arm == "ModelPruning-same")
    if arm in MODEL_PRUNING:
        module.to(memory_format=torch.contiguous_format)  # of others it cannot make one vector
        callbacks: list[Callback] = [model_pruning(module, arm, target)]
    else:
        # Scored and fitted on the digits that all arms have, instead of the validation's.
        scoring = list(train_part(name)[0].split(600))
        callbacks = recipes.best(target, EPOCHS, scoring_loader=scoring, **RECIPE[arm])
    torch.manual_seed(seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on speed and on validation
        trainer.fit(module, Batches(name, seed))
    return module.net


def model_pruning(module: Classifier, arm: str, target: float) -> ModelPruning:
    """Return Lightning's callback, set to end at ``target``.

    Each of its events removes a share of the weights still there. ``"ModelPruning"`` leaves
    everything else at its default: an event at the end of every epoch, also of the last.
    ``"ModelPruning-same"`` has its events where the other arms have theirs, and their decay of the
    learning rate.
    """
    events = EPOCHS if arm == "ModelPruning" else EVENTS
    modules = dict(module.named_modules())
    owners = [weight.rpartition(".") for weight in find_prunable(module).parameters]
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(modules[owner], leaf) for owner, _, leaf in owners],
        use_global_unstructured=True,
        amount=1 - (1 - target) ** (1 / events),
        apply_pruning=lambda epoch: epoch < events,
        # It would put the dense weights back at every event.
        use_lottery_ticket_hypothesis=False,
    )
