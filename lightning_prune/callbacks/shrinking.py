"""The smaller model at the end of a fit.

Enters: a batch of the fit, the pruned LightningModule. Leaves: a LightningModule without what was
pruned, and a table of what that is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prune._types import Forward
from lightning_prune.passes.batches import batch_size, read_inputs, take_samples
from lightning_prune.removal import RemovalError, RemovalReport, compare, shrink_with_report
from lightning_prune.removal.graph import load_torch_pruning

SAMPLES = 8
"""Samples of a batch that the smaller model is proved on."""


@dataclass
class Shrinking:
    """What is cut at the end of a fit, and by which inputs it is proved.

    Args:
        wanted: Whether anything is.
        given: Example inputs of the user's; None takes samples of the fit's first batch.
        forward: ``forward(module, batch) -> logits``, if ``module(x)`` is not enough.
    """

    wanted: bool
    given: Any = None
    forward: Forward | None = None
    module: LightningModule | None = None
    report: RemovalReport | None = None
    _seen: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, argument: Any, forward: Forward | None) -> Shrinking:
        """Read the user's argument: True, False or example inputs."""
        wanted = argument is not False and argument is not None
        return cls(wanted, None if isinstance(argument, bool) else argument, forward)

    def check(self) -> None:
        """Say before the training if the library that it needs is missing."""
        if self.wanted:
            load_torch_pruning()

    def see(self, batch: Any) -> None:
        """Keep a few samples of a fit's first batch."""
        if self.wanted and self.given is None and self._seen is None and batch is not None:
            self._seen = take_samples(batch, torch.arange(min(SAMPLES, batch_size(batch))))

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the smaller module and say what it is worth; a failure is a warning, not a crash."""
        if not self.wanted:
            return
        inputs, forward = self.given, None
        if inputs is None and self.forward is None and self._seen is not None:
            inputs = read_inputs(self._seen)
        elif inputs is None:
            inputs, forward = self._seen, self.forward
        if inputs is None:
            rank_zero_warn("No smaller model was made: the fit has seen no batch.")
            return
        try:
            small, self.report = shrink_with_report(
                pl_module, example_inputs=inputs, forward=forward
            )
        except (RemovalError, ValueError) as error:
            rank_zero_warn(f"No smaller model was made; the pruned one is as it was. {error}")
            return
        if not isinstance(small, LightningModule):
            raise TypeError(f"Expected a copy of the LightningModule, but got {type(small)}.")
        self.module = small
        if trainer.is_global_zero:
            lines = [str(self.report)]
            if forward is None:
                lines.append(str(compare(pl_module, small, inputs)))
            rank_zero_info("The smaller model:\n" + "\n".join(lines))

    def let_go(self) -> None:
        """Hold on to none of the user's data."""
        self._seen = None
