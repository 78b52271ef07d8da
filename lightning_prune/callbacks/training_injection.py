"""Generated inputs in the training: from the first event on, with the dense model's answers.

Enters: training batches, in Lightning's order of hooks. Leaves: a distillation term beside the
user's loss, or samples in the user's batch; and a state for the checkpoint.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.augment.mixing import BatchForm
from lightning_prune.callbacks.adaptive_mix import AdaptiveMix
from lightning_prune.callbacks.batch_join import BatchJoin, whole
from lightning_prune.callbacks.batch_sources import callbacks_of
from lightning_prune.callbacks.encoding import read_form
from lightning_prune.callbacks.saliency_pruning import pruners_of
from lightning_prune.callbacks.supply import Supply
from lightning_prune.callbacks.training_term import add_training_term, check_strategy
from lightning_prune.passes.isolation import unlogged
from lightning_prune.passes.teacher import Teacher

TrainBy: TypeAlias = Literal["distill", "batch"]
"""How generated inputs enter the training: by a term of their own, or as part of the batch."""


class TrainingInjection:
    """What generated inputs do in a fit's training.

    Args:
        supply: Where they come from.
        by: How they enter.
        share: Generated inputs for each real one.
        adapt: Whether their weight follows the validation.
        teacher: The model whose answers are learnt, with the weights it has now; None keeps those
            that the trained model has before the first event.
        name: What to call it in messages and logs.
    """

    def __init__(
        self,
        supply: Supply,
        by: TrainBy,
        *,
        share: float,
        adapt: bool,
        teacher: nn.Module | None,
        name: str,
    ) -> None:
        self.supply, self.by, self.share, self.name = supply, by, share, name
        self._given = None if teacher is None else Teacher.of(teacher)
        self.teacher: Teacher | None = self._given
        self.samples_joined = 0  # the samples in the user's batch under way
        self._mix = AdaptiveMix(supply.injection, supply.generator.read, name=name)
        self._adapt = adapt
        self._join = BatchJoin()
        self._generated: Any = None  # the batch that joins the training step under way
        self._took_part = True

    @property
    def mix(self) -> float:
        """The factor of the term's weight, or of the share, in [0, 1]."""
        return self._mix.value if self._adapt else 1.0

    # Through a fit, in the order of its calls

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a Trainer or a model that this cannot work with."""
        if self.by == "distill":
            check_strategy(trainer, self.name)
        else:
            BatchJoin.check(pl_module, self.name)
            others = [getattr(c, "_joining", None) for c in callbacks_of(trainer)]
            if sum(isinstance(o, TrainingInjection) and o.by == "batch" for o in others) > 1:
                raise MisconfigurationException(
                    f"{self.name}: expected one callback with train_by='batch', but there are "
                    "several, and each generator would learn from the others' samples. Use "
                    "train_by='distill' in all but one, or leave 'train' out of its `inject`."
                )

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready for a fit, after a checkpoint has been restored."""
        if self.teacher is not None:
            if not self.teacher.fits(pl_module):
                raise MisconfigurationException(
                    f"{self.name}: expected the dense weights (of `teacher`, or kept in the "
                    "checkpoint) to fit the model, but names or shapes differ. Give a copy of this "
                    "model, resume with the model that was pruned, or leave 'train' out of "
                    "`inject`."
                )
            self.teacher = self.teacher.like(pl_module)
        self._mix.begin(trainer)
        if self.by == "batch":
            self._join.attach(trainer, lambda batch: self._with_samples(trainer, pl_module, batch))

    def forget_teacher(self) -> None:
        """Keep no weights but those that were given, and nothing learnt of another model."""
        self.teacher = self._given
        self._mix.forget()

    def keep_teacher(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights as the teacher, if there is none yet."""
        if self.teacher is None:
            if any(pruner.sparsity > 0 for pruner in pruners_of(trainer)):
                rank_zero_warn(
                    f"{self.name}: the model is pruned already (its pruner has masks: given, of a "
                    "checkpoint or of an earlier fit), and no weights of this model from before "
                    "are kept. The teacher is the pruned model as it is now; `teacher=` gives "
                    "another."
                )
            self.teacher = Teacher.of(pl_module)

    def start_epoch(self) -> None:
        """Begin to watch whether anything takes part."""
        # Nothing is missed where nothing was to be expected.
        self._took_part = (
            self.by == "batch" or self.teacher is None or not self.supply.generator.ready
        )
        if self.teacher is not None:
            self._mix.start_epoch()

    def real_part(self, batch: Any) -> Any:
        """Return a training batch without the samples that joined it."""
        return self._join.real_part(batch)

    def before_step(self, trainer: Trainer, pl_module: LightningModule, form: BatchForm) -> None:
        """Draw for the step, so that a fault in a sample is named while nothing is half done."""
        if self.teacher is None or not self.supply.generator.ready:
            return
        if self._adapt:
            self._mix.keep(form)
        if self.by == "distill" and self.mix > 0:
            n = max(1, round(self.share * len(form.inputs)))
            with unlogged(pl_module):
                self._generated = form.fill(self.supply(trainer, pl_module, form, n).inputs)
        self._took_part |= self.mix == 0

    def add_term(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> Tensor | None:
        """Add the term's gradients to an optimizer's; return its loss, if there was one."""
        if self._generated is None or self.teacher is None:
            return None
        with unlogged(pl_module):
            loss = add_training_term(
                trainer,
                pl_module,
                optimizer,
                self._generated,
                self.supply.injection,
                self.teacher,
                mix=self.mix,
            )
        self._took_part |= loss is not None
        return loss

    def after_step(self) -> None:
        """Let go of the step's samples."""
        self._generated, self.samples_joined = None, 0
        self._join.forget()

    def observe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Look at a validation batch, to weigh the samples by."""
        if self._adapt and self.teacher is not None:
            self._mix.observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def finish_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weigh the samples by the validation that ends. Called on all processes."""
        if self._adapt:
            self._mix.finish(trainer, pl_module)

    def end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the weight, and say so if nothing took part where something should have."""
        if not self._took_part:
            rank_zero_warn(
                f"{self.name}: no generated inputs joined the training in this epoch. Either their "
                "gradients were never finite; or the optimizer was stepped past Lightning, which "
                "with manual optimization needs `self.optimizers()`."
            )
        if self._adapt and self.teacher is not None:
            self._mix.end_epoch(trainer, pl_module)

    def end(self) -> None:
        """Undo :meth:`begin`, and hold on to none of the user's data."""
        self.after_step()
        self._join.detach()
        self._mix.release()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain containers."""
        teacher = None if self.teacher is None else dict(self.teacher.weights)
        return {"teacher": teacher, "mix": self._mix.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.teacher = self._given if state["teacher"] is None else Teacher(state["teacher"])
        if "mix" in state:  # not in checkpoints from before it was adapted
            self._mix.load_state_dict(state["mix"])

    # How

    def _with_samples(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Return a training batch with samples behind its own, or as it is."""
        self.samples_joined = 0
        if batch is None:
            return batch
        # Also while nothing joins yet, which may be so for hours.
        self._join.check_labels(read_form(batch, self.name), self.name)
        if self.teacher is None or not self.supply.generator.ready:
            return batch
        form = self.supply.generator.prepare(trainer, batch)
        n = whole(self.share * self.mix * len(form.inputs), self.supply.generator.seen)
        if n == 0:
            return batch
        injection = self.supply.injection
        with unlogged(pl_module):
            inputs, classes = self.supply(trainer, pl_module, form, n)
            with trainer.precision_plugin.forward_context(), torch.no_grad():
                joined = injection.joined(pl_module, form, inputs, classes, self.teacher)
        self.samples_joined = n
        return joined
