"""Lightning's hooks -> a VAE that learns beside the model, and generated inputs where they help."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune._types import Likelihood
from lightning_prune.augment.drawing import Drawing, Select
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm, Distillation
from lightning_prune.callbacks.co_training import CoTraining
from lightning_prune.callbacks.feature_encoder import FeatureEncoder
from lightning_prune.callbacks.generator_callback import GeneratorCallback
from lightning_prune.callbacks.generator_choice import GeneratorChoice
from lightning_prune.callbacks.generator_training import GeneratorTraining
from lightning_prune.callbacks.preflight import peek_batch
from lightning_prune.callbacks.reporting import without_lent
from lightning_prune.callbacks.supply import Supply
from lightning_prune.callbacks.training_injection import TrainBy, TrainingInjection
from lightning_prune.callbacks.vae_arguments import check_arguments, check_together
from lightning_prune.passes.isolation import unlogged
from lightning_prune.saliency import default_forward


class VAEAugmentCallback(GeneratorCallback):
    """Train a generator on the training batches, and let its samples join scoring and training.

    Args:
        vae: Any module with ``loss(x) -> scalar`` and ``sample(n) -> (n, *shape)``. ``"dense"`` or
            ``"conv"`` build a small VAE of that kind from the first batch; None is ``"dense"``.
        inject: ``"saliency"``: generated inputs join the pruner's scoring pass and the calibration
            of a refit. ``"train"``: from the first pruning event on they join the training, with
            the dense model's answers. ``()`` trains the generator and leaves the user's training
            exactly as it was.
        train_by: ``"distill"``: each training step gets a distillation term on generated inputs,
            with the dense model's predictions as soft labels. ``"batch"``: they stand behind the
            real ones in the batch that ``training_step`` sees, labelled by the class they were made
            for or by the dense model.
        adapt: The training's samples count for less the better the model does on validation data
            compared to training data, and for nothing where there is no gap; see
            :class:`~lightning_prune.callbacks.adaptive_mix.AdaptiveMix`. Needs labels and a
            validation.
        teacher: The model whose answers the training learns from, with the weights it has when the
            callback is made: a pretrained model that is pruned with fewer data than it was trained
            on. Of the class that is trained. None keeps the weights before the first event.
        select: Which samples are used: ``"prior"``, those of the prior; ``"starved"``, of four
            times as many those that the model wavers on most; ``"reconstructions"`` of real inputs
            or ``"interpolations"`` between pairs of them.
        share: Generated inputs for each real one, in both places.
        distillation: Weight and temperature of the training term.
        likelihood: How the model's output is read, as for the scores: ``"categorical"`` logits over
            classes, ``"bernoulli"`` logits, or a ``"gaussian"`` regression.
        learning_rate: Of the generator's Adam.
        warmup: The generator's first steps, in which its samples are not used yet.
        seed: Of all the callback's random numbers. The global random state is never touched.
        forward: ``forward(module, batch) -> logits`` where ``module(x)`` is not enough. It has to
            ignore the labels in the batch: generated inputs have none.
        name: Prefix of the logged names, and what tells several of these callbacks apart.
        classes: K: makes the default VAE conditional on the batches' labels, class indices (N,).
            Its samples then carry the class they were made for.
        training: When, how long and in which precision the generator learns.
        checkpoint: A generator to begin with, from a checkpoint of a run with a callback of the
            same name, or from a file by :meth:`save_generator`. It counts as warmed up. The state
            of a run that is resumed goes before it.
        encode: ``encode(x) -> float tensor (N, ...)`` for inputs that are no float tensors, such as
            token ids: the generator learns and samples in that space. To inject such samples, say
            how the model takes them, by ``forward``.
        encoder: Name of a submodule of the model, e.g. ``"net.features"``, whose detached output in
            the training step takes the place of the default VAE's encoder; only two linear layers
            and the decoder are new.

    Raises:
        ValueError: Arguments out of range; one message names them all. Or ``checkpoint`` holds no
            generator that fits.
        TypeError: ``vae`` lacks ``loss`` or ``sample``.

    In distributed training all processes train one generator, on their own batches and noise, and
    average its gradients and those of the training term.

    Example:
        >>> callback = VAEAugmentCallback(inject=("train",), distillation=Distillation(weight=0.3))
        >>> callback.inject
        ('train',)
    """

    def __init__(  # noqa: PLR0913 - plain values, as they are written in a file of settings
        self,
        vae: nn.Module | Literal["dense", "conv"] | None = None,
        *,
        inject: Sequence[Literal["saliency", "train"]] = ("saliency", "train"),
        train_by: TrainBy = "distill",
        adapt: bool = True,
        teacher: nn.Module | None = None,
        select: Select = "prior",
        share: float = 0.5,
        distillation: Distillation | None = None,
        likelihood: Likelihood = "categorical",
        learning_rate: float = 3e-3,
        warmup: int = 20,
        seed: int = 0,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        name: str = "vae",
        classes: int | None = None,
        training: GeneratorTraining | None = None,
        checkpoint: str | Path | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        encoder: str | None = None,
    ) -> None:
        self.inject: tuple[str, ...] = (inject,) if isinstance(inject, str) else tuple(inject)
        self.share, self.train_by = share, train_by
        training = GeneratorTraining() if training is None else training
        given = {"share": share, "learning_rate": learning_rate, "warmup": warmup, "name": name}
        check_arguments(self.inject, given)
        check_together(
            self.inject,
            encode=encode,
            encoder=encoder,
            forward=forward,
            training=training,
            warmup=warmup,
            train_by=train_by,
        )
        run = default_forward if forward is None else forward
        self._injection = Injection(
            forward=run,
            likelihood=likelihood,
            distillation=Distillation() if distillation is None else distillation,
        )
        choice = GeneratorChoice(
            vae=vae,
            classes=classes,
            encoder=encoder is not None,
            learning_rate=learning_rate,
            seed=seed,
            autocast=training.autocast,
            name=name,
        )
        co_training = CoTraining(
            choice,
            training,
            warmup=warmup,
            encode=encode,
            encoder=None if encoder is None else FeatureEncoder(encoder, run, name),
            checkpoint=checkpoint,
            state_key=self._generate_state_key(name=name),
        )
        super().__init__(co_training, name)
        self._supply = Supply(co_training, Drawing(select), self._injection)
        self._joining: TrainingInjection | None = None
        if "train" in self.inject:
            self._joining = TrainingInjection(
                self._supply, train_by, share=share, adapt=adapt, teacher=teacher, name=name
            )
        self._student: Callable[[], nn.Module | None] | None = None
        self._rehearsed = False

    # What users and the pruner call

    def scoring_batches(
        self, trainer: Trainer, pl_module: LightningModule, samples: int
    ) -> Iterator[Any]:
        """Yield generated batches in the form of the user's, about ``share * samples`` inputs.

        Labels, where the user's batches have any, are the model's own prediction, or the classes
        that a conditional VAE made the inputs for where they are class indices. Yields nothing
        if ``"saliency"`` is not in ``inject``, or the generator is not warmed up.
        """
        if "saliency" not in self.inject:
            return
        if not self._training.ready:
            rank_zero_info(
                f"{self.name}: no generated inputs join this scoring pass, as the generator has "
                f"had {self._training.trained} of its {self._training.warmup} warm-up steps."
            )
            return
        form = self._form(trainer, pl_module)
        if form is None:
            rank_zero_warn(
                f"{self.name}: no generated inputs join this scoring pass: the run was resumed, no "
                "batch has shown their form yet, and no loader has samples to look up by an index."
            )
            return
        size = max(self._training.batch_size, len(form.inputs))  # the form may be of one sample
        left = max(1, round(self.share * samples))
        while left > 0:
            n = min(size, left)
            left -= n
            inputs, classes = self._supply(trainer, pl_module, form, n)
            if classes is not None and form.labels is not None:
                yield form.fill(inputs, classes.to(form.labels.dtype))
                continue
            with trainer.precision_plugin.forward_context():
                batch = self._injection.labelled(pl_module, form, inputs)
            yield batch

    def before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights as the teacher, if there is none yet. Called before masks change."""
        if self._joining is not None:
            self._joining.keep_teacher(trainer, pl_module)

    # Lightning's hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._joining is not None:
            self._joining.check(trainer, pl_module)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.inject and self._training.given is not None:
            self._supply.drawing.check(self._training.given)
        self._rehearsed = not self.inject
        another = self._student is not None and self._student() is not pl_module
        if another and self._joining is not None:
            self._joining.forget_teacher()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A checkpoint has been restored by now: the teacher may have come with it, on the CPU.
        self._student = weakref.ref(pl_module)
        if self._joining is not None:
            self._joining.begin(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self._joining is not None:
            self._joining.start_epoch()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch is None:  # the first one of a training_step that fetches its batches itself
            return
        form = self._training.prepare(trainer, self._real_part(batch))
        if not self._rehearsed:
            # A few real inputs take the way that generated ones will take hours later.
            labelled = "saliency" in self.inject or self.train_by == "batch"
            with unlogged(pl_module), trainer.precision_plugin.forward_context():
                self._injection.rehearse(pl_module, form, labels=labelled)
            self._rehearsed = True
        if self._joining is not None:
            self._joining.before_step(trainer, pl_module, form)
        self._training.arm(trainer)  # last: what ran the model until here was no training step

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before gradients are clipped, and before any hook that masks them.
        if pl_module.automatic_optimization:
            self._add_term(trainer, pl_module, trainer.optimizers[0])

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # In manual optimization it is the user's affair how many backward passes make a step.
        if not pl_module.automatic_optimization:
            self._add_term(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        joined = 0 if self._joining is None else self._joining.samples_joined
        self._learn(trainer, self._real_part(batch), joined=joined)
        if self._joining is not None:
            self._joining.after_step()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._joining is not None:
            self._joining.end_epoch(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if self._joining is not None:
            self._joining.observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._joining is not None:
            self._joining.finish_validation(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._joining is not None:
            self._joining.end()
        super().teardown(trainer, pl_module, stage)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._joining is not None:
            self._joining.end()
        super().on_exception(trainer, pl_module, exception)

    @override
    def state_dict(self) -> dict[str, Any]:
        joining = {"teacher": None} if self._joining is None else self._joining.state_dict()
        return {"generator": self._training.state_dict(), **joining}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training.load_state_dict(state_dict["generator"])
        if self._joining is not None:
            self._joining.load_state_dict(state_dict)

    def _form(self, trainer: Trainer, pl_module: LightningModule) -> BatchForm | None:
        """Return the form of the batches, also in a resumed run that has not come to one yet."""
        for loader in (trainer.train_dataloader, trainer.val_dataloaders):
            if self._training.form is None and (batch := peek_batch(trainer, loader)) is not None:
                self._training.peek(pl_module, batch)
        return self._training.form

    def _real_part(self, batch: Any) -> Any:
        return batch if self._joining is None else self._joining.real_part(batch)

    def _add_term(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        joining = self._joining
        if joining and (loss := joining.add_term(trainer, pl_module, optimizer)) is not None:
            self._terms.add({"distillation": loss}, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**without_lent(self), "_student": None}  # a weak reference cannot be pickled
