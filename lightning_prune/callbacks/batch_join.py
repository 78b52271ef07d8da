"""Generated samples in the user's training batches, for the length of a fit.

Enters: a batch as the strategy has brought it to the device. Leaves: the batch with samples behind
its own, which is the one that hooks and ``training_step`` see. No class of the user's is changed,
and validation, sanity checks and passes of our own see their batches as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_prune.augment.mixing import BatchForm

HOOK = "batch_to_device"
"""The strategy's method by which a batch gets to the device."""

_GOLDEN = (math.sqrt(5) - 1) / 2


class BatchJoin:
    """Lets a function add samples to each training batch, between its transfer and its use.

    Mixed precision, accumulation, clipping and distributed training work as ever, since there is
    one batch and one loss. ``training_step`` and batch-level hooks see B + n samples: batch norm in
    training mode learns from all of them, and what ``self.log(..., batch_size=)`` is told is the
    user's affair.

    Example:
        >>> BatchJoin().real_part("a batch that nothing joined")
        'a batch that nothing joined'
    """

    def __init__(self) -> None:
        self._undo: Callable[[], None] | None = None
        self._joined: Any = None
        self._real: Any = None

    @staticmethod
    def check(pl_module: LightningModule, name: str) -> None:
        """Refuse a ``training_step`` that takes its batches from the loader itself.

        Raises:
            MisconfigurationException: It has the argument ``dataloader_iter``.
        """
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{name}: expected a training_step(batch, batch_idx) for train_by='batch', but "
                f"{type(pl_module).__name__}'s takes a dataloader_iter, so that there is no batch "
                "to join. Take a batch, or leave 'train' out of `inject`."
            )

    @staticmethod
    def check_labels(form: BatchForm, name: str) -> None:
        """Refuse a batch in which real labels could end up beside generated samples.

        What is not known to be the labels would be repeated from unrelated real samples.

        Raises:
            MisconfigurationException: Something else in the batch may be labels.
        """
        if found := form.possible_labels():
            labels = "inputs and labels" if form.labels is not None else "the inputs"
            raise MisconfigurationException(
                f"{name}: expected train_by='batch' to find nothing beside {labels} that may be "
                f"labels, since no label but the one of `(x, y)` or {{'x': x, 'y': y}} can be made "
                f"for generated samples, but the batch also holds {', '.join(found)} with one "
                "entry a sample. Use train_by='distill', which needs no labels, or leave what the "
                "training does not need out of the batch."
            )

    def attach(self, trainer: Trainer, add: Callable[[Any], Any]) -> None:
        """Begin to join; to be undone by :meth:`detach`, also after an exception.

        Args:
            trainer: Of the fit.
            add: A training batch on the device -> the batch with what joins it; the very same
                object if nothing does. What it raises comes before the training step.
        """
        self.detach()
        strategy = trainer.strategy
        before = vars(strategy).get(
            HOOK
        )  # another's wrapper; None if it is the method of its class
        transfer = getattr(strategy, HOOK)

        def batch_to_device(*args: Any, **kwargs: Any) -> Any:
            batch = transfer(*args, **kwargs)
            if self._undo is not undo or not _by_the_training_loop(trainer):
                return batch
            joined = add(batch)
            self._real, self._joined = (None, None) if joined is batch else (batch, joined)
            return joined

        def undo() -> None:
            # Whoever has wrapped it since goes on calling ours, which then passes batches on.
            if vars(strategy).get(HOOK) is batch_to_device:
                delattr(strategy, HOOK)
                if before is not None:
                    setattr(strategy, HOOK, before)

        self._undo = undo
        setattr(strategy, HOOK, batch_to_device)

    def detach(self) -> None:
        """Give the strategy its method back and let go of all batches. May be called twice."""
        undo, self._undo = self._undo, None
        self._real = self._joined = None
        if undo is not None:
            undo()

    def real_part(self, batch: Any) -> Any:
        """Return the batch as it was before samples joined it; any other batch as it is.

        For what should learn from real data only, such as the generator.
        """
        return self._real if self._joined is not None and batch is self._joined else batch

    def forget(self) -> None:
        """Let go of the batch under way, once its step is over."""
        self._real = self._joined = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what belongs to a fit under way."""
        return {**vars(self), "_undo": None, "_real": None, "_joined": None}


def whole(number: float, k: int) -> int:
    """Return a number of samples for batch k, rounded so that its mean over batches is right.

    Up or down by the fractional part of k times the golden ratio: spread evenly over [0, 1) also
    along every m-th batch, so that batches may differ in size, and the same in a resumed run.

    Args:
        number: How many there should be, >= 0.
        k: The number of the batch in the run, from 0.

    Example:
        >>> [whole(0.5, k) for k in range(10)]
        [0, 1, 0, 1, 0, 0, 1, 0, 1, 1]
        >>> {whole(0.29 * 100, k) for k in range(100)}
        {29}
    """
    exact = round(number, 6)  # 0.29 * 100 is a little less than 29
    return math.floor(exact + k * _GOLDEN % 1)


def _by_the_training_loop(trainer: Trainer) -> bool:
    """Tell whether Lightning's training loop is what has a batch transferred.

    Passes of our own (over validation batches, in the middle of an epoch) call the strategy as
    well; the loops do so by a call that notes the hook's name on the model.
    """
    return trainer.training and trainer.lightning_module._current_fx_name == HOOK
