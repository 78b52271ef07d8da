"""The smaller model at the end of a fit.

Enters: a batch of the fit, the pruned LightningModule. Leaves: a LightningModule without what was
pruned, and a table of what that is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prune._types import Forward
from lightning_prune.callbacks.scoring import is_fitting
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import call_inputs, few_samples
from lightning_prune.removal import RemovalError, RemovalReport, compare, shrink_with_report
from lightning_prune.removal.calls import copied
from lightning_prune.removal.graph import load_torch_pruning

SAMPLES = 8
"""Samples of a batch that the smaller model is proved on."""

NO_BATCH = "The fit has seen no batch."


@dataclass
class Shrinking:
    """What is cut at the end of a fit, and by which inputs it is proved.

    Args:
        wanted: Whether anything is.
        given: Example inputs of the user's; None takes samples of the fit's first batch.
        forward: ``forward(module, batch) -> logits``, if ``module(x)`` is not enough.
        module: The smaller module of the last fit; None where nothing was made.
        report: What was removed there.
        due: Whether a fit has come to its end and nothing was made of it yet.
    """

    wanted: bool
    given: Any = None
    forward: Forward | None = None
    module: LightningModule | None = None
    report: RemovalReport | None = None
    due: bool = False
    _seen: Any = field(default=None, repr=False)
    _why_none: str = field(default=NO_BATCH, repr=False)

    @classmethod
    def of(cls, argument: Any, forward: Forward | None) -> Shrinking:
        """Read the user's argument: True, False or example inputs."""
        wanted = argument is not False and argument is not None
        return cls(wanted, None if isinstance(argument, bool) else argument, forward)

    def start(self, stage: str) -> None:
        """Forget the last fit; say before the training if the library it needs is missing."""
        if stage == "fit":
            self.module = self.report = None
            self.let_go()
        if self.wanted:
            load_torch_pruning()

    def see(self, batch: Any) -> None:
        """Keep a few samples of a fit's first batch."""
        if self.wanted and self.given is None and self._seen is None and batch is not None:
            try:
                self._seen = few_samples(batch, SAMPLES)
            except BatchFormatError as error:
                self._why_none = str(error)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the smaller module if a fit has ended; a failure is a warning, not a crash."""
        try:
            if self.wanted and self.due and is_fitting(trainer):
                self._make(trainer, pl_module)
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Hold on to none of the user's data, and expect nothing."""
        self._seen, self._why_none, self.due = None, NO_BATCH, False

    def _make(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            inputs, forward = self._inputs(pl_module)
            small, self.report = shrink_with_report(
                pl_module, example_inputs=inputs, forward=forward
            )
        except Exception as error:  # noqa: BLE001 (a training that is complete must not be lost)
            rank_zero_warn(
                f"No smaller model was made; the pruned one is as it was. {_reason(error)}"
            )
            return
        self.module = cast(LightningModule, small)
        if not trainer.is_global_zero:
            return
        lines = [str(self.report)]
        if forward is None:
            try:
                # A copy knows no Trainer, to which a forward may log, and is not compiled either.
                lines.append(str(compare(copied(pl_module), small, inputs)))
            except Exception as error:  # noqa: BLE001 (the smaller model is there, and proved)
                rank_zero_warn(f"The smaller model could not be measured. {_reason(error)}")
        rank_zero_info("The smaller model:\n" + "\n".join(lines))

    def _inputs(self, pl_module: LightningModule) -> tuple[Any, Forward | None]:
        """Return example inputs, and the forward that takes them if it is not the module's own."""
        inputs, forward = self.given, None
        if inputs is None:
            if self._seen is None:
                raise BatchFormatError(self._why_none)
            forward = self.forward
            inputs = call_inputs(pl_module, self._seen) if forward is None else self._seen
        # When the fit has ended the strategy may have taken the model off the device.
        return move_data_to_device(inputs, pl_module.device), forward


def _reason(error: Exception) -> str:
    if isinstance(error, BatchFormatError):
        return f"{error} Or give example inputs: `shrink_at_end=inputs`."
    if isinstance(error, (RemovalError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error!s:.500}"  # torch's may list all that it knows
