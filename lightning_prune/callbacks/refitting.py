"""A refit in a fit: what it is fitted to, and the same result on all processes.

Enters: a Trainer at a pruning event. Leaves: corrected weights, or second-order prices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_prune._types import Forward, Masks, Scores
from lightning_prune.callbacks.batch_sources import added_batches
from lightning_prune.callbacks.scorer import Scorer
from lightning_prune.masking import zero_removed
from lightning_prune.passes.batches import batch_size, default_forward
from lightning_prune.passes.isolation import unlogged
from lightning_prune.passes.outputs import without_ignored
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import (
    Calibration,
    Refit,
    RefitReport,
    hold_out,
    obs_prices,
    refit_survivors,
)
from lightning_prune.saliency.parameters import check_scores


@dataclass
class Refitter:
    """Refit surviving weights, or price all of them, by the calibration inputs of a fit.

    In a distributed run the first process does it, by its share of the data, and the others take
    over its result: all of them hold the same bits. If it fails on one, it fails on all.

    Args:
        scorer: Whose batches are the calibration.
        method: Which refit, ``None`` for none.
    """

    scorer: Scorer
    method: Refit | None
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Have a first look taken at the batches."""
        self.scorer.refit = self.method

    def prices(
        self,
        trainer: Trainer,
        module: LightningModule,
        names: list[str],
        masks: Masks,
        one_by_one: bool,
    ) -> tuple[Scores, int]:
        """Return the second-order price of every weight, and of how many samples it is."""
        options = self.scorer.options
        # Of the shape and type that the first process's prices have.
        prices: Scores = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in module.named_parameters()
            if name in names
        }
        with _together(trainer), unlogged(module):
            real, generated = self._batches(trainer, module)
            samples = torch.tensor(sum(map(batch_size, [*real, *generated])))
            if trainer.is_global_zero:
                prices = obs_prices(
                    module,
                    masks,
                    names,
                    [*real, *generated],
                    forward=self._forward,
                    likelihood=options.likelihood,
                    one_by_one=one_by_one,
                )
        _share(trainer, {**{name: prices[name] for name in names}, "samples": samples})
        check_scores(prices)
        return prices, int(samples)

    def refit(
        self,
        trainer: Trainer,
        module: LightningModule,
        parameters: Mapping[str, nn.Parameter],
        masks: Masks,
        others: Iterable[Masks] = (),
    ) -> None:
        """Zero the removed weights and correct the others; on an error all are as before.

        Args:
            trainer: At a pruning event.
            module: The model.
            parameters: Name -> what is pruned.
            masks: Name -> what the event keeps of it.
            others: What other pruners keep, which a refit must not bring back.
        """
        if self.method is None or _all_zero(parameters, masks):
            return  # nothing is lost that others could make up for
        options = self.scorer.options
        dense, report = Teacher.of(module), RefitReport()
        try:
            zero_removed(parameters, masks)
            with _together(trainer), unlogged(module):
                real, generated = self._batches(trainer, module)
                fit, held_out = hold_out(real)
                calibration = Calibration(
                    dense,
                    fit,
                    held_out,
                    self._forward,
                    options.likelihood,
                    generated,
                )
                if trainer.is_global_zero:
                    held = {**_masked_biases(others, masks), **masks}
                    report = refit_survivors(module, held, calibration, self.method)
            _share(trainer, dict(module.named_parameters()))
        except BaseException:
            dense.restore(module)
            raise
        news = {
            name: why
            for name, why in report.left.items()
            if name in masks and name not in self._told
        }
        self._told |= set(news)
        if news:
            notes = "; ".join(f"{name}: {why}" for name, why in news.items())
            rank_zero_warn(f"The refit left some parameters as they were. {notes}")

    @property
    def _forward(self) -> Forward:
        options = self.scorer.options
        return without_ignored(options.forward or default_forward, options.likelihood)

    def _batches(self, trainer: Trainer, module: LightningModule) -> tuple[list[Any], list[Any]]:
        """Return the calibration's real batches and the generated ones beside them."""
        real = self.scorer.calibration_batches(trainer)
        samples = sum(map(batch_size, real))
        forward = self.scorer.options.forward
        generated = list(added_batches(trainer, module, samples, forward))
        return real, generated


def _all_zero(parameters: Mapping[str, Tensor], masks: Masks) -> bool:
    """Tell whether all weights that masks remove are zero already."""
    return not any(
        bool((parameters[name].detach()[~mask.to(parameters[name].device)] != 0).any())
        for name, mask in masks.items()
    )


def _masked_biases(others: Iterable[Masks], masks: Masks) -> Masks:
    """Return what other pruners removed of the biases that a refit corrects along with weights."""
    modules = {name.rpartition(".")[0] for name in masks}
    return {
        name: mask
        for other in others
        for name, mask in other.items()
        if name not in masks
        and "bias" in name.rpartition(".")[2]
        and name.rpartition(".")[0] in modules
    }


@contextmanager
def _together(trainer: Trainer) -> Iterator[None]:
    """Leave the block with an error on every process if there was one on any.

    Otherwise the process with the error would leave, and the others wait for it for ever.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        if trainer.world_size > 1:
            flag = torch.tensor(int(failed), device=trainer.strategy.root_device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            failed = bool(flag)
    if failed:
        raise RuntimeError(
            "The refit, or the second-order prices, failed on another process, whose message says "
            "why. No weight was changed."
        )


def _share(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Give every process the first one's values."""
    if trainer.world_size > 1:
        with torch.no_grad():
            for tensor in tensors.values():
                # Where the processes talk: after the fit the model may be on the CPU, where NCCL
                # does not reach. Contiguous, which not every layout (channels last) is.
                sent = tensor.detach().to(trainer.strategy.root_device).contiguous()
                torch.distributed.broadcast(sent, src=0)
                tensor.copy_(sent)
