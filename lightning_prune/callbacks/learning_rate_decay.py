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
from lightning_prune.callbacks.batch_sources import callbacks_of
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.reporting import give_back, without_lent

Shape: TypeAlias = Literal["cosine", "linear"]


class LearningRateDecay(Callback):
    """Keep the learning rate while the network is pruned, then let it fall to 0.

    Until ``start`` the learning rates are the user's: high enough for the survivors to take over
    the work of removed weights. From there to the end of the fit those of that moment are
    multiplied by a factor that falls from 1 to 0. That is the
    schedule of a training from scratch, which fine-tuning does best to repeat (Renda, Frankle and
    Carbin, 2020, "Comparing rewinding and fine-tuning in neural network pruning").

    Progress is counted in training batches and, with ``max_steps``, in optimizer steps; what is
    nearer to its end counts. When training has ended or was interrupted, the optimizers have the
    rates from before the decay again. A resumed run goes on exactly, and one that is
    resumed with a larger ``max_epochs`` has its decay where the longer fit has it. During the decay
    the rates are set as every batch begins. What sets others after that, before the optimizer's
    step, is warned of once, as the decay is without effect there; what sets them earlier, such as
    at the start of an epoch, or a :class:`~lightning_prune.Rewind`, is overwritten.

    Args:
        start: Where the decay starts: a float in [0, 1) is a share of the fit; an int, or a whole
            float from 1.0 on (as configuration files give it), is an epoch, counted from 0: with
            its first batch, whatever is counted from there on.
        shape: ``"cosine"``: (1 + cos(pi x)) / 2; ``"linear"``: 1 - x; x in [0, 1) is the progress
            since ``start``.

    Raises:
        ValueError: Arguments out of range; one message names them all.
        PruningSetupError: In a fit: the module has learning rate schedulers of its own, there is a
            StochasticWeightAveraging, an optimizer has no learning rate (``lr=None``), or the fit's
            length is unknown.

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
        self._first_step: int | None = None  # of the epoch `start`, once that has begun
        self._restored = self._warned = False

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
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if not isinstance(group.get("lr"), int | float | Tensor):
                    raise PruningSetupError(
                        "LearningRateDecay: expected optimizers with a learning rate, but a group "
                        f"of {type(optimizer).__name__} has lr={group.get('lr')!r}, so it makes "
                        "one of its own. Give it a rate, or leave LearningRateDecay out "
                        "(`decay=False` in a recipe)."
                    )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restored:
            self._base, self._factor, self._first_step = [], 1.0, None
        self._warned = False
        self._note_rates(trainer)
        if not _ends(trainer):
            raise PruningSetupError(
                "LearningRateDecay: expected a fit whose length is known, but the training loader "
                "has none or nothing limits the epochs (`max_time` is no length). Set `max_steps`, "
                "or `max_epochs` and an int `limit_train_batches`, in the Trainer, or leave "
                "LearningRateDecay out (`decay=False` in a recipe)."
            )
        epochs = trainer.max_epochs
        if isinstance(self.start, int) and epochs is not None and 0 <= epochs <= self.start:
            self._warn_of_no_decay(trainer)

    def _warn_of_no_decay(self, trainer: Trainer) -> None:
        if not (self._warned or getattr(trainer, "fast_dev_run", False)):
            self._warned = True
            rank_zero_warn(
                f"LearningRateDecay(start={self.start}): the fit ends before the decay starts."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first_step is None and self._has_begun(trainer):
            self._first_step = self._steps_at_start(trainer, batch_idx)
        progress = self._progress(trainer, batch_idx)
        factor = min((self.factor(*counted) for counted in progress), default=1.0)
        # Rates are written from the decay on only: until then they are the user's affair.
        if factor != 1.0 or self._factor != 1.0:
            if self._factor == 1.0:
                self._base = []
            self._apply(trainer, factor)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if self._factor == 1.0 or self._warned:
            return
        for each, rates in zip(trainer.optimizers, self._base, strict=False):
            for group, rate in zip(each.param_groups, rates, strict=False):
                found, written = group["lr"], rate * self._factor
                if isinstance(found, Tensor) and found.device.type != "cpu":
                    continue  # to look at it would wait for the device in every step
                if not math.isclose(found, written, rel_tol=1e-4, abs_tol=1e-30):
                    self._warned = True
                    rank_zero_warn(
                        f"LearningRateDecay: expected the learning rate {written:.3g} that it has "
                        f"set for this step, but {float(found):.3g} stands in the optimizer: "
                        "something else sets it (`on_train_batch_start`, `optimizer_step`, a "
                        "callback), and there is no decay. Have that end before "
                        f"start={self.start}, or leave LearningRateDecay out (`decay=False` in a "
                        "recipe)."
                    )
                    return

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first_step is None and 0 <= trainer.max_steps <= trainer.global_step:
            self._warn_of_no_decay(trainer)
        self._give_back(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if self._factor != 1.0:
            self._apply(trainer, 1.0)

    def _has_begun(self, trainer: Trainer) -> bool:
        return not isinstance(self.start, int) or trainer.current_epoch >= self.start

    def _steps_at_start(self, trainer: Trainer, batch_idx: int) -> int:
        """Return the optimizer steps before the epoch ``start``, at its first batch or later."""
        epochs = float(trainer.current_epoch)
        if not math.isinf(trainer.num_training_batches):
            epochs += batch_idx / trainer.num_training_batches
        # Later only in a run resumed without a state of this callback: as if all epochs were alike.
        return round(trainer.global_step * self.start / epochs) if epochs else 0

    def _progress(self, trainer: Trainer, batch_idx: int) -> list[tuple[float, float, float]]:
        """Return where the fit is, where it ends and where the decay starts, in batches and steps.

        Only what has an end; nothing before the epoch of the start.
        """
        if not self._has_begun(trainer):
            return []
        counted: list[tuple[float, float, float]] = []
        if _ends_by_epochs(trainer):
            epoch, epochs = trainer.num_training_batches, trainer.max_epochs or 0
            total = float(epochs * epoch)
            start = self.start * (epoch if isinstance(self.start, int) else total)
            counted.append((trainer.current_epoch * epoch + batch_idx, total, start))
        if trainer.max_steps != -1:
            total, first = float(trainer.max_steps), float(self._first_step or 0)
            start = first if isinstance(self.start, int) else self.start * total
            counted.append((trainer.global_step, total, start))
        return counted

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
        return {
            "base": [list(rates) for rates in self._base],
            "factor": self._factor,
            "start": self.start,
            "first_step": self._first_step,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base = [list(rates) for rates in state_dict["base"]]
        self._factor = state_dict["factor"]
        same = state_dict.get("start") == self.start
        self._first_step = state_dict.get("first_step") if same else None
        self._restored = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = False
        give_back(self)

    def __getstate__(self) -> dict[str, Any]:
        return without_lent(self)


def _ends_by_epochs(trainer: Trainer) -> bool:
    epochs = trainer.max_epochs
    return epochs is not None and epochs >= 0 and not math.isinf(trainer.num_training_batches)


def _ends(trainer: Trainer) -> bool:
    return trainer.max_steps != -1 or _ends_by_epochs(trainer)
