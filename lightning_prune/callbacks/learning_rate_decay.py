"""The learning rate over a pruning run: the user's while weights are removed, then down to 0."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune._targets import is_number
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.reporting import give_back, without_lent
from lightning_prune.callbacks.scoring import callbacks_of

Shape: TypeAlias = Literal["cosine", "linear"]


class LearningRateDecay(Callback):
    """Keep the learning rate while the network is pruned, then let it fall to 0.

    Until ``start`` the learning rates are the user's: high enough for the survivors to take over
    the work of removed weights. From there to the end of the fit those of that moment are
    multiplied by a factor that falls from 1 to 0. That is the
    schedule of a training from scratch, which fine-tuning does best to repeat (Renda, Frankle and
    Carbin, 2020, "Comparing rewinding and fine-tuning in neural network pruning").

    Progress is counted in training batches, or in optimizer steps where ``max_steps`` ends the fit.
    When training has ended or was interrupted, the optimizers have the rates from before the decay
    again. A resumed run goes on exactly, and one that is
    resumed with a larger ``max_epochs`` has its decay where the longer fit has it.

    Args:
        start: Where the decay starts: a float in [0, 1) is a share of the fit; an int, or a whole
            float from 1.0 on (as configuration files give it), is an epoch, counted from 0.
        shape: ``"cosine"``: (1 + cos(pi x)) / 2; ``"linear"``: 1 - x; x in [0, 1) is the progress
            since ``start``.

    Raises:
        ValueError: Arguments out of range; one message names them all.
        PruningSetupError: In a fit: the module has learning rate schedulers of its own, there is a
            StochasticWeightAveraging, or the fit's length is unknown.

    Example:
        >>> decay = LearningRateDecay(start=0.5)
        >>> [round(decay.factor(now, 8, 4), 3) for now in range(9)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def __init__(self, start: float = 2 / 3, *, shape: Shape = "cosine") -> None:
        super().__init__()
        faults = []
        value: Any = start
        if isinstance(value, float) and value >= 1 and value.is_integer():
            value = start = int(value)
        fine = value >= 0 if isinstance(value, int) else is_number(value) and 0 <= value < 1
        if isinstance(value, bool) or not fine:
            faults.append(f"`start`: expected a share in [0, 1) or an epoch, but got {start!r}")
        if shape not in get_args(Shape):
            faults.append(f"`shape`: expected one of {get_args(Shape)}, but got {shape!r}")
        if faults:
            raise ValueError("\n- ".join(["LearningRateDecay cannot use its arguments:", *faults]))
        self.start, self.shape = start, shape
        self._base: list[list[float]] = []
        self._factor = 1.0
        self._restored = False

    def factor(self, now: float, total: float, start: float) -> float:
        """Return the factor of the learning rates after ``now`` of ``total`` batches or steps.

        Args:
            now: Batches or steps before this one.
            total: Those of the whole fit.
            start: Those before the decay.
        """
        if now <= start or start >= total:
            return 1.0
        x = min(1.0, (now - start) / (total - start))
        return 0.5 * (1.0 + math.cos(math.pi * x)) if self.shape == "cosine" else 1.0 - x

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.lr_scheduler_configs:
            names = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
            raise PruningSetupError(
                "LearningRateDecay: expected optimizers without learning rate schedulers, but "
                f"configure_optimizers returns {', '.join(names)}. Return the optimizers alone, or "
                "leave LearningRateDecay out (`decay=False` in a recipe)."
            )
        if any(isinstance(c, StochasticWeightAveraging) for c in callbacks_of(trainer)):
            raise PruningSetupError(
                "LearningRateDecay: expected to be alone with the learning rate, but "
                "StochasticWeightAveraging sets it as well. Leave one of them out (in a recipe "
                "`decay=False`)."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restored:
            self._base, self._factor = [], 1.0
        self._note_rates(trainer)
        _, total, start = self._progress(trainer, 0)
        if math.isinf(total):
            raise PruningSetupError(
                "LearningRateDecay: expected a fit whose length is known, but the training loader "
                "has none or nothing limits the epochs. Set `max_steps` in the Trainer."
            )
        if start >= total and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"LearningRateDecay(start={self.start}): the fit ends before the decay starts."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        factor = self.factor(*self._progress(trainer, batch_idx))
        # Rates are written from the decay on only: until then they are the user's affair.
        if factor != 1.0 or self._factor != 1.0:
            if self._factor == 1.0:
                self._base = []
            self._apply(trainer, factor)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if self._factor != 1.0:
            self._apply(trainer, 1.0)

    def _progress(self, trainer: Trainer, batch_idx: int) -> tuple[float, float, float]:
        """Return where the fit is, where it ends and where the decay starts, in one unit."""
        epoch: float = trainer.num_training_batches
        epochs = trainer.max_epochs
        now = trainer.current_epoch * epoch + batch_idx if trainer.current_epoch else batch_idx
        total = math.inf if epochs is None or epochs < 0 else epochs * epoch
        if trainer.max_steps != -1:
            in_steps = self._steps_of_an_epoch(trainer, epoch, now)
            ends = math.inf if epochs is None or epochs < 0 else epochs * in_steps
            if trainer.max_steps < ends:
                epoch, now, total = in_steps, trainer.global_step, trainer.max_steps
        start = self.start * (epoch if isinstance(self.start, int) else total) if self.start else 0
        return now, total, start

    def _steps_of_an_epoch(self, trainer: Trainer, epoch: float, batches: float) -> float:
        """Return how many optimizer steps an epoch has, after so many batches of the fit."""
        if math.isinf(epoch):
            return math.inf
        if batches and not trainer.lightning_module.automatic_optimization:
            return epoch * trainer.global_step / batches  # a batch may have several, or none
        return -(-epoch // trainer.accumulate_grad_batches)

    def _note_rates(self, trainer: Trainer) -> None:
        """Take down the rates of optimizers and parameter groups that are new."""
        for index, optimizer in enumerate(trainer.optimizers):
            if index == len(self._base):
                self._base.append([])
            known = self._base[index]
            known += [float(group["lr"]) for group in optimizer.param_groups[len(known) :]]

    def _apply(self, trainer: Trainer, factor: float) -> None:
        self._note_rates(trainer)
        self._factor = factor
        for optimizer, rates in zip(trainer.optimizers, self._base, strict=False):
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                if isinstance(group["lr"], Tensor):  # captured in graphs: it has to stay itself
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"base": [list(rates) for rates in self._base], "factor": self._factor}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base = [list(rates) for rates in state_dict["base"]]
        self._factor = state_dict["factor"]
        self._restored = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = False
        give_back(self)

    def __getstate__(self) -> dict[str, Any]:
        return without_lent(self)
