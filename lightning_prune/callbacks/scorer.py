"""Who scores, when: the validation that is running, a loader of its own, and a first look.

Enters: Lightning's validation hooks, or a loader. Leaves: a
:class:`~lightning_prune.callbacks.scoring.ScoringResult` for an event to decide by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import closing
from copy import copy
from itertools import islice
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_prune.callbacks import preflight
from lightning_prune.callbacks.first_look import FirstLook, peek_loader
from lightning_prune.callbacks.reading import (
    on_device,
    read_to_validate,
    undisturbed,
    validating,
)
from lightning_prune.callbacks.resumption import (
    is_last_batch,
    starts_in_the_middle,
    validation_batches,
)
from lightning_prune.callbacks.scoring import (
    ScoringOptions,
    ScoringPass,
    ScoringResult,
    refused_in,
)
from lightning_prune.callbacks.shards import validation_loaders
from lightning_prune.callbacks.step_inputs import StepInputs
from lightning_prune.passes.batches import batch_size
from lightning_prune.passes.isolation import evaluating, unlogged
from lightning_prune.refit import Refit
from lightning_prune.selection import Criterion

CALIBRATION_SAMPLES = 4096
"""A refit uses no more, nor keeps more on the device."""

NO_CALIBRATION = (
    "Expected batches to calibrate the refit, or second-order prices, by, but the validation "
    "loader (or scoring_loader, where there is one) yields none. Give it data."
)


class Scorer:
    """Run scoring passes for a pruner.

    Args:
        options: What is scored and how.
        loader: Batches to score instead of the validation's: an iterable, or the name of a method
            of the module or its datamodule that returns one.
    """

    def __init__(self, options: ScoringOptions, loader: Any = None) -> None:
        self.options = options
        self.loader = loader
        self.refit: Refit | None = None  # which needs batches whatever the criterion does
        self.step_inputs = StepInputs()
        self._first_look = FirstLook(options)
        self._names: list[str] = []
        self._scored = False
        self._taken: Any = None
        self._pass: ScoringPass | None = None
        self._incomplete, self._step = False, 0
        self._unfinished: dict[str, Any] | None = None  # a pass under way in the checkpoint

    @property
    def running(self) -> bool:
        """Whether a pass over the validation batches is under way."""
        return self._pass is not None

    def prepare(
        self, names: list[str], criterion: Criterion, *, idle: bool, units: list[str]
    ) -> None:
        """Start a fit.

        Args:
            names: The parameters that are scored.
            criterion: What scores are for; without a use of batches, and without a refit, there
                is nothing to have a first look at.
            idle: No event will come, which needs none either.
            units: Of these whole output units are removed, though nobody has named them.
        """
        if _is_used_up(self.loader):
            raise preflight.PruningSetupError(
                "Expected scoring_loader to be batches that can be gone through at every event, "
                f"but got {type(self.loader).__name__}, an iterator, which is empty after the "
                "first time. Give a list or a DataLoader, or the name of a method that returns one."
            )
        self._names, self._scored = names, criterion.needs_scores
        scored, priced, refit = self._scored, criterion.needs_prices, self.refit
        if idle:
            scored, priced, refit, units = False, False, None, []
        self._first_look.start(names, scored=scored, priced=priced, refit=refit, units=units)
        # With a forward or batches of its own the scoring has nothing to do with the step's.
        own = self.options.forward is not None or self.loader is not None
        self.step_inputs.done = own or not self._first_look.needed

    def before_step(self, batch: Any) -> None:
        """Take note of a validation batch before the user's step may take it apart."""
        self._taken = copy(batch) if isinstance(batch, (MutableMapping, list)) else batch

    def after_step(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Look at a validation batch, and score it if a pass is under way."""
        batch, self._taken = _whole(batch, self._taken), None
        self.step_inputs.compare(module, batch)
        if trainer.sanity_checking and self.loader is None:
            self._first_look(module, batch, dataloader_idx)
        self.add(trainer, batch, batch_idx, dataloader_idx)

    def look_ahead(self, trainer: Trainer, module: LightningModule, criterion: str) -> None:
        """Take the first look where no sanity check has brought a batch to look at."""
        look = self._first_look
        if self.loader is not None and not look.seen(0):
            loader = resolve_loader(self.loader, trainer, module)
            # A DataLoader draws a seed, and may be the one that the training is about to iterate.
            with isolate_rng(), undisturbed(trainer, loader), validating(trainer):
                batch = next(iter(loader), None)
                batch = None if batch is None else on_device(trainer, batch)
            if batch is not None:
                look(module, batch)
        elif self.loader is None:
            if look.needed and not look.seen(0):
                if self._scored:
                    preflight.refuse_empty_validation(trainer, criterion)
                elif trainer.val_dataloaders is not None and sum(trainer.num_val_batches) == 0:
                    raise preflight.PruningSetupError(NO_CALIBRATION)
            for number in range(len(validation_loaders(trainer))):
                if not look.seen(number):
                    with validating(trainer):
                        batch = peek_loader(trainer, number)
                    if batch is not None:
                        look(module, batch, number)
        look.warn_of_unreached()

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Start a pass over the validation that begins now, or go on with one from a checkpoint."""
        self._pass = ScoringPass(module, self._names, self.options)
        self._incomplete, self._step = starts_in_the_middle(trainer), trainer.global_step
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None and unfinished["step"] == self._step:
            self._pass.load_state(unfinished)

    def add(self, trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Score one of its batches; does nothing outside of a pass."""
        if self._pass is not None:
            with refused_in(trainer.current_epoch), unlogged(trainer.lightning_module):
                self._pass.add(batch, trainer, dataloader_idx, batch_idx)
                # Before anybody's next hook: averaged weights are lent to the model until then.
                # Where batches are still to be made up for, they are to come into the same pools.
                if not self._incomplete and is_last_batch(trainer):
                    self._pass.score_pool()

    def finish(self, trainer: Trainer, module: LightningModule) -> ScoringResult | None:
        """End the pass and return what it found, ``None`` if that is nothing."""
        if self._pass is None:
            return None
        with refused_in(trainer.current_epoch), unlogged(module):
            if self._incomplete:
                self._pass.complete(trainer)
            self._pass.add_generated(trainer, module)
            result = self._pass.finish(trainer)
        self.let_go()
        return result

    def score(self, trainer: Trainer, module: LightningModule) -> ScoringResult | None:
        """Score now what there is to score, nothing if the criterion needs no scores."""
        if not self._scored:
            return ScoringResult({}, 0, 0.0, 0.0)
        if self.loader is not None:
            return self.score_loader(trainer, module)
        return self.score_validation(trainer, module)

    def score_validation(self, trainer: Trainer, module: LightningModule) -> ScoringResult | None:
        """Score the validation batches now, in a resumed run that does not come to validate."""
        self.begin(trainer, module)
        self._incomplete = True
        with evaluating(module):
            return self.finish(trainer, module)

    def score_loader(self, trainer: Trainer, module: LightningModule) -> ScoringResult | None:
        """Score the batches of the own loader, now; each process takes its part of them."""
        scoring = self._pass = ScoringPass(module, self._names, self.options)
        self._incomplete = False
        with evaluating(module), isolate_rng():
            loader = resolve_loader(self.loader, trainer, module)
            mine = islice(_numbered(loader), trainer.global_rank, None, trainer.world_size)
            with closing(read_to_validate(trainer, mine)) as batches:
                for batch, _, _ in batches:
                    with refused_in(trainer.current_epoch), unlogged(module):
                        scoring.add(batch)
            result = self.finish(trainer, module)
        if result is None:
            rank_zero_warn(
                "scoring_loader yields no batch: the pruning event that is due in epoch "
                f"{trainer.current_epoch} has nothing to be scored by, and waits."
            )
        return result

    def calibration_batches(self, trainer: Trainer) -> list[Any]:
        """Return what a refit is fitted to: the batches of the own loader or of the validation.

        As many as hold ``CALIBRATION_SAMPLES``, on the device; in a distributed run this process's.
        """
        module = trainer.lightning_module
        found, samples = [], 0
        with isolate_rng():
            if self.loader is None:
                source = validation_batches(trainer)
            else:
                loader = resolve_loader(self.loader, trainer, module)
                source = read_to_validate(trainer, _numbered(loader))
            with closing(source) as batches:
                for batch, _, _ in batches:
                    # When the fit has ended the strategy may have taken the model off the device.
                    found.append(move_data_to_device(batch, module.device))
                    samples += batch_size(batch)
                    if samples >= CALIBRATION_SAMPLES:
                        break
        if not found:
            raise preflight.PruningSetupError(NO_CALIBRATION)
        return found

    def pack(self) -> dict[str, Any] | None:
        """Return the sums of a pass under way, for :meth:`unpack`; ``None`` if there are none."""
        state = None if self._pass is None else self._pass.state()
        return None if state is None else {**state, "step": self._step}

    def unpack(self, state: dict[str, Any] | None) -> None:
        """Have the next pass go on from these sums, if no training step comes between."""
        self._unfinished = state

    def __getstate__(self) -> dict[str, Any]:
        # A pass hangs on the model that is being scored; a copy starts without one.
        return {**self.__dict__, "_pass": None, "_taken": None, "step_inputs": StepInputs()}

    def let_go(self) -> None:
        """End whatever is under way without a result."""
        self._unfinished = None
        self.step_inputs.let_go()
        if self._pass is not None:
            self._pass.close()
            self._pass = None


def _whole(batch: Any, taken: Any) -> Any:
    """Return a batch with what a step has taken out of it, as by ``batch.pop("labels")``."""
    if isinstance(batch, MutableMapping) and isinstance(taken, MutableMapping):
        if any(key not in batch for key in taken):
            taken.update(batch)
            return taken
    elif isinstance(batch, list) and isinstance(taken, list) and len(batch) < len(taken):
        return taken
    return batch


def _is_used_up(loader: Any) -> bool:
    """Tell whether a loader is an iterator, empty after the first time.

    Some loaders are their own iterators and begin anew (CombinedLoader); they have a length.
    """
    once = hasattr(loader, "__next__") and not hasattr(loader, "__len__")
    return once and iter(loader) is loader


def _numbered(loader: Any) -> Iterator[tuple[Any, int, int]]:
    """Yield the batches of an own loader as those of a validation come: see `read_to_validate`."""
    for i, batch in enumerate(loader):
        yield batch, i, 0


def resolve_loader(loader: Any, trainer: Trainer, module: LightningModule) -> Any:
    """Return the batches that ``scoring_loader`` stands for.

    Of a name that both have the datamodule's method counts, as Lightning has it for its loaders.

    Raises:
        PruningSetupError: It is a name, and neither the module nor its datamodule has such a
            method; or it cannot be iterated.
    """
    if isinstance(loader, str):
        owners = [o for o in (module, getattr(trainer, "datamodule", None)) if o is not None]
        methods = [m for o in reversed(owners) if (m := _own_method(o, loader)) is not None]
        if not methods:
            searched = " and ".join(type(owner).__name__ for owner in owners)
            raise preflight.PruningSetupError(
                f"Expected scoring_loader={loader!r} to name a method of the LightningModule or of "
                f"its LightningDataModule that returns the batches to score, but {searched} has no "
                "such method. Write it, or give the loader itself."
            )
        loader = methods[0]()
    if not hasattr(loader, "__iter__"):
        raise preflight.PruningSetupError(
            "Expected scoring_loader to be an iterable of batches, but got "
            f"{type(loader).__name__}."
        )
    return loader


def _own_method(
    owner: LightningModule | LightningDataModule, name: str
) -> Callable[[], Any] | None:
    """Return a method that the user wrote; Lightning's ``train_dataloader`` etc. only raise."""
    method: Callable[[], Any] | None = getattr(owner, name, None)
    parent = LightningModule if isinstance(owner, LightningModule) else LightningDataModule
    if not callable(method) or (hasattr(parent, name) and not is_overridden(name, owner)):
        return None
    return method
