"""Lightning's hooks -> a generator that learns beside the model. Others say what it is for.

With this alone, the user's training is bit for bit what it is without the callback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.augment.pictures import log_picture
from lightning_prune.augment.vae import KL_WARMUP, VAE
from lightning_prune.callbacks.co_training import CoTraining
from lightning_prune.callbacks.generator_choice import save_generator
from lightning_prune.callbacks.reporting import give_back
from lightning_prune.callbacks.running_means import RunningMeans

PICTURES = 64
"""Samples in the grid that is logged each epoch."""


class GeneratorCallback(Callback):
    """Train a generator on the training batches, keep it in checkpoints, log how it fares.

    Args:
        training: The generator, and where it stands in the run.
        name: Prefix of the logged names, and what tells several of these callbacks apart.
    """

    def __init__(self, training: CoTraining, name: str) -> None:
        self.name = name
        self._training = training
        self._terms = RunningMeans()
        self._collapsed = False

    @property
    def vae(self) -> nn.Module:
        """The generator.

        Raises:
            RuntimeError: It has not been built yet.
        """
        given = self._training.given
        return self._training.built.vae if given is None else given

    def generate(self, n: int) -> Tensor:
        """Return ``n`` new inputs (n, *input shape), in the user's range, dtype and device.

        Does not disturb the draws of a training that is under way. With ``encode`` they are in the
        space that this leads to.

        Raises:
            RuntimeError: The generator has not been built yet.
            GeneratorError: A generator of the user's returned something else.
        """
        if n < 1:
            raise ValueError(f"Expected argument `n` to be at least 1, but got {n!r}.")
        return self._training.generate(n)

    def save_generator(self, path: str | Path) -> None:
        """Write the generator to a file, for another callback's ``checkpoint``.

        Raises:
            RuntimeError: The generator has not been built yet.
        """
        save_generator(self._training.built, path)

    # Lightning's hooks

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._training.check(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training.begin(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training.fit_before(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._terms.finish()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._learn(trainer, batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One call an epoch: Lightning's own epoch mean would cost as much as the VAE's steps.
        means = {f"{self.name}/{term}": mean for term, mean in self._terms.finish().items()}
        if means and not trainer.barebones:
            # The means are of samples already; a step with a dataloader_iter has no batch size.
            pl_module.log_dict(means, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self._warn_of_collapse(means.get(f"{self.name}/kl"))
        if trainer.is_global_zero and self._training.ready:
            log_picture(
                trainer.loggers,
                f"{self.name}/samples",
                lambda: self._training.generate(PICTURES, "picture", index=0),
                trainer.global_step,
            )

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:  # matters in a run resumed in the middle of a validation
            self._training.peek(pl_module, batch)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._training.end()
        give_back(self)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._training.end()  # there is no teardown

    def _learn(self, trainer: Trainer, batch: Any, *, joined: int = 0) -> None:
        """Train on a batch, behind which so many generated samples stood in the user's step."""
        if batch is not None:
            form = self._training.prepare(trainer, batch)
            terms = self._training.step(trainer, form, joined=joined)
            self._terms.add(terms, len(form.inputs))

    def _warn_of_collapse(self, kl: Tensor | None) -> None:
        """Say once that the posterior has collapsed, given the mean KL of an epoch, in nats."""
        if kl is None or self._collapsed or not isinstance(self.vae, VAE):
            return
        vae = self.vae
        if vae.collapsed(kl):
            self._collapsed = True
            rank_zero_warn(
                f"{self.name}: the VAE's posterior has collapsed onto the prior: {float(kl):.3g} "
                "nats of KL a sample in this epoch, so that its samples do not depend on the "
                "latent point. Give `vae` a VAE with free_bits=0.1, a longer warm-up "
                f"(warmup={2 * max(vae.warmup, KL_WARMUP)}), a smaller kl_weight "
                f"({vae.kl_weight / 4:g}) or fewer latent dimensions "
                f"(latent={max(1, vae.latent // 2)})."
            )
