"""Each validation sample is scored once, though distributed sampling repeats some.

Enters: the batches of a process's shard. Leaves: the same without the samples that it draws only to
make the shards even.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_prune.passes.batches import batch_size, take_samples


def unrepeated(loader: Any) -> float:
    """Return how many of the samples that a loader draws in this process are no repeats.

    They come first: ``DistributedSampler`` deals all samples out in turn and then starts again from
    the first until each process has the same number. Infinite where nothing is known to repeat.

    Args:
        loader: Of this process's shard, as Lightning has prepared it.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> data = range(7)
        >>> def shard(rank):
        ...     return DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=rank))
        >>> [(unrepeated(shard(rank)), len(shard(rank))) for rank in (0, 1)]
        [(4, 4), (3, 4)]
    """
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if batches is None else batches.sampler
    in_order = getattr(loader, "in_order", True) and type(batches) in (BatchSampler, type(None))
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last or not in_order:
        return float("inf")
    size = len(sampler.dataset)  # type: ignore[arg-type]
    return len(range(sampler.rank, size, sampler.num_replicas))


class Shard:
    """Leave out what this process draws for a second time.

    Args:
        loaders: The validation loaders, in the order in which Lightning counts them.
    """

    def __init__(self, loaders: list[Any]) -> None:
        self._left = [unrepeated(loader) for loader in loaders]

    def cut(
        self, batch: Any, logits: Tensor | None, dataloader_idx: int
    ) -> tuple[Any, Tensor | None]:
        """Return the samples of a loader's next batch that are no repeats, and their logits.

        Args:
            batch: N samples.
            logits: (N, ...) what the model says of them, if that is known.
            dataloader_idx: Which loader's.

        Returns:
            The same with N or fewer samples, maybe none: then the batch is ``None``.
        """
        if dataloader_idx >= len(self._left) or self._left[dataloader_idx] == float("inf"):
            return batch, logits
        size, left = batch_size(batch), int(self._left[dataloader_idx])
        self._left[dataloader_idx] = max(0, left - size)
        if size <= left:
            return batch, logits
        if not left:
            return None, None
        if logits is not None:
            logits = logits[:left] if logits.shape[:1] == (size,) else None
        return take_samples(batch, torch.arange(left)), logits


def validation_loaders(trainer: Trainer) -> list[Any]:
    """Return the validation loaders of a fit in the order in which Lightning counts them."""
    loaders = trainer.val_dataloaders
    return [] if loaders is None else list(pytree.tree_leaves(loaders))
