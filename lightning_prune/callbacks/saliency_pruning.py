"""Prune while fine-tuning: Lightning's hooks, turned into calls to the other rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune._targets import Threshold
from lightning_prune._types import Likelihood, Masks, Scores
from lightning_prune.callbacks import preflight, pruning_arguments, reporting
from lightning_prune.callbacks.batch_sources import callbacks_of
from lightning_prune.callbacks.clock import Clock
from lightning_prune.callbacks.plan import PruningPlan
from lightning_prune.callbacks.pruner import Pruner
from lightning_prune.callbacks.pruning_state import PruningRecord
from lightning_prune.callbacks.resumption import warn_of_lost_masks
from lightning_prune.callbacks.rewinding import Rewind
from lightning_prune.callbacks.scorer import Scorer
from lightning_prune.callbacks.scoring import ScoringOptions, is_fitting
from lightning_prune.callbacks.shrinking import Shrinking
from lightning_prune.masking import sparsity
from lightning_prune.refit import Refit, refit_method
from lightning_prune.saliency import RandomSigns, Target
from lightning_prune.schedules import Schedule, as_schedule
from lightning_prune.selection import CriterionLike, Selection, resolve_criterion


class SaliencyPruningCallback(Callback):
    """Score a network's weights during validation, remove the least important, train on.

    In an epoch with a target the validation batches (and generated ones, see
    :class:`~lightning_prune.VAEAugmentCallback`) are scored; the masks that follow are put in force
    before the first training step of the next epoch, so that every checkpoint with this epoch's
    metrics holds the weights they were measured on. If the fit ends first, they are put in force at
    its very end. From then on a removed weight is exactly 0.0 after every optimizer step. The model
    keeps its parameters, names and state_dict keys; when the fit is over nothing is left on it.

    Args:
        schedule: When how much is pruned: a mapping epoch -> target, a callable epoch -> target or
            ``None``, or a :class:`~lightning_prune.schedules.Schedule`. Epochs count from 0. A
            target is the share of all prunable weights removed by then, in [0, 1), or
            :class:`~lightning_prune.Threshold`.
        criterion: ``"taylor"`` (w^2 R), ``"obs"``, ``"obc"`` (second order, for linear layers and
            convolutions; go with ``refit``), ``"saliency"`` (R, the published score; far worse),
            ``"magnitude"``, ``"random"``, or a callable (scores, parameters) -> scores. Magnitude
            and random need no scoring pass and no validation.
        target: Which R, as in :func:`~lightning_prune.squared_gradients`.
        likelihood: What the model's output means, as there.
        tolerance: The share of the score's output energy that may be left out to save time.
        signs: Estimate R by random signs, where pixels or tokens predict: exact R takes too long.
        forward: ``forward(module, batch) -> logits`` for batches that the default cannot read.
        parameters: Names, or patterns such as ``"features.*"``, of the parameters to prune; by
            default the weights of all layers with two or more axes, neither biases nor norms.
        exclude: Names or patterns of parameters to leave out of these.
        masks: Those in force from the first step on, by parameter name, ``True`` = kept, such as
            ``prune`` returns. The masks of a checkpoint come before them.
        selection: What is removed as one piece, over what a share is measured, what every layer
            keeps, whether weights come back (:class:`~lightning_prune.Selection`); by default
            single weights over all layers, and no layer is emptied.
        rewind: What is gone back to at every event; by default training goes on.
        refit: Correct the surviving weights at every event, by the inputs that are scored, so that
            the network stays close to what it was just before: ``"outputs"`` its predictions, by
            Gauss-Newton steps; ``"layers"`` each layer's pre-activations, by a closed form, which
            is faster; ``"auto"`` (also ``True``) the outputs where there are 2,000 real inputs,
            else the layers. What makes a held-out tenth of the inputs worse is refused.
        every_n_train_steps: Let the schedule count rounds of so many optimizer steps instead of
            epochs. Round r ends with step ``(r + 1) * every_n_train_steps``; its masks are in force
            from the next training batch on, by the scores of ``scoring_loader``, else of the last
            validation.
        scoring_loader: Batches to score instead of the validation's, at the moment of an event: an
            iterable (no iterator), or the name of a method of the module or datamodule.
        shrink_at_end: After the fit, make a module without what was pruned, :attr:`shrunk`. True
            proves it on samples of the first batch; or give example inputs (extra ``removal``).
        seed: For ``criterion="random"``.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: An argument out of its range. Faults that only the Trainer or the model can show
            are raised at fit start, before the first step, all in one message.

    Example:
        >>> pruner = SaliencyPruningCallback({2: 0.5, 4: 0.8})
        >>> pruner.sparsity, pruner.history
        (0.0, [])
    """

    def __init__(  # noqa: PLR0913  (options of users, given by name)
        self,
        schedule: Schedule
        | dict[int, float | Threshold]
        | Callable[[int], float | Threshold | None],
        *,
        criterion: CriterionLike = "taylor",
        target: Target = "probability",
        likelihood: Likelihood = "categorical",
        tolerance: float = 1e-3,
        signs: RandomSigns | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        parameters: list[str] | None = None,
        exclude: list[str] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        selection: Selection | None = None,
        rewind: Rewind | None = None,
        refit: bool | Refit = False,
        every_n_train_steps: int | None = None,
        scoring_loader: Any = None,
        shrink_at_end: Any = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        pruning_arguments.check_types(selection=selection, rewind=rewind, seed=seed)
        self.schedule = as_schedule(schedule)
        names = pruning_arguments.as_names(parameters=parameters, exclude=exclude)
        self._names, self._exclude = names
        options = ScoringOptions(target, likelihood, tolerance, forward, signs)
        self._pruner = Pruner(
            schedule=self.schedule,
            clock=Clock(every_n_train_steps),
            criterion=resolve_criterion(criterion, seed=seed),
            selection=Selection() if selection is None else selection,
            scorer=Scorer(options, scoring_loader),
            rewind=rewind,
            refit=refit_method(refit),
            masks=masks,
        )
        self._shrinking = Shrinking.of(shrink_at_end, forward)
        self._log = reporting.EpochLog()
        # Lightning asks for it several times a step.
        others = {} if self._exclude is None else {"exclude": self._exclude}
        self._key = self._generate_state_key(parameters=self._names, **others)

    # ------------------------------------------------------------------ what a user reads

    @property
    def masks(self) -> Masks:
        """The masks in force, by parameter name, ``True`` = kept; empty before the first event."""
        return self._pruner.keeper.masks

    @property
    def scores(self) -> Scores:
        """The scores by which the last event decided (the criterion's), by name, on the CPU."""
        return dict(self._pruner.scores)

    @property
    def sparsity(self) -> float:
        """The share of all prunable weights that is removed."""
        return sparsity(self._pruner.keeper.in_force)

    @property
    def shrunk(self) -> LightningModule | None:
        """After a fit with ``shrink_at_end``: a module that does the same with fewer numbers.

        For testing, further training, saving. The module that was trained stays as it is, with
        zeros. None where nothing was made; a warning says why.
        """
        return self._shrinking.module

    @property
    def history(self) -> list[PruningRecord]:
        """One record for each pruning event, oldest first."""
        return [record.copy() for record in self._pruner.state.history]

    def plan(self, module: nn.Module, epochs: int | None = None) -> PruningPlan:
        """Return what is going to be pruned, before the run: print it.

        Args:
            module: The model.
            epochs: How many epochs (or rounds of steps) the run will have; by default as many as
                the schedule.

        Raises:
            ValueError: Names or patterns fit nothing, nothing can be pruned, or a target is wrong.
        """
        return self._pruner.plan(module, self._names, self._exclude, epochs)

    def report(self) -> str:
        """Return the events so far as a table to print."""
        return reporting.table(self._pruner.state.history)

    # ------------------------------------------------------------------ before the first step

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        preflight.refuse_trainer(trainer)
        self._shrinking.start(stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        others = pruners_of(trainer)
        index = others.index(self)
        taken = {name for other in others[:index] for name in other._pruner.parameters}
        self._pruner.set_up(trainer, pl_module, self._names, self._exclude, taken)
        self._pruner.prefix = "prune" if index == 0 else f"prune_{index + 1}"
        self._log.start()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.start(trainer, pl_module)
        self._pruner.scorer.look_ahead(trainer, pl_module, self._pruner.criterion.name)

    # ------------------------------------------------------------------ scoring

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.scorer.step_inputs.watch(pl_module)
        if is_fitting(trainer) and self._pruner.scores_in(trainer):
            self._pruner.scorer.begin(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._pruner.scorer.before_step(batch)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._pruner.scorer.after_step(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_fitting(trainer):
            return
        if self._pruner.scorer.running:
            self._pruner.scored(trainer, self._pruner.scorer.finish(trainer, pl_module))
        self._log(trainer, pl_module, self._metrics())

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._pruner.after_batch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.after_epoch(trainer, pl_module)
        if not self._log.has(trainer.current_epoch):  # no validation in this epoch
            self._log(trainer, pl_module, self._metrics())

    # ------------------------------------------------------------------ masks in force

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.start_epoch(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A run resumed between two epochs may come here without on_train_epoch_start.
        self._shrinking.see(batch)
        self._pruner.keeper.follow(trainer.optimizers)
        if batch_idx == 0:  # somebody may have loaded weights at the start of the epoch
            self._pruner.keeper.zero_weights()
        self._pruner.prune_if_due(trainer, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In manual optimization `self.clip_gradients` comes before the next hook.
        if not pl_module.automatic_optimization:
            self._pruner.keeper.zero_gradients()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # Before they are clipped: gradients of removed weights count in no norm.
        self._pruner.keeper.zero_gradients()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.end(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pending = self._pruner.state.pending
        if pending is not None:
            self._pruner.prune(trainer, pl_module, pending, last=True)
            reporting.log_after_fit(trainer, self._metrics())
        if self._pruner.state.history:
            rank_zero_info(f"Pruning, event by event:\n{self.report()}")
        # Not here: a callback behind this one may yet change the module (batch norm statistics).
        self._shrinking.due = True

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._pruner.interrupt(trainer)
        self._shrinking.let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._pruner.let_go()
        self._shrinking.finish(trainer, pl_module)
        reporting.give_back(self)

    def __getstate__(self) -> dict[str, Any]:
        return reporting.without_lent(self)

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def state_key(self) -> str:
        """Tell apart several pruners in one Trainer, which prune different parameters."""
        return self._key

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if is_fitting(trainer):
            warn_of_lost_masks(self.state_key, pruners_of(trainer), checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._pruner.pack()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pruner.unpack(state_dict)

    def _metrics(self) -> dict[str, float]:
        pruner, masks = self._pruner, self._pruner.keeper.in_force
        return reporting.metrics(pruner.state.history, pruner.parameters, pruner.prefix, masks)


def pruners_of(trainer: Trainer) -> list[SaliencyPruningCallback]:
    """Return the pruners among a Trainer's callbacks."""
    return [c for c in callbacks_of(trainer) if isinstance(c, SaliencyPruningCallback)]
