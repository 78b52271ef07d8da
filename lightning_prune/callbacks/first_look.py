"""A first look at the batches of a fit: what scoring them would raise, before it costs an epoch.

Enters: the first batch of each loader, or what can be had of it. Leaves: errors and warnings. Two
samples are run through the model, which is left as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_prune.callbacks import preflight
from lightning_prune.callbacks.scoring import ScoringOptions
from lightning_prune.callbacks.shards import validation_loaders
from lightning_prune.passes.batches import default_forward, few_samples, read_labels
from lightning_prune.passes.isolation import evaluating, unlogged
from lightning_prune.passes.outputs import check_classes, doubt_of_classes
from lightning_prune.refit import Refit
from lightning_prune.saliency.head import output_parameters


class FirstLook:
    """Look at one batch of each loader.

    Args:
        options: What is scored and how.
    """

    def __init__(self, options: ScoringOptions) -> None:
        self._options = options
        self._looked: set[int] = set()
        self._unreached: set[str] | None = None
        self.start([], scored=False, priced=False, refit=None, units=[])

    def start(
        self, names: list[str], *, scored: bool, priced: bool, refit: Refit | None, units: list[str]
    ) -> None:
        """Begin a fit.

        Args:
            names: The parameters that are pruned.
            scored: Whether by scores of batches.
            priced: Whether by second-order prices.
            refit: What is refitted to batches.
            units: Those of which whole output units go, though nobody has named them.
        """
        self._names, self._scored, self._priced, self._refit = names, scored, priced, refit
        self._units = units
        self._looked.clear()
        self._unreached = None

    @property
    def needed(self) -> bool:
        """Whether an unreadable batch would be an error."""
        return bool(self._scored or self._priced or self._refit)

    def seen(self, dataloader_idx: int) -> bool:
        """Whether nothing of a loader is left to look at."""
        return dataloader_idx in self._looked or not (self.needed or self._units)

    def __call__(self, module: LightningModule, batch: Any, dataloader_idx: int = 0) -> None:
        """Raise what scoring such a batch would raise; warn of what it would not mean.

        NaN is none of a set-up's faults: an event that meets one says so, and names its epoch.
        """
        if self.seen(dataloader_idx):
            return
        self._looked.add(dataloader_idx)
        forward, likelihood = self._options.forward or default_forward, self._options.likelihood
        with unlogged(module):
            if self._priced:
                preflight.check_prices(module, batch, self._names, forward, likelihood)
            elif self._scored:
                accumulator = self._options.accumulator(module, self._names)
                unreached = set(preflight.check_batch(accumulator, module, batch))
                known = self._unreached
                self._unreached = unreached if known is None else known & unreached
            if self._units:
                self._warn_of_classes(module, batch)
            if not self.needed:
                return  # nothing reads a batch of this fit, of whatever form it is
            labels = read_labels(batch)
            tells = labels is not None and labels.ndim > 1 and likelihood == "categorical"
            if tells or not (self._scored or self._priced):
                with torch.no_grad(), evaluating(module), isolate_rng():
                    logits = forward(module, samples := few_samples(batch))
                if likelihood == "categorical" and self._refit != "layers":
                    check_classes(logits)
                if tells and (doubt := doubt_of_classes(logits, read_labels(samples))):
                    rank_zero_warn(doubt)

    def _warn_of_classes(self, module: LightningModule, batch: Any) -> None:
        forward = self._options.forward or default_forward
        parameters = {n: p for n, p in module.named_parameters() if n in self._units}
        self._units = []  # once is enough
        try:
            samples = few_samples(batch)
            with evaluating(module), isolate_rng():
                found = output_parameters(module, parameters, lambda: forward(module, samples))
        except Exception:  # noqa: BLE001  (where batches are needed, others say what is wrong)
            return
        if names := sorted(found):
            rank_zero_warn(
                f"Selection('unit') may remove rows of {names}, and each of them is an output of "
                f"the model, such as a class. Leave them out by exclude={names}; if it is meant, "
                "give their names in `parameters`."
            )

    def warn_of_unreached(self) -> None:
        """Warn of parameters that no batch looked at has led to."""
        if self._unreached:
            rank_zero_warn(
                f"No gradient path leads from the outputs of the first samples to "
                f"{[name for name in self._names if name in self._unreached]}. If it is so for "
                "all samples, no event can be scored: leave them out with `exclude=[...]`, or "
                "return the output that uses them from `forward`."
            )
        self._unreached = None


def peek_loader(trainer: Trainer, number: int) -> Any:
    """Return the first samples of a validation loader, ``None`` if it cannot be looked into.

    Neither where batches of several loaders are put together: none by itself is a batch then.
    """
    source = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    loaders = validation_loaders(trainer)
    if len(loaders) > 1 and source is not None and source._mode != "sequential":
        return None
    return preflight.peek_batch(trainer, loaders[number])
