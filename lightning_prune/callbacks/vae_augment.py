"""Lightning's hooks -> a VAE that learns beside the model, and generated inputs where they help."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import Distillation, Likelihood
from lightning_prune.augment.pictures import log_picture
from lightning_prune.callbacks.co_training import CoTraining, RunningMeans
from lightning_prune.callbacks.reporting import give_back, without_lent
from lightning_prune.callbacks.training_term import add_training_term, check_strategy
from lightning_prune.passes.teacher import Teacher
from lightning_prune.saliency import default_forward

PLACES = ("saliency", "train")
"""Where generated inputs can go."""

PICTURES = 64
"""Samples in the grid that is logged each epoch."""


class VAEAugmentCallback(Callback):
    """Train a generator on the training batches, and let its samples join scoring and training.

    Args:
        vae: Any module with ``loss(x) -> scalar`` and ``sample(n) -> (n, *shape)``. None builds a
            small dense VAE from the first batch.
        inject: ``"saliency"``: generated inputs join the pruner's scoring pass. ``"train"``: from
            the first pruning event on, each training step gets a distillation term on generated
            inputs, with the dense model's predictions as soft labels. ``()`` trains the generator
            and leaves the user's training exactly as it was.
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

    Raises:
        ValueError: Arguments out of range; one message names them all.
        TypeError: ``vae`` lacks ``loss`` or ``sample``.

    In distributed training all processes train one generator, on their own batches and noise, and
    average its gradients and those of the training term.

    Example:
        >>> callback = VAEAugmentCallback(inject=("train",), distillation=Distillation(weight=0.3))
        >>> callback.inject
        ('train',)
    """

    def __init__(
        self,
        vae: nn.Module | None = None,
        *,
        inject: Sequence[Literal["saliency", "train"]] = ("saliency", "train"),
        share: float = 0.5,
        distillation: Distillation | None = None,
        likelihood: Likelihood = "categorical",
        learning_rate: float = 3e-3,
        warmup: int = 20,
        seed: int = 0,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        name: str = "vae",
    ) -> None:
        self.inject: tuple[str, ...] = (inject,) if isinstance(inject, str) else tuple(inject)
        self.share, self.name = share, name
        _check_arguments(self.inject, share, learning_rate, warmup, name)
        self._injection = Injection(
            forward=default_forward if forward is None else forward,
            likelihood=likelihood,
            distillation=Distillation() if distillation is None else distillation,
        )
        self._training = CoTraining(
            vae, learning_rate=learning_rate, warmup=warmup, seed=seed, name=name
        )
        self._teacher: Teacher | None = None
        self._student: Callable[[], nn.Module | None] | None = None
        self._generated: Any = None  # the batch that joins the training step under way
        self._terms = RunningMeans()
        self._joined = True
        self._rehearsed = False

    # What users and the pruner call

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

        Does not disturb the draws of a training that is under way.

        Raises:
            RuntimeError: The generator has not been built yet.
            GeneratorError: A generator of the user's returned something else.
        """
        if n < 1:
            raise ValueError(f"Expected argument `n` to be at least 1, but got {n!r}.")
        return self._training.built.draw(n, "generate")

    def scoring_batches(
        self, trainer: Trainer, pl_module: LightningModule, samples: int
    ) -> Iterator[Any]:
        """Yield generated batches in the form of the user's, about ``share * samples`` inputs.

        Labels, where the user's batches have any, are the model's own prediction. Yields nothing
        if ``"saliency"`` is not in ``inject``, or the generator is not warmed up.
        """
        form = self._training.form
        if "saliency" not in self.inject or form is None:
            return
        if not self._training.ready:
            rank_zero_info(
                f"{self.name}: no generated inputs join this scoring pass, as the generator has "
                f"had {self._training.trained} of its {self._training.warmup} warm-up steps."
            )
            return
        left = max(1, round(self.share * samples))
        while left > 0:
            n = min(len(form.inputs), left)
            left -= n
            inputs = self._training.draw(trainer, n)
            with trainer.precision_plugin.forward_context():
                batch = self._injection.labelled(pl_module, form, inputs)
            yield batch

    def before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights as the teacher, if there is none yet. Called before masks change."""
        if "train" in self.inject and self._teacher is None:
            self._teacher = Teacher.of(pl_module)

    # Lightning's hooks

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if "train" in self.inject:
            check_strategy(trainer, self.name)
        self._training.check(pl_module)
        self._rehearsed = not self.inject
        if self._student is not None and self._student() is not pl_module:
            self._teacher = None  # it was another model's

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A checkpoint has been restored by now: the teacher may have come with it, on the CPU.
        self._student = weakref.ref(pl_module)
        if self._teacher is not None:
            if not self._teacher.fits(pl_module):
                raise MisconfigurationException(
                    f"{self.name}: expected the dense weights kept in the checkpoint to fit the "
                    "model, but names or shapes differ. Resume with the model that was pruned, or "
                    "leave 'train' out of `inject`."
                )
            self._teacher.to(pl_module.device)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._terms.finish()
        # Nothing is missed where nothing was to be expected.
        self._joined = self._teacher is None or not self._training.ready

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch is None:  # a training_step that fetches its batches itself
            return
        form = self._training.prepare(trainer, batch)
        if not self._rehearsed:
            # A few real inputs take the way that generated ones will take hours later.
            with trainer.precision_plugin.forward_context():
                self._injection.rehearse(pl_module, form, labels="saliency" in self.inject)
            self._rehearsed = True
        if self._teacher is not None and self._training.ready:
            # Before the user's step: a fault in a sample is named while nothing is half done.
            n = max(1, round(self.share * len(form.inputs)))
            self._generated = form.fill(self._training.draw(trainer, n))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before gradients are clipped, and before any hook that masks them.
        if pl_module.automatic_optimization:
            self._join(trainer, pl_module, trainer.optimizers[0])

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # In manual optimization it is the user's affair how many backward passes make a step.
        if not pl_module.automatic_optimization:
            self._join(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._generated = None
        if batch is not None:
            x = self._training.prepare(trainer, batch).inputs
            self._terms.add(self._training.step(trainer, x), len(x))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._joined:
            rank_zero_warn(
                f"{self.name}: no generated inputs joined the training in this epoch. Either their "
                "gradients were never finite; or the optimizer was stepped past Lightning, which "
                "with manual optimization needs `self.optimizers()`; or training_step takes a "
                "dataloader_iter, which is not supported."
            )
        # One call an epoch: Lightning's own epoch mean would cost as much as the VAE's steps.
        means = {f"{self.name}/{term}": mean for term, mean in self._terms.finish().items()}
        if means and not trainer.barebones:
            pl_module.log_dict(means, on_step=False, on_epoch=True, sync_dist=True)
        if trainer.is_global_zero and self._training.ready:
            log_picture(
                trainer.loggers,
                f"{self.name}/samples",
                lambda: self._training.built.draw(PICTURES, "picture", index=0),
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
        self._training.form = self._generated = None  # hold on to none of the user's data
        give_back(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        teacher = None if self._teacher is None else dict(self._teacher.weights)
        return {"generator": self._training.state_dict(), "teacher": teacher}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training.load_state_dict(state_dict["generator"])
        weights = state_dict["teacher"] if "train" in self.inject else None
        self._teacher = None if weights is None else Teacher(weights)

    def __getstate__(self) -> dict[str, Any]:
        return {**without_lent(self), "_student": None}  # a weak reference cannot be pickled

    def _join(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._generated is not None and self._teacher is not None:
            loss = add_training_term(
                trainer, pl_module, optimizer, self._generated, self._injection, self._teacher
            )
            if loss is not None:
                self._joined = True
                self._terms.add({"distillation": loss}, 1)


def _check_arguments(
    inject: tuple[str, ...], share: float, learning_rate: float, warmup: int, name: str
) -> None:
    faults = [
        f"`inject`: expected places among {PLACES}, but got {place!r}"
        for place in inject
        if place not in PLACES
    ]
    for argument, value, fine, wanted in (
        ("share", share, 0 < share < float("inf"), "above 0"),
        ("learning_rate", learning_rate, 0 < learning_rate < float("inf"), "above 0"),
        ("warmup", warmup, warmup >= 0, "a number of steps, 0 or more"),
        ("name", name, bool(name), "not empty"),
    ):
        if not fine:
            faults.append(f"`{argument}`: expected it to be {wanted}, but got {value!r}")
    if faults:
        raise ValueError("\n- ".join(["VAEAugmentCallback cannot use its arguments:", *faults]))
