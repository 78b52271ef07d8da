"""One scoring pass: the validation batches of an epoch, and generated ones, to R.

Enters: batches, as Lightning hands them to a validation hook. Leaves: the squared gradients, summed
over batches and processes, and what they cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_prune._types import Forward, Scores
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.saliency import Likelihood, SaliencyAccumulator, Target, unwrap_logits


@runtime_checkable
class BatchSource(Protocol):
    """A callback that has batches of its own to add to a scoring pass."""

    inject: tuple[str, ...]

    def scoring_batches(
        self, trainer: Trainer, pl_module: LightningModule, samples: int
    ) -> Iterator[Any]:
        """Yield batches in the form of the user's own, to stand beside ``samples`` real samples."""

    def before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note that masks are about to change."""


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return a Trainer's callbacks, an attribute which Lightning does not declare."""
    return list(getattr(trainer, "callbacks", ()))


def batch_sources(trainer: Trainer) -> list[BatchSource]:
    """Return the callbacks of a Trainer that take part in scoring."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, BatchSource)]


@dataclass(frozen=True)
class ScoringOptions:
    """What is scored and how; the arguments mean what they mean for ``squared_gradients``.

    Raises:
        ValueError: An argument is not among its values; the message lists every fault.
        TypeError: ``forward`` cannot be called.
    """

    target: Target = "probability"
    likelihood: Likelihood = "categorical"
    tolerance: float = 1e-3
    forward: Forward | None = None

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
        self._accumulator = options.accumulator(module, names)
        self._seconds = 0.0
        self._outputs: list[Any] = []
        self._hook = None if options.forward else module.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Remember what the validation step has computed already."""
        self._outputs.append(output)

    def close(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def add(self, batch: Any) -> None:
        """Score one batch; the output of the step that just ran on it saves a forward pass."""
        start = time.perf_counter()
        outputs, self._outputs = self._outputs, []
        self._accumulator.update(batch, _logits(outputs))
        self._outputs.clear()  # the scoring pass runs the model, too
        self._seconds += time.perf_counter() - start

    def add_generated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score what other callbacks put beside the real samples seen so far."""
        real = self._accumulator.samples
        for source in batch_sources(trainer):
            if real and "saliency" in source.inject:
                for batch in source.scoring_batches(trainer, pl_module, real):
                    self.add(batch)

    def finish(self, trainer: Trainer) -> ScoringResult | None:
        """Sum over all processes; ``None`` if nothing was scored anywhere."""
        self.close()
        start = time.perf_counter()
        local = torch.tensor(self._accumulator.samples, device=trainer.strategy.root_device)
        samples = int(trainer.strategy.reduce(local, reduce_op="sum"))
        if not samples:
            return None
        scores = self._accumulator.compute()
        seconds = self._seconds + time.perf_counter() - start
        return ScoringResult(scores, samples, self._accumulator.dropped_energy, seconds)


def _logits(outputs: list[Any]) -> Tensor | None:
    """Return the logits of a step that has called the model once, in full precision.

    Whether they are those of the batch is checked where they are used.
    """
    if len(outputs) != 1:
        return None
    logits = getattr(outputs[0], "logits", outputs[0])
    full = isinstance(logits, Tensor) and logits.dtype in (torch.float32, torch.float64)
    return unwrap_logits(outputs[0]) if full else None


def is_fitting(trainer: Trainer) -> bool:
    """Return whether this is the fit itself: not its sanity check, nor ``trainer.validate``."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def is_last_validation(trainer: Trainer) -> bool:
    """Return whether no later validation is known to come in this epoch; ``True`` if in doubt."""
    every: Any = trainer.val_check_batch  # None or inf where validation goes by time or by epoch
    left = trainer.num_training_batches - (trainer.fit_loop.epoch_loop.batch_idx + 1)
    if trainer.max_steps != -1:
        steps = trainer.max_steps - trainer.global_step
        left = min(left, steps * trainer.accumulate_grad_batches)
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
