"""One scoring pass: the validation batches of an epoch, and generated ones, to R.

Enters: batches, as Lightning hands them to a validation hook. Leaves: the squared gradients, summed
over batches and processes, and what they cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_prune._types import Forward, Likelihood, Scores
from lightning_prune.callbacks.batch_sources import added_batches
from lightning_prune.callbacks.pooling import Pool
from lightning_prune.callbacks.resumption import validation_batches
from lightning_prune.callbacks.shards import Shard, validation_loaders
from lightning_prune.callbacks.step_outputs import StepOutputs
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.saliency import (
    RandomSigns,
    SaliencyAccumulator,
    Target,
    default_forward,
)
from lightning_prune.saliency.parameters import check_scores
from lightning_prune.saliency.signs import check_signs


@dataclass(frozen=True)
class ScoringOptions:
    """What is scored and how; the arguments mean what they mean for ``squared_gradients``.

    Raises:
        ValueError: An argument is not among its values; the message lists every fault.
        TypeError: ``forward`` cannot be called, or ``signs`` is no RandomSigns.
    """

    target: Target = "probability"
    likelihood: Likelihood = "categorical"
    tolerance: float = 1e-3
    forward: Forward | None = None
    signs: RandomSigns | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        faults = [
            f"Expected argument `{name}` to be one of {get_args(values)}, but got {value!r}."
            for name, value, values in (
                ("target", self.target, Target),
                ("likelihood", self.likelihood, Likelihood),
            )
            if value not in get_args(values)
        ]
        tolerance: Any = self.tolerance
        if isinstance(tolerance, bool) or not (
            isinstance(tolerance, (int, float)) and 0 <= tolerance < 1
        ):
            faults.append(f"Expected argument `tolerance` to be in [0, 1), but got {tolerance!r}.")
        if faults:
            raise ValueError(" ".join(faults))
        check_signs(self.signs)
        if self.forward is not None and not callable(self.forward):
            raise TypeError(
                "Expected argument `forward` to be a callable (module, batch) -> logits, but got "
                f"{self.forward!r}."
            )

    def accumulator(self, module: nn.Module, names: list[str]) -> SaliencyAccumulator:
        """Return an empty accumulator for the named parameters of a module."""
        return SaliencyAccumulator(
            module,
            target=self.target,
            likelihood=self.likelihood,
            tolerance=self.tolerance,
            forward=self.forward,
            parameters=names,
            signs=self.signs,
        )


@dataclass(frozen=True)
class ScoringResult:
    """R of one pass, the samples it is summed over, the share left out, and the seconds it took."""

    scores: Scores
    samples: int
    dropped_energy: float
    seconds: float


class ScoringPass:
    """Collect the scores of one validation.

    Args:
        module: The bare model, not a wrapper for distributed training: its hooks would reduce
            gradients that are none of training's.
        names: The parameters to score.
        options: What is scored and how.
    """

    def __init__(self, module: nn.Module, names: list[str], options: ScoringOptions) -> None:
        self._module = module
        self._accumulator = options.accumulator(module, names)
        self._seconds = 0.0
        self._outputs = StepOutputs(module, watch=options.forward is None)
        self._forward, self._draws = options.forward, options.signs is not None
        self._shard: Shard | None = None
        self._pool = Pool()
        self._seen: set[tuple[int, int]] = set()
        self._waiting: set[tuple[int, int]] = set()  # of these: in the pool
        self._scored_here = False

    def close(self) -> None:
        """Take the hook off the model."""
        self._outputs.close()

    def add(
        self,
        batch: Any,
        trainer: Trainer | None = None,
        dataloader_idx: int = 0,
        batch_idx: int | None = None,
    ) -> None:
        """Score one batch; the output of the step that just ran on it saves a forward pass.

        Args:
            batch: N samples.
            trainer: Whose validation it is from: samples that a distributed sampler repeats to
                make shards even are left out. ``None`` scores the batch as it is.
            dataloader_idx: Which of its loaders it is from.
            batch_idx: Its number there. A batch that was added before is left out.
        """
        logits = self._outputs.take()
        if batch_idx is not None:
            if (dataloader_idx, batch_idx) in self._seen:
                return
            self._seen.add((dataloader_idx, batch_idx))
            self._waiting.add((dataloader_idx, batch_idx))
        if trainer is not None:
            self._shard = self._shard or Shard(validation_loaders(trainer))
            batch, logits = self._shard.cut(batch, logits, dataloader_idx)
        if batch is not None:
            self._put(batch, logits)

    def _put(self, batch: Any, logits: Tensor | None) -> None:
        # Without logits a pass over the batch comes first, and that over a whole pool may be large.
        if logits is not None and self._pool.put(batch, logits):
            if self._pool.full:
                self.score_pool()
            return
        self.score_pool()
        if logits is None or not self._pool.put(batch, logits):
            self._score(batch, logits)
            self._waiting.clear()

    def score_pool(self) -> None:
        """Score the batches that wait for others, with the weights as they are now."""
        if (pooled := self._pool.take()) is not None:
            self._score(*pooled)
        self._waiting.clear()

    def _score(self, batch: Any, logits: Tensor | None) -> None:
        start = time.perf_counter()
        self._accumulator.update(batch, logits)
        self._seconds += time.perf_counter() - start
        self._scored_here = True
        self._outputs.forget()  # the scoring pass runs the model, too

    def complete(self, trainer: Trainer) -> None:
        """Score the batches of the fit's validation that have not been added.

        For runs that were resumed in the middle of a validation: Lightning goes on with the next
        epoch, or sees the first batches only.
        """
        with isolate_rng():  # to iterate a loader draws a seed
            for batch, batch_idx, dataloader_idx in validation_batches(trainer):
                if (dataloader_idx, batch_idx) not in self._seen and self._outputs.watching:
                    # As the validation step does it, so that pools and scores are the same.
                    with torch.no_grad(), trainer.precision_plugin.forward_context():
                        default_forward(self._module, batch)
                self.add(batch, trainer, dataloader_idx, batch_idx)

    def add_generated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score what other callbacks put beside the real samples seen so far."""
        self.score_pool()
        if real := self._accumulator.samples:
            for batch in added_batches(trainer, pl_module, real, self._forward):
                self.add(batch)

    def finish(self, trainer: Trainer) -> ScoringResult | None:
        """Sum over all processes; ``None`` if nothing was scored anywhere.

        All processes get the same bits, and so come to the same masks.

        Raises:
            SaliencyError: A parameter never had a gradient path to the output.
            NonFiniteScoresError: A score is not finite.
        """
        self.score_pool()
        self.close()
        start = time.perf_counter()
        mine = self._accumulator
        counts = torch.stack([mine.samples_seen, mine.energy, mine.dropped])
        samples, energy, dropped = summed(trainer, counts).tolist()
        if not samples:
            return None
        # A small set has no sample for the last of many processes.
        local = mine.checked_sums() if self._scored_here else mine.sums
        scores = {name: summed(trainer, total) for name, total in local.items()}
        check_scores(scores)
        seconds = self._seconds + time.perf_counter() - start
        return ScoringResult(scores, int(samples), dropped / energy if energy else 0.0, seconds)

    # ------------------------------------------------------------------ a checkpoint in the middle

    def state(self) -> dict[str, Any] | None:
        """Return the sums so far in plain tensors and containers, for :meth:`load_state`.

        ``None`` where several processes score, as a checkpoint holds what one of them knows, and
        where signs are drawn at random, each after those before. The resumed run then scores all
        batches anew, see :meth:`complete`. What waits in a pool counts as not seen: its batches
        come again, in the same pool.
        """
        if _is_distributed() or self._draws:
            return None
        mine = self._accumulator
        return {
            "sums": {name: total.detach().cpu().clone() for name, total in mine.sums.items()},
            "counts": [float(mine.samples_seen), float(mine.energy), float(mine.dropped)],
            "seen": sorted(self._seen - self._waiting),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`: same model, same weights, same validation batches.

        Does nothing where several processes score: the sums are those of a single one.
        """
        if _is_distributed():
            return
        mine = self._accumulator
        for name, total in mine.sums.items():
            total.copy_(state["sums"][name])
        for tensor, value in zip(
            (mine.samples_seen, mine.energy, mine.dropped), state["counts"], strict=True
        ):
            tensor.fill_(value)
        self._seen = {(dataloader_idx, batch_idx) for dataloader_idx, batch_idx in state["seen"]}


def summed(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum over all processes, which may overwrite ``tensor``: the pass is over."""
    if trainer.world_size == 1:
        return tensor
    # NCCL reduces nothing but what is on the device.
    summed: Tensor = trainer.strategy.reduce(
        tensor.to(trainer.strategy.root_device).contiguous(), reduce_op="sum"
    )
    return summed.to(tensor.device)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_fitting(trainer: Trainer) -> bool:
    """Return whether this is the fit itself: not its sanity check, nor ``trainer.validate``."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def is_last_validation(trainer: Trainer) -> bool:
    """Return whether no later validation is known to come in this epoch; ``True`` if in doubt."""
    every: Any = trainer.val_check_batch  # None or inf where validation goes by time or by epoch
    left = trainer.num_training_batches - (trainer.fit_loop.epoch_loop.batch_idx + 1)
    if trainer.max_steps != -1:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if trainer.lightning_module.automatic_optimization:
            batches_a_step: float = trainer.accumulate_grad_batches
        else:  # several optimizers, or a step every few batches
            batches_a_step = batches / max(1, trainer.global_step)
        left = min(left, (trainer.max_steps - trainer.global_step) * batches_a_step)
    unknown = not isinstance(every, int) or left == float("inf")
    return unknown or trainer.should_stop or every > left


@contextmanager
def refused_in(epoch: int) -> Iterator[None]:
    """Name the epoch of an event that is refused because of NaN or infinity."""
    try:
        yield
    except NonFiniteScoresError as error:
        raise NonFiniteScoresError(
            f"The pruning event of epoch {epoch} is refused and the weights are untouched. {error}"
        ) from error
