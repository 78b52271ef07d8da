"""A generator that trains beside a Trainer's run: built from its first batch, fed by each one.

Enters: batches as Lightning hands them to a callback. Leaves: generated inputs, and a state for the
checkpoint. What a training step of a generator is, fitting.py knows; this file knows the Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.augment.fitting import GeneratorFitter, build_vae, require_generator
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.augment.vae import settings_for
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.saliency import read_inputs, read_labels


class CoTraining:
    """A generator, and where it stands in the run.

    Args:
        vae: The user's generator; None builds a VAE from the first batch.
        learning_rate: Of the generator's Adam.
        warmup: Steps before its samples are good enough to be used.
        seed: What all its random numbers follow from.
        name: What to call it in messages.
    """

    def __init__(
        self, vae: nn.Module | None, *, learning_rate: float, warmup: int, seed: int, name: str
    ) -> None:
        if vae is not None:
            require_generator(vae)
        self.given, self.name = vae, name
        self.learning_rate, self.warmup, self.seed = learning_rate, warmup, seed
        self.fitter: GeneratorFitter | None = None
        self.form: BatchForm | None = None

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
        return self.trained >= max(1, self.warmup)

    def check(self, model: nn.Module) -> None:
        """Refuse a generator that would train the model's own parameters."""
        own = {id(parameter) for parameter in model.parameters()}
        if self.given is not None and any(id(p) in own for p in self.given.parameters()):
            raise MisconfigurationException(
                f"{self.name}: expected a generator of its own, but `vae` shares parameters with "
                "the model, which would then be trained twice. Give a copy."
            )

    def prepare(self, trainer: Trainer, batch: Any) -> BatchForm:
        """Read a training batch; build the generator if it is the first.

        Raises:
            BatchFormatError: The batch's input cannot be told.
            MisconfigurationException: The inputs are none the generator can learn.
        """
        self.form = self.read(batch)
        x = self.form.inputs
        if self.fitter is None:
            self.fitter = self._build(trainer, x)
        elif not self.fitter.accepts(x):
            raise MisconfigurationException(
                f"{self.name}: expected inputs of shape {('N', *self.fitter.shape)} and a dtype "
                f"like {self.fitter.dtype}, which the generator was made for, but got shape "
                f"{tuple(x.shape)} and dtype {x.dtype}. Bring all inputs to one shape, or use "
                "another callback for other data."
            )
        self.fitter.to(x.device)
        return self.form

    def read(self, batch: Any) -> BatchForm:
        """Tell a batch's inputs and labels from the rest."""
        try:
            x = read_inputs(batch)
        except BatchFormatError as error:
            raise BatchFormatError(
                f"{self.name}: the generator learns one input tensor a batch: `x` in a batch `x` "
                "or `(x, ...)`, or the only entry beside the labels in a dict. `forward=` does "
                f"not change that. {error}"
            ) from error
        y = read_labels(batch)
        return BatchForm(batch, x, y if y is not None and y.shape[:1] == x.shape[:1] else None)

    def peek(self, pl_module: LightningModule, batch: Any) -> None:
        """Take a validation batch for the form, where no training batch has shown one yet."""
        if self.form is None and self.fitter is not None:
            with suppress(BatchFormatError):  # no reason to stop a validation
                form = self.read(batch)
                self.form = form if self.fitter.accepts(form.inputs) else None
            self.fitter.to(pl_module.device)

    def draw(self, trainer: Trainer, n: int) -> Tensor:
        """Return ``n`` inputs for the run; each process gets its own."""
        return self.built.draw(n, "inject", rank=trainer.global_rank)

    def step(self, trainer: Trainer, x: Tensor) -> dict[str, Tensor]:
        """Train on a batch; all processes together train one generator."""
        fitter = self.built
        skipped = fitter.skipped
        terms = fitter.step(x, rank=trainer.global_rank, average=mean_over_processes(trainer))
        if fitter.skipped > skipped == 0:
            rank_zero_warn(
                f"{self.name}: the generator's loss or gradients were NaN or infinite at batch "
                f"{fitter.batches}. Such steps are skipped, and its last good weights kept. Check "
                "the inputs, or lower `learning_rate`."
            )
        return terms

    def state_dict(self) -> dict[str, Any] | None:
        """Return tensors and plain containers; None before there is a generator."""
        return None if self.fitter is None else self.fitter.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from :meth:`state_dict`, building the generator anew."""
        self.fitter = None
        if state is not None:
            self.fitter = GeneratorFitter.from_state(
                state, self.given, learning_rate=self.learning_rate, seed=self.seed
            )

    def _build(self, trainer: Trainer, x: Tensor) -> GeneratorFitter:
        vae = self.given
        if vae is None:
            if not x.is_floating_point():
                raise MisconfigurationException(
                    f"{self.name}: expected floating-point inputs, but got {x.dtype}; the default "
                    "VAE has no likelihood for them. Give a generator of your own that has: "
                    "`vae=` a module with `loss(x) -> scalar` and `sample(n) -> Tensor`. Or let "
                    "the batches carry embeddings instead."
                )
            # The first process's batch decides for all.
            settings = trainer.strategy.broadcast(settings_for(x))
            vae = build_vae(settings, x.dtype, seed=self.seed)
        elif trainer.world_size > 1:  # each process has initialised its own
            vae.load_state_dict(trainer.strategy.broadcast(vae.state_dict()))
        return GeneratorFitter(
            vae, x.shape[1:], x.dtype, x.device, learning_rate=self.learning_rate, seed=self.seed
        )


class RunningMeans:
    """Means of named scalars over an epoch, weighted by samples, without waiting for the device.

    Example:
        >>> means = RunningMeans()
        >>> means.add({"loss": torch.tensor(1.0)}, 3)
        >>> means.add({"loss": torch.tensor(5.0)}, 1)
        >>> means.finish()
        {'loss': tensor(2.)}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Add values that are means over ``samples``."""
        for name, value in values.items():
            total, count = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = total + samples * value, count + samples

    def finish(self) -> dict[str, Tensor]:
        """Return the means, and start anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


def mean_over_processes(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that averages a tensor over processes; None if there is one process."""
    if trainer.world_size == 1:
        return None

    def mean(tensor: Tensor) -> Tensor:
        averaged: Tensor = trainer.strategy.reduce(tensor, reduce_op="mean")
        return averaged

    return mean
