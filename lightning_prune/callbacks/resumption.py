"""What Lightning leaves out when it resumes: validations, or the last batches of one.

Enters: a Trainer that goes on from a checkpoint. Leaves: which validation will not come, and the
batches it would have seen. Where in an epoch a checkpoint was written must not change an event.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_prune.callbacks.reading import read_to_validate


def warn_of_lost_masks(
    state_key: str, pruners: Sequence[Callback], checkpoint: dict[str, Any]
) -> None:
    """Warn if a pruner finds no state in a checkpoint that has one of a pruner set up otherwise."""
    states = checkpoint.get("callbacks") or {}
    kind = state_key.partition("{")[0] + "{"
    found = {key for key in states if key.startswith(kind)}
    lost = found - {pruner.state_key for pruner in pruners}
    if lost and state_key not in states:
        rank_zero_warn(
            f"The checkpoint has no masks of {state_key}, but those of {', '.join(sorted(lost))}, "
            "which is no callback of this run: what that one removed will grow back. To go on with "
            "its masks give the same `parameters` and `exclude` as then."
        )


def skipped_validation(trainer: Trainer) -> int | None:
    """Return the epoch of a validation that Lightning takes as done although it may not be.

    To be asked in ``on_train_start``. If the last training step in the checkpoint is one that a
    validation follows, Lightning goes on after that validation: also if the checkpoint was written
    before it, by a callback that saves after training steps, or in its course. The weights are
    those that it would have seen. ``None`` if there is no such validation.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = trainer.fit_loop.epoch_progress.current
    batches, epoch = loop.batch_progress, progress.started - 1
    every_epochs, every_batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or loop.val_loop.restarted_mid_evaluation:
        return None
    if every_epochs is None or not batches.current.ready or (epoch + 1) % every_epochs:
        return None
    if not isinstance(every_batches, int):  # where an epoch's length is not known
        return epoch if batches.is_last_batch else None
    return None if batches.current.ready % every_batches else epoch


def skipped_epoch_end(trainer: Trainer) -> int | None:
    """Return the epoch whose ``on_train_epoch_end`` Lightning leaves out, ``None`` if none.

    To be asked in ``on_train_start``. A checkpoint written in ``on_train_batch_end`` of an epoch's
    last batch is resumed with the first batch of the next, without its ``on_train_epoch_start``.
    """
    batches = trainer.fit_loop.epoch_loop.batch_progress
    between = batches.is_last_batch and batches.current.ready > batches.current.completed
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.started - 1 if between else None


def starts_in_the_middle(trainer: Trainer) -> bool:
    """Tell, when a validation starts, whether Lightning takes some of its batches as done.

    It does in a run resumed from a checkpoint written within a validation step. As loaders start
    from their first batch all the same, such a validation leaves out its last batches.
    """
    return trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready > 0


def is_last_batch(trainer: Trainer) -> bool:
    """Tell, at the end of a validation batch, whether it was the fit's validation's last one."""
    return trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch


def validation_batches(trainer: Trainer) -> Generator[tuple[Any, int, int], None, None]:
    """Yield what a validation of this fit would see: batch, its index, its loader's index."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    source = loop._combined_loader
    if source is None:
        return
    # One of our own: Lightning's may be half-way through its validation.
    loaders = CombinedLoader(source.iterables, source._mode)
    loaders.limits = trainer.num_val_batches
    yield from read_to_validate(trainer, loaders)
