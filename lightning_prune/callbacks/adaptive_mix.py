"""A Trainer's training and validation batches -> how much of the generated samples is used.

Enters: batches of a fit, as a callback sees them. Leaves: a factor in [0, 1], its state for the
checkpoint, its log. What follows from the losses, augment/adaptive.py knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.augment.adaptive import START, Losses, MixRule, gap_share, losses_of
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.callbacks.reporting import log_metrics
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.isolation import unlogged
from lightning_prune.passes.precision import widest


class AdaptiveMix:
    """The factor of a fit: 1 by itself, moved at the end of each validation.

    In a fit with a validation it starts small, with ``start`` until the first comparison, at most
    for an epoch: a training which has no need of it then loses little.

    At a validation the losses of about ``samples`` validation samples, spread over the first
    loader, are compared with those of as many training samples, the first of the epoch, by the same
    weights. This costs a forward pass over both in eval mode, and the memory of the training
    batches kept. The losses are by the likelihood and the batches' labels; without labels, a
    validation loader, or training samples (after a resumption at an epoch's end) the
    factor stays as it is. All processes come to the same factor, from the samples of all.

    Args:
        injection: How inputs reach the model, and how logits are read.
        read: Tells a batch's inputs and labels from the rest.
        rule: How the factor follows.
        samples: How many of each kind, in each process.
        start: The factor before the first comparison, in [0, 1].
        name: Prefix of the logged name.

    Example:
        >>> injection = Injection(lambda module, batch: module(batch))
        >>> AdaptiveMix(injection, read=lambda batch: BatchForm(batch, batch), start=1.0).value
        1.0
    """

    def __init__(
        self,
        injection: Injection,
        read: Callable[[Any], BatchForm],
        *,
        rule: MixRule | None = None,
        samples: int = 512,
        start: float = START,
        name: str = "vae",
    ) -> None:
        self._start = start
        self._injection, self._read, self._name = injection, read, name
        self._rule, self._samples = MixRule() if rule is None else rule, samples
        self.forget()

    def forget(self) -> None:
        """Begin as with a new model."""
        self._mix, self._waiting, self._whole_epoch = 1.0, True, False
        self._kept: list[BatchForm] = []
        self._training, self._held_out = Losses(), Losses()
        self._unreadable = False

    @property
    def value(self) -> float:
        """The factor to use now."""
        return min(self._start, self._mix) if self._waiting else self._mix

    def begin(self, trainer: Trainer) -> None:
        """Wait for no comparison in a fit without a validation, and keep none of another fit."""
        if not trainer.enable_validation:
            self._mix, self._waiting = 1.0, False

    def start_epoch(self) -> None:
        """Let go of the training samples of the last epoch. Called once there is a teacher."""
        self._kept = []
        self._whole_epoch = True

    def keep(self, form: BatchForm) -> None:
        """Keep a training batch, its real part only, unless there are enough of this epoch."""
        if form.labels is not None and sum(len(f.inputs) for f in self._kept) < self._samples:
            self._kept.append(form)

    def observe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at a validation batch; best before the user's step does."""
        fitting = trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or dataloader_idx or not self._kept or self._unreadable:
            return
        try:
            form = self._read(batch)
        except BatchFormatError:  # the generator learns from training batches; no reason to stop
            return
        if not self._is_one_of_the_spread(trainer, form, batch_idx):
            return
        if not self._training.count:
            # Now rather than at the end: averaged weights, say, are in place for validation only.
            for kept in self._kept:
                self._training += self._losses(trainer, pl_module, kept)
        self._held_out += self._losses(trainer, pl_module, form)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the factor by what was observed in a validation. Called on all processes."""
        if trainer.state.fn is not TrainerFn.FITTING or trainer.sanity_checking:
            return
        training, held_out = self._over_processes(trainer, pl_module)
        self._training, self._held_out = Losses(), Losses()
        gap = gap_share(training, held_out)
        if gap is not None:
            self._mix, self._waiting = self._rule(self._mix, *gap), False

    def end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the factor, and wait no longer for a comparison that a whole epoch did not bring."""
        self._waiting = self._waiting and not self._whole_epoch
        log_metrics(trainer, pl_module, {f"{self._name}/mix": self.value})

    def release(self) -> None:
        """Hold on to none of the user's data."""
        self._kept = []
        self._training, self._held_out = Losses(), Losses()

    def state_dict(self) -> dict[str, Any]:
        """Return what a run continues from."""
        return {"mix": self._mix, "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._mix, self._waiting = float(state["mix"]), bool(state["waiting"])

    def _is_one_of_the_spread(self, trainer: Trainer, form: BatchForm, batch_idx: int) -> bool:
        if self._held_out.count >= self._samples or not len(form.inputs):
            return False
        batches = trainer.num_val_batches[0]
        if batches == float("inf"):
            return True
        return batch_idx % max(1, int(batches * len(form.inputs) // self._samples)) == 0

    def _losses(self, trainer: Trainer, pl_module: LightningModule, form: BatchForm) -> Losses:
        if form.labels is None or self._unreadable:
            return Losses()
        try:
            with unlogged(pl_module), trainer.precision_plugin.forward_context():
                logits = self._injection.logits(pl_module, form, form.inputs)
            return Losses.of(losses_of(logits, form.labels, self._injection.likelihood))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (a batch of another form is no reason to stop)
            self._unreadable = True
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            rank_zero_warn(
                f"{self._name}: the share of generated samples does not adapt, and stays at "
                f"{self._mix:.2f}. {kind}{error}"
            )
            return Losses()

    def _over_processes(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[Losses, Losses]:
        if trainer.world_size == 1:
            return self._training, self._held_out
        kinds = (self._training, self._held_out)
        dtype = widest(pl_module.device)
        sums = torch.tensor(
            [[k.count, k.total, k.squares] for k in kinds], dtype=dtype, device=pl_module.device
        )
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        training, held_out = (Losses(*row) for row in sums.tolist())
        return training, held_out
