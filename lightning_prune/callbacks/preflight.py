"""Everything that can be known to fail before the first training step, said before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from lightning_prune._targets import Target
from lightning_prune._types import Forward, Likelihood, Masks
from lightning_prune.callbacks.clock import Clock
from lightning_prune.callbacks.reading import on_device, undisturbed
from lightning_prune.callbacks.rewinding import Rewind
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.masking import Prunable, find_prunable
from lightning_prune.passes.batches import few_samples
from lightning_prune.passes.isolation import evaluating
from lightning_prune.refit import check_priced
from lightning_prune.saliency import SaliencyAccumulator
from lightning_prune.schedules import Schedule, planned_targets
from lightning_prune.selection import Criterion, Selection

SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
"""Strategies under which no process holds a whole parameter or gradient."""


class PruningSetupError(MisconfigurationException, ValueError):
    """Trainer, model and arguments do not fit together; the message lists every fault."""


def refuse_trainer(trainer: Any) -> None:
    """Refuse Trainers that cannot prune.

    Raises:
        PruningSetupError: It comes from the other Lightning package, or shards the parameters.
    """
    if not isinstance(trainer, Trainer):
        raise PruningSetupError(
            "Expected a Trainer of the package `lightning` (`import lightning as L`), but got "
            f"{type(trainer).__module__}.{type(trainer).__qualname__}. The two do not mix: import "
            "the Trainer and your module from `lightning`."
        )
    if isinstance(trainer.strategy, SHARDING):
        raise PruningSetupError(
            "Expected a strategy that keeps each parameter whole on every process (one device, or "
            f"DDP), but got {type(trainer.strategy).__name__}, which shards parameters: per-weight "
            "scores and masks do not follow the shards. Train with strategy='ddp'."
        )


def check_setup(  # noqa: PLR0913  (all faults in one message)
    trainer: Trainer,
    module: nn.Module,
    *,
    schedule: Schedule,
    clock: Clock,
    criterion: Criterion,
    selection: Selection,
    names: list[str] | None,
    exclude: list[str] | None,
    rewind: Rewind | None,
    refit: str | None,
    own_loader: bool,
    taken: Collection[str],
    held: Mapping[str, Tensor],
) -> tuple[dict[str, nn.Parameter], dict[int, Target] | None]:
    """Check at fit start that Trainer, model and arguments fit together.

    Args:
        trainer: About to fit.
        module: The model.
        schedule: When how much is to be pruned.
        clock: What the schedule counts.
        criterion: By what.
        selection: In which pieces.
        names: Which parameters; ``None`` for the default.
        exclude: Which not.
        rewind: What is gone back to at an event.
        refit: Which refit follows the removal.
        own_loader: Whether the weights are scored on a loader of their own.
        taken: The parameters that another pruner of this Trainer prunes.
        held: Masks and scores from a checkpoint or an earlier fit.

    Returns:
        The parameters to prune by name, and the events of the run (``None`` if unknown).

    Raises:
        PruningSetupError: They do not; the message lists every fault.
    """
    faults: list[str] = []
    events = plan_events(trainer, schedule, clock, faults)
    if criterion.needs_scores and not own_loader:
        faults += validation_faults(trainer, events, criterion.name, clock)
    faults += _rewind_faults(rewind, events, clock)
    if events is None or events:
        faults += _refit_faults(trainer, refit, rewind, criterion, own_loader)
    parameters: dict[str, nn.Parameter] = {}
    try:
        prunable = find_prunable(module, names, exclude=exclude, held=held)
        parameters = prunable.parameters
    except ValueError as error:
        faults.append(str(error))
    else:
        faults += _held_faults(held, prunable)
        faults += selection.faults(parameters, (events or {}).values())
    if selection.regrow > 0 and not criterion.needs_scores:
        faults.append(
            f"regrow={selection.regrow} compares weights by R, but criterion={criterion.name!r} "
            "has no use for it and none is computed. Choose 'taylor' or 'saliency'."
        )
    shared = [name for name in parameters if name in taken]
    if shared:
        faults.append(f"Two pruners of one Trainer share {shared}: give each its own `parameters`.")
    if faults:
        raise PruningSetupError("\n".join(faults))
    return parameters, events


def _refit_faults(
    trainer: Trainer,
    refit: str | None,
    rewind: Rewind | None,
    criterion: Criterion,
    own_loader: bool,
) -> list[str]:
    """Say what a refit or second-order prices lack."""
    faults = []
    if refit is not None and rewind is not None and rewind.what == "weights":
        faults.append(
            f"refit={refit!r} corrects the weights that {rewind} throws away: choose one of "
            "them, or rewind the learning rate only."
        )
    wanted = f"refit={refit!r}" if refit is not None else f"criterion={criterion.name!r}"
    calibrated = refit is not None or criterion.needs_prices
    if calibrated and not own_loader and not trainer.enable_validation:
        faults.append(
            f"{wanted} is calibrated by the validation inputs, but this fit has no validation. "
            "Give it a validation loader, or scoring_loader=."
        )
    return faults


def plan_events(
    trainer: Trainer, schedule: Schedule, clock: Clock, faults: list[str]
) -> dict[int, Target] | None:
    """Return the events of the run, ``None`` if unknown; add what is wrong to ``faults``."""
    counts = clock.total(trainer)
    if counts is None:  # nothing known limits the fit
        if schedule.last_epoch is None:
            return None
        counts = schedule.last_epoch + 1
    try:
        return planned_targets(schedule, range(counts))
    except ValueError as error:
        faults.append(str(error))
        return None


def _held_faults(held: Mapping[str, Tensor], prunable: Prunable) -> list[str]:
    """Say if what the pruner holds belongs to another model: one message, every parameter."""
    parameters, left_out = prunable.parameters, prunable.left_out
    spared = {name: left_out[name] for name in held if name in left_out}
    lines = [
        f"- {name!r}: expected shape {tuple(tensor.shape)}, but "
        + (f"got {tuple(parameters[name].shape)}" if name in parameters else "it is not there")
        for name, tensor in held.items()
        if name not in spared and (name not in parameters or parameters[name].shape != tensor.shape)
    ]
    faults = []
    if lines:
        head = "The pruner holds masks of another model, from `masks`, an earlier fit or a "
        tail = (
            "Use a new SaliencyPruningCallback for a new model, and in `masks` the names that the "
            "LightningModule gives its parameters (prune the module, not a part of it)."
        )
        faults.append("\n".join([f"{head}checkpoint:", *lines, tail]))
    if spared:
        head = "The pruner holds masks of parameters that it is told to leave alone:"
        tail = "Name them in `parameters`, do not `exclude` them, or leave their masks out."
        lines = [f"- {name!r}: {reason}" for name, reason in spared.items()]
        faults.append("\n".join([head, *lines, tail]))
    return faults


def validation_faults(
    trainer: Trainer, events: dict[int, Target] | None, criterion: str, clock: Clock
) -> list[str]:
    """Say which events would wait in vain for a validation to score.

    Args:
        trainer: At fit start.
        events: Epoch -> target, ``None`` if unknown.
        criterion: The name of a criterion that needs scores.
        clock: What the schedule counts; rounds of steps use the last validation, whenever it was.
    """
    if events is not None and not events:
        return []
    way_out = "Or give `scoring_loader`, or choose criterion='magnitude', which needs none."
    if not trainer.enable_validation:
        what = (
            "but limit_val_batches is 0"
            if trainer.limit_val_batches == 0
            else "but the fit has no validation loader, or the module no validation_step"
        )
        return [f"criterion={criterion!r} is scored on the validation batches, {what}. {way_out}"]
    every = trainer.check_val_every_n_epoch or 1
    unseen = [epoch for epoch in events or {} if (epoch + 1) % every]
    if not unseen or clock.steps is not None:
        return []
    return [
        f"criterion={criterion!r} is scored in the validation of an event's epoch, but with "
        f"check_val_every_n_epoch={every} there is none in epoch {', '.join(map(str, unseen))} "
        f"(counted from 0). Move the events to epochs {every - 1}, {2 * every - 1}, ... or "
        f"validate every epoch. {way_out}"
    ]


def _rewind_faults(
    rewind: Rewind | None, events: dict[int, Target] | None, clock: Clock
) -> list[str]:
    """Say if the first event comes before there is anything to go back to."""
    if rewind is None or not events or clock.steps is not None or min(events) >= rewind.epoch:
        return []
    return [
        f"{rewind} goes back to the start of epoch {rewind.epoch}, but the first event is that of "
        f"epoch {min(events)}, before it. Rewind to epoch {min(events)} or earlier."
    ]


def refuse_empty_validation(trainer: Trainer, criterion: str) -> None:
    """Refuse validation loaders that are known to hold no batch.

    Raises:
        PruningSetupError: They have been set up and are all empty.
    """
    if trainer.val_dataloaders is not None and sum(trainer.num_val_batches) == 0:
        raise PruningSetupError(
            f"criterion={criterion!r} is scored on the validation batches, but the validation "
            "loader holds none. Give it data, or `scoring_loader`, or choose criterion='magnitude'."
        )


def unnamed_units(
    selection: Selection, parameters: Mapping[str, Tensor], names: list[str] | None
) -> list[str]:
    """Return of which parameters whole output units go, though nobody has given their names."""
    return [n for n in parameters if selection.granularity == "unit" and n not in (names or ())]


def check_batch(accumulator: SaliencyAccumulator, module: nn.Module, batch: Any) -> list[str]:
    """Raise what scoring this batch would raise; leave model and random state alone.

    NaN is none of a set-up's faults: an event that meets one says so, and names its epoch.

    Returns:
        The parameters without a gradient path from the outputs of its first samples.
    """
    with evaluating(module), isolate_rng():
        try:
            return accumulator.check(batch)
        except NonFiniteScoresError:
            return []


def check_prices(
    module: nn.Module, batch: Any, names: list[str], forward: Forward, likelihood: Likelihood
) -> None:
    """Refuse parameters that have no second-order price, by two samples of a batch.

    Raises:
        PruningSetupError: There are some; the message names them.
    """
    samples = few_samples(batch)
    with isolate_rng():
        try:
            uncalled = check_priced(module, names, samples, forward=forward, likelihood=likelihood)
        except ValueError as error:
            raise PruningSetupError(str(error)) from error
    if uncalled:
        rank_zero_warn(
            f"The first samples called none of the layers of {uncalled}. If no sample does, they "
            "have no price, and no event can come: leave them out with `exclude=[...]`."
        )


def peek_batch(trainer: Trainer, loaders: Any) -> Any:
    """Return up to two samples of a loader on the device, ``None`` if a look is not enough.

    For what has to be known before any batch has come. They are the first of the first batch, put
    together as the loader does it, but not read by iterating it: that would start its workers and
    advance generators, which training may share.

    Args:
        trainer: Of the fit.
        loaders: A ``DataLoader``, or several, of which the first is looked into.
    """
    loader = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    with isolate_rng(), undisturbed(trainer, loader):
        try:
            return on_device(trainer, _first_samples(loader))
        except Exception:  # noqa: BLE001  (the loader's batches may do; if not, the first will tell)
            return None


def _first_samples(loader: Any) -> Any:
    # Of a copy: a sampler may count how often it was iterated.
    sampler = copy(loader._index_sampler)
    if hasattr(sampler, "sampler"):
        sampler.sampler = copy(sampler.sampler)
    index = next(iter(sampler))
    if isinstance(index, list):  # without automatic batching it may be a single one
        index = index[:2]
    fetcher: Any = _MapDatasetFetcher(
        loader.dataset, loader._auto_collation, loader.collate_fn, loader.drop_last
    )
    return fetcher.fetch(index)


def as_masks(masks: Mapping[str, Tensor] | None) -> Masks | None:
    """Return the argument `masks` as a dict, or say what of it is no mask."""
    given: Any = masks
    if masks is None or (
        isinstance(given, Mapping)
        and all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in given.values())
    ):
        return None if masks is None else dict(masks)
    raise TypeError(
        "Expected `masks` to map names of parameters to bool tensors (True = kept), as prune() "
        f"returns them, but got {given!r:.200}."
    )
