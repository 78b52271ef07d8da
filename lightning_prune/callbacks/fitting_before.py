"""Training batches ahead of the training: a pass over the loader that leaves no trace.

Enters: a Trainer before its first step. Leaves: its training batches, on the device, as often as
wanted; the loader's order in the fit that follows and all random states are what they would be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_prune.callbacks.reading import on_device, undisturbed
from lightning_prune.passes.isolation import own_randomness


def batches_before(
    trainer: Trainer, pl_module: LightningModule, epochs: int, *, seed: int, name: str
) -> Iterator[Any]:
    """Yield the training batches of some epochs, on the model's device.

    Between two batches the random states are the user's; a shuffled order is a function of the
    seed. A progress bar runs along where the Trainer shows one.

    Args:
        trainer: In ``on_train_start``.
        pl_module: Its hooks transfer the batches.
        epochs: How many.
        seed: Of the order, the workers and the user's random transformations.
        name: What to call it in messages.

    Raises:
        MisconfigurationException: The Trainer has several training loaders, an endless one without
            ``limit_train_batches``, or an iterator that could not be read again.
    """
    loader, count = trainer.train_dataloader, trainer.num_training_batches
    if count == float("inf") or not _can_be_read_twice(loader):
        raise MisconfigurationException(
            f"{name}: expected one training loader that ends and can be read again for "
            f"`fit_before`, but got {type(loader).__name__} with {count} batches. Use "
            "`limit_train_batches` where it is endless, or train without `fit_before`."
        )
    own: Any = trainer.progress_bar_callback
    shown = own is not None and getattr(own, "is_enabled", True) and trainer.is_global_zero
    total = epochs * int(count)
    # A data set may hold a random generator, which is nobody's to copy.
    with (
        undisturbed(trainer),
        tqdm(total=total, desc=f"{name} before", disable=not shown) as progress,
    ):
        for epoch in range(epochs):
            for batch in _apart(_untouched(loader, epoch), int(count), seed, epoch):
                with isolate_rng(), own_randomness(pl_module.device, seed, "transfer", progress.n):
                    moved = on_device(trainer, batch)
                yield moved
                progress.update()


def _can_be_read_twice(loader: Any) -> bool:
    return isinstance(loader, Iterable) and not isinstance(loader, (dict, list, tuple, Iterator))


def _untouched(loader: Any, epoch: int) -> Any:
    """Return a twin whose iteration does not advance the loader's samplers and generators."""
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    shared = {id(loader.dataset): loader.dataset}  # the data are not copied
    own = ("sampler", "batch_sampler", "generator")
    copies = copy.deepcopy({part: getattr(loader, part) for part in own}, shared)
    for part, value in copies.items():
        vars(twin)[part] = value
    vars(twin)["_iterator"] = None  # persistent workers stay those of the fit
    samplers: list[Any] = [twin.sampler, getattr(twin.batch_sampler, "sampler", None)]
    for sampler in samplers:
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
    return twin


def _apart(loader: Any, count: int, seed: int, epoch: int) -> Iterator[Any]:
    """Yield a loader's first batches, each fetched on random numbers of our own."""
    cpu = torch.device("cpu")
    with isolate_rng(), own_randomness(cpu, seed, "loader", epoch):
        batches = islice(iter(loader), count)
    for step in range(count):
        with isolate_rng(), own_randomness(cpu, seed, "fetch", epoch, step):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
