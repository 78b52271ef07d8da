"""A generator that trains beside a Trainer's run: built from its first batch, fed by each one.

Enters: batches as Lightning hands them to a callback. Leaves: generated inputs, and a state for the
checkpoint. What a training step of a generator is, fitting.py knows; this file knows the Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.augment.conditional import condition_of
from lightning_prune.augment.feature_encoder import FeatureHeads
from lightning_prune.augment.fitting import GeneratorFitter
from lightning_prune.augment.input_range import InputRange
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.callbacks.encoding import encoded, read_form
from lightning_prune.callbacks.feature_encoder import FeatureEncoder
from lightning_prune.callbacks.fitting_before import batches_before
from lightning_prune.callbacks.generator_choice import GeneratorChoice
from lightning_prune.callbacks.generator_training import GeneratorTraining
from lightning_prune.callbacks.running_means import mean_over_processes
from lightning_prune.exceptions import BatchFormatError


class CoTraining:
    """A generator, and where it stands in the run.

    Args:
        choice: Which generator.
        training: When it learns.
        warmup: Steps before its samples are good enough to be used.
        encode: Inputs -> a float tensor (N, ...) in whose space the generator learns; None for the
            inputs as they are.
        encoder: Catches the network's features; None for a generator with an encoder of its own.
        checkpoint: File with a generator to begin with.
        state_key: The callback's key in checkpoints.
    """

    def __init__(
        self,
        choice: GeneratorChoice,
        training: GeneratorTraining,
        *,
        warmup: int,
        encode: Callable[[Tensor], Tensor] | None = None,
        encoder: FeatureEncoder | None = None,
        checkpoint: str | Path | None = None,
        state_key: str = "",
    ) -> None:
        self.choice, self.training = choice, training
        self.given, self.name, self.warmup = choice.given, choice.name, warmup
        self.encode, self.encoder = encode, encoder
        self.seen = 0
        self.batch_size = 0  # inputs of the largest training batch so far
        self.reused = checkpoint is not None
        self.resumed = False
        self.fitter: GeneratorFitter | None = None
        if checkpoint is not None:
            self.fitter = choice.reused(checkpoint, state_key)
        self.device = torch.device("cpu")
        self.form: BatchForm | None = None
        self._read: Any = None  # the batch that the form was read from

    @property
    def built(self) -> GeneratorFitter:
        """The generator with its optimizer.

        Raises:
            RuntimeError: There is none yet.
        """
        if self.fitter is None:
            raise RuntimeError(
                f"{self.name}: the generator does not exist yet: it is built from the first "
                "training batch, or from a checkpoint. Call `trainer.fit` first."
            )
        return self.fitter

    @property
    def trained(self) -> float:
        """Training steps so far."""
        return 0 if self.fitter is None else self.fitter.trained

    @property
    def ready(self) -> bool:
        """Whether samples may be used."""
        return self.reused or self.trained >= max(1, self.warmup)

    def check(self, model: nn.Module) -> None:
        """Refuse a generator that would train the model's own parameters."""
        own = {id(parameter) for parameter in model.parameters()}
        if self.given is not None and any(id(p) in own for p in self.given.parameters()):
            raise MisconfigurationException(
                f"{self.name}: expected a generator of its own, but `vae` shares parameters with "
                "the model, which would then be trained twice. Give a copy."
            )
        if self.encoder is not None:
            self.encoder.check(model)

    # Through a fit, in the order of its calls

    def begin(self, pl_module: LightningModule) -> None:
        """Get ready for a fit, after a checkpoint has been restored."""
        self.device = pl_module.device
        if self.encoder is not None:
            self.encoder.attach(pl_module)

    def fit_before(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train alone for some epochs, unless there is a generator that has been trained."""
        epochs = self.training.fit_before
        if not epochs or self.resumed or self.reused or self.trained > 0:
            return
        for batch in batches_before(
            trainer, pl_module, epochs, seed=self.choice.seed, name=self.name
        ):
            if self.fitter is not None and not self.training.affords(self.fitter.batches):
                break
            form = self.prepare(trainer, batch)
            self._step(trainer, form, None if self.encoder is None else self._features_of(form))
        self.release()

    def prepare(self, trainer: Trainer, batch: Any) -> BatchForm:
        """Read a training batch; build the generator if it is the first.

        The form's inputs are what the generator learns: with ``encode``, they are encoded.

        Raises:
            BatchFormatError: The batch's input cannot be told.
            MisconfigurationException: The inputs or labels are none the generator can learn.
        """
        if self.form is not None and self._read is batch:
            return self.form
        self.form, self._read = self.read(batch), batch
        x = self.form.inputs
        self.device, self.batch_size = x.device, max(self.batch_size, len(x))
        if self.fitter is None:
            self.fitter = self._build(trainer, self.form)
        elif not self.fitter.accepts(x):
            raise MisconfigurationException(
                f"{self.name}: expected inputs of shape {('N', *self.fitter.shape)} and a dtype "
                f"like {self.fitter.dtype}, which the generator was made for, but got shape "
                f"{tuple(x.shape)} and dtype {x.dtype}. Bring all inputs to one shape, or use "
                "another callback for other data."
            )
        if not self.training.offload:
            self.fitter.to(x.device)
        self._connect(self.fitter)
        return self.form

    def arm(self, trainer: Trainer) -> None:
        """Listen for the network's features in the training step that follows, if they are due."""
        if self.encoder is not None and self._due(trainer):
            self.encoder.arm()

    def step(self, trainer: Trainer, form: BatchForm, *, joined: int = 0) -> dict[str, Tensor]:
        """Train on a batch, if it is due; all processes together train one generator.

        Args:
            trainer: Of the fit.
            form: The batch, as :meth:`prepare` returned it.
            joined: Generated samples that stood behind it in the user's training step.

        Returns:
            The terms of the loss; empty if no step was taken.
        """
        due = self._due(trainer)
        self.seen += 1
        if not due:
            return {}
        features = None if self.encoder is None else self.encoder.take(len(form.inputs), joined)
        return self._step(trainer, form, features)

    def release(self) -> None:
        """Hold on to none of the user's data."""
        self.form = self._read = None

    def end(self) -> None:
        """Undo :meth:`begin`."""
        self.release()
        if self.encoder is not None:
            self.encoder.detach()

    # What others ask for

    def read(self, batch: Any) -> BatchForm:
        """Tell a batch's inputs, encoded if they are to be, and labels from the rest."""
        form = read_form(batch, self.name)
        return form if self.encode is None else encoded(form, self.encode, self.name)

    def peek(self, pl_module: LightningModule, batch: Any) -> None:
        """Take another batch for the form, where no training batch has shown one yet."""
        if self.form is None and self.fitter is not None:
            with suppress(BatchFormatError):  # no reason to stop what goes on
                form = self.read(batch)
                self.form = form if self.fitter.accepts(form.inputs) else None
            self.device = pl_module.device
            if not self.training.offload:
                self.fitter.to(pl_module.device)
            self._connect(self.fitter)

    def generate(self, n: int, purpose: str = "generate", index: int | None = None) -> Tensor:
        """Return ``n`` inputs outside of the run's own draws."""
        with self.in_use() as fitter:
            return fitter.draw(n, purpose, index=index)

    @contextmanager
    def in_use(self) -> Iterator[GeneratorFitter]:
        """Yield the generator on the inputs' device; with ``offload`` it is there for so long."""
        fitter = self.built
        if not self.training.offload:
            yield fitter
            return
        fitter.to(self.device)
        try:
            yield fitter
        finally:
            fitter.to(torch.device("cpu"))

    # Checkpoints

    def state_dict(self) -> dict[str, Any] | None:
        """Return tensors and plain containers; None before there is a generator."""
        if self.fitter is None:
            return None
        own = {"seen": self.seen, "batch_size": self.batch_size, "reused": self.reused}
        return self.fitter.state_dict() | own

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from :meth:`state_dict`, building the generator anew."""
        self.fitter, self.resumed = None, state is not None
        if state is not None:
            self.fitter = self.choice.restored(state)
            self.seen = state.get("seen", state["batches"])
            self.batch_size = state.get("batch_size", 0)
            self.reused = state.get("reused", False)
            self._connect(self.fitter)

    # How

    def _due(self, trainer: Trainer) -> bool:
        steps = 0 if self.fitter is None else self.fitter.batches
        return self.training.includes(epoch=trainer.current_epoch, batch=self.seen, steps=steps)

    def _build(self, trainer: Trainer, form: BatchForm) -> GeneratorFitter:
        features = None if self.encoder is None else self._features_of(form)
        fitter = self.choice.build(trainer, form.inputs, features)
        if fitter.classes is not None:
            try:  # before the user's first step
                condition_of(form.labels, fitter.classes, len(form.inputs), form.inputs)
            except ValueError as error:
                raise MisconfigurationException(
                    f"{self.name}: the batches' labels do not fit a generator with classes. {error}"
                ) from error
        return fitter

    def _step(
        self, trainer: Trainer, form: BatchForm, features: Tensor | None
    ) -> dict[str, Tensor]:
        with self.in_use() as fitter:
            heads = getattr(fitter.vae, "encoder", None) if features is not None else None
            skipped = fitter.skipped
            try:
                if isinstance(heads, FeatureHeads):
                    heads.offer(features)
                terms = fitter.step(
                    form.inputs,
                    form.labels if fitter.classes is not None else None,
                    rank=trainer.global_rank,
                    average=mean_over_processes(trainer),
                )
            finally:
                if isinstance(heads, FeatureHeads):
                    heads.offer(None)
        if fitter.skipped > skipped == 0:
            rank_zero_warn(
                f"{self.name}: the generator's loss or gradients were NaN or infinite at batch "
                f"{fitter.batches}. Such steps are skipped, and its last good weights kept. Check "
                "the inputs, or lower `learning_rate`."
            )
        return terms

    def _features_of(self, form: BatchForm) -> Tensor:
        if self.encoder is None:
            raise RuntimeError("Expected a generator with `encoder=`, but it has none.")
        return self.encoder.compute(form.batch, len(form.inputs))

    def _connect(self, fitter: GeneratorFitter) -> None:
        """Let a VAE that encodes the network's features ask for those of other inputs."""
        heads = getattr(fitter.vae, "encoder", None)
        encoder = self.encoder
        if encoder is None or not isinstance(heads, FeatureHeads) or heads.source is not None:
            return

        input_range: InputRange = fitter.vae.input_range  # type: ignore[assignment]

        def source(unit: Tensor) -> Tensor:
            inputs = input_range.inverse(unit).to(fitter.dtype)
            batch = inputs if self.form is None else self.form.fill(inputs)
            return encoder.compute(batch, len(inputs)).to(unit.device)

        heads.source = source

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what belongs to a fit under way."""
        return {**vars(self), "_read": None}
