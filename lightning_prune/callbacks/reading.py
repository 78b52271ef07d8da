"""Batches of a fit's loaders, read by callbacks as a validation reads them, without a trace.

Enters: a Trainer in whatever stage, loaders. Leaves: batches on the device. The fit's loaders and
the random generators they hold, the Trainer's stage and the module's mode are as before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from lightning_prune.passes.isolation import evaluating


def read_to_validate(
    trainer: Trainer, batches: Iterable[tuple[Any, int, int]]
) -> Generator[tuple[Any, int, int], None, None]:
    """Yield batches on the device, read and transferred as in a validation, without a trace.

    Exhaust or close it: until then the training's loaders are set aside.

    Args:
        trainer: Of the fit, in whatever stage.
        batches: (batch, its index, its loader's index), read here and not before.
    """
    with undisturbed(trainer):
        with validating(trainer):
            iterator = iter(batches)
        while True:
            with validating(trainer):
                found = next(iterator, None)
                if found is None:
                    return
                batch, batch_idx, dataloader_idx = found
                batch = on_device(trainer, batch, dataloader_idx)
            yield batch, batch_idx, dataloader_idx


def on_device(trainer: Trainer, batch: Any, dataloader_idx: int = 0) -> Any:
    """Take a batch the way that Lightning's loops take it, in the stage that the Trainer is in."""
    batch = trainer.precision_plugin.convert_input(batch)
    module = trainer.lightning_module
    batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """Have Trainer and module say in a block that they validate, as user hooks may ask them.

    A module that augments training batches in ``on_after_batch_transfer`` looks at
    ``trainer.training``, or at its own mode, to leave those of a validation alone.
    """
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        with torch.no_grad(), evaluating(trainer.lightning_module):
            yield
    finally:
        trainer.state.stage = stage


@contextmanager
def undisturbed(trainer: Trainer, *others: Any) -> Iterator[None]:
    """Read loaders in a block without the fit's noticing, also its own while it iterates them.

    Every random generator of its loaders, their samplers and data sets is put back: a pass
    advances them. A training loader with persistent workers has one iterator, which a second pass
    would start anew in the middle of an epoch; in the block it gets another, with workers of its
    own.

    Args:
        trainer: Of the fit.
        others: Loaders besides the fit's to treat as training loaders.
    """
    training = [*_loaders_of(trainer.fit_loop), *others]
    loaders = [*training, *_loaders_of(trainer.fit_loop.epoch_loop.val_loop)]
    restore = [put for part in map(_parts, loaders) for owner in part for put in _restorers(owner)]
    kept = [(loader, loader._iterator) for loader in training if isinstance(loader, DataLoader)]
    for loader, _ in kept:
        loader._iterator = None
    try:
        yield
    finally:
        for loader, iterator in kept:
            stop = getattr(loader._iterator, "_shutdown_workers", None)
            if stop is not None and loader._iterator is not iterator:
                stop()
            loader._iterator = iterator
        for put_back in restore:
            put_back()


def _loaders_of(loop: Any) -> list[Any]:
    source = loop._combined_loader
    return [] if source is None else list(source.flattened)


def _parts(loader: Any) -> list[Any]:
    """Return a loader and what it draws indices and samples from."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = [getattr(loader, name, None) for name in ("sampler", "dataset")]
    return [loader, *parts, batch_sampler, getattr(batch_sampler, "sampler", None)]


def _restorers(owner: Any) -> Iterator[Callable[[], Any]]:
    """Yield what puts each random generator that an object holds back to its present state."""
    for value in list(getattr(owner, "__dict__", {}).values()):
        if isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif hasattr(value, "bit_generator"):  # numpy's
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
