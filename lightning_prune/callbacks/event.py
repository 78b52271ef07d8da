"""A decided event -> which weights it removes, and what is said of it; nothing is removed here.

Enters: what was decided, and the model as it is trained. Leaves: new masks with all that a record
of them needs. Apart from their coming in force, as several pruners of a Trainer may have to choose
before one of them changes the weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_prune._types import Masks, Scores
from lightning_prune.callbacks import reporting
from lightning_prune.callbacks.pruning_state import PendingEvent, PruningRecord, make_record
from lightning_prune.callbacks.refitting import Refitter
from lightning_prune.callbacks.scoring import refused_in
from lightning_prune.masking import unread_rows
from lightning_prune.selection import Criterion, Selected, Selection


@dataclass(frozen=True)
class Chosen:
    """What an event removes.

    Attributes:
        event: What was decided.
        scores: The criterion's, by which it was chosen.
        before: The masks until then.
        selected: The masks from then on, and what the guard has kept.
        unread: What to warn of look-up tables.
        seconds: The time it took to choose.
    """

    event: PendingEvent
    scores: Scores
    before: Masks
    selected: Selected
    unread: list[str]
    seconds: float

    def record(self, step: int, seconds: float) -> PruningRecord:
        """Return the record of the event, put in force after ``step`` optimizer steps."""
        after = self.selected.masks
        seconds += self.seconds
        return make_record(
            self.event, self.scores, before=self.before, after=after, step=step, seconds=seconds
        )


@dataclass(frozen=True)
class Chooser:
    """Choose what an event removes.

    Args:
        criterion: By what weights are ranked.
        selection: In which pieces they go.
        refitter: Who knows second-order prices.
    """

    criterion: Criterion
    selection: Selection
    refitter: Refitter
    _told: set[str] = field(default_factory=set)

    def __call__(
        self,
        trainer: Trainer,
        module: LightningModule,
        event: PendingEvent,
        parameters: dict[str, nn.Parameter],
        masks: Masks,
    ) -> Chosen:
        """Rank the weights as they are now, and choose.

        Args:
            trainer: In a fit.
            module: The model.
            event: What was decided.
            parameters: What is pruned.
            masks: The masks in force.

        Raises:
            NonFiniteScoresError: A score is not finite; the message names the epoch.
        """
        start = time.perf_counter()
        raw = {n: score.to(parameters[n].device) for n, score in event.scores.items()}
        with refused_in(event.epoch):
            if self.criterion.needs_prices:
                one_by_one = self.criterion.one_by_one
                raw, samples = self.refitter.prices(
                    trainer, module, list(parameters), masks, one_by_one
                )
                event = replace(event, samples=samples)
            scores = self.criterion(raw, parameters)
            saliency = raw if self.criterion.needs_scores else None
            selected = self.selection(scores, event.target, masks=masks, saliency=saliency)
        found = {} if saliency is None else unread_rows(module, saliency, masks, selected.masks)
        unread = [line for name, line in found.items() if name not in self._told]
        self._told.update(found)
        return Chosen(event, scores, masks, selected, unread, time.perf_counter() - start)


def tell(trainer: Trainer, chosen: Chosen, record: PruningRecord, prefix: str) -> None:
    """Say and log what an event has done."""
    rank_zero_info(reporting.event_line(record))
    if guarded := chosen.selected.guarded:
        rank_zero_warn(reporting.guarded_line(record["epoch"], guarded, record["density"]))
    for line in chosen.unread:
        rank_zero_warn(f"Epoch {record['epoch']}: {line}")
    reporting.log_histograms(trainer, chosen.scores, chosen.before, prefix)
