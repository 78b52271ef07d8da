"""What a pruner remembers: the event to carry out, records of past ones, masks, a way back.

Enters and leaves: these, and the same packed for a checkpoint: plain tensors and containers, masks
at one bit a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

from torch import Tensor

from lightning_prune._targets import Target, Threshold
from lightning_prune._types import Masks, Scores
from lightning_prune.callbacks.scoring import ScoringResult
from lightning_prune.masking import count_removed, density, pack_masks, sparsity, unpack_masks

VERSION = 2


@dataclass(frozen=True)
class PendingEvent:
    """A target that is decided on but not yet carried out.

    Args:
        count: The epoch, or round of steps, whose target it is.
        epoch: The epoch in which it was decided.
        target: What is asked for.
        scores: R; empty if the criterion needs none.
        samples: How many samples R is summed over.
        dropped_energy: The share of the output energy left out of R.
        seconds: The time scoring took.
    """

    count: int
    epoch: int
    target: Target
    scores: Scores = field(default_factory=dict)
    samples: int = 0
    dropped_energy: float = 0.0
    seconds: float = 0.0


class PruningRecord(TypedDict):
    """One pruning event.

    Attributes:
        epoch: The epoch in which this was decided, counted from 0: the one whose target it was.
        step: The optimizer steps done when the masks came in force.
        target: What was asked for.
        sparsity: The share of all prunable weights removed from now on.
        kept: Their number that is left.
        total: Their number in all.
        density: The share kept in each parameter.
        threshold: The largest score among the weights that this event removed, ``None`` if there
            were none.
        samples: How many samples the scores are summed over; 0 if the criterion needs none.
        dropped_energy: The share of the score's output energy that was left out to save time.
        seconds: The time taken by scoring and selection.
    """

    epoch: int
    step: int
    target: Target
    sparsity: float
    kept: int
    total: int
    density: dict[str, float]
    threshold: float | None
    samples: int
    dropped_energy: float
    seconds: float


def make_record(
    event: PendingEvent, scores: Scores, *, before: Masks, after: Masks, step: int, seconds: float
) -> PruningRecord:
    """Return the record of an event that has been carried out.

    Args:
        event: What was decided.
        scores: The criterion's scores, by which it was decided.
        before: The masks until then; a parameter without one is complete.
        after: The masks from now on.
        step: The optimizer steps done so far.
        seconds: The time that selection took, beside scoring.
    """
    removed, total = count_removed(after)
    return PruningRecord(
        epoch=event.epoch,
        step=step,
        target=event.target,
        sparsity=sparsity(after),
        kept=total - removed,
        total=total,
        density=density(after),
        threshold=_largest_removed(scores, before, after),
        samples=event.samples,
        dropped_energy=event.dropped_energy,
        seconds=event.seconds + seconds,
    )


@dataclass
class PruningState:
    """All that a resumed run has to know.

    Attributes:
        masks: The masks in force.
        history: The events so far.
        pending: An event that is decided on and waits.
        next_count: The targets of all earlier epochs, or rounds, are dealt with.
        snapshot: What a :class:`~lightning_prune.Rewind` goes back to.
        latest: The scores of the last validation, where rounds of steps are decided by them.
    """

    masks: Masks = field(default_factory=dict)
    history: list[PruningRecord] = field(default_factory=list)
    pending: PendingEvent | None = None
    next_count: int = 0
    snapshot: dict[str, Any] | None = None
    latest: ScoringResult | None = None

    def pack(self) -> dict[str, Any]:
        """Return a state that ``torch.load(weights_only=True)`` reads.

        Scores are in it only while they wait for something.
        """
        waiting = None
        if self.pending is not None:
            waiting = {**_on_cpu(self.pending), "target": _plain(self.pending.target)}
        return {
            "version": VERSION,
            "masks": pack_masks(self.masks),
            "history": [{**record, "target": _plain(record["target"])} for record in self.history],
            "pending": waiting,
            "next_count": self.next_count,
            "snapshot": self.snapshot,
            "latest": None if self.latest is None else _on_cpu(self.latest),
        }

    @classmethod
    def unpack(cls, state: Mapping[str, Any]) -> PruningState:
        """Return what was packed.

        Raises:
            ValueError: The state was written by another version of its format.
        """
        if state.get("version") != VERSION:
            raise ValueError(
                f"Expected a pruning state of version {VERSION}, but the checkpoint has version "
                f"{state.get('version')!r}. Load it with the release of lightning_prune that wrote "
                "it."
            )
        waiting, latest = state["pending"], state["latest"]
        return cls(
            masks=unpack_masks(state["masks"]),
            history=[_record(record) for record in state["history"]],
            pending=waiting and PendingEvent(**{**waiting, "target": _target(waiting["target"])}),
            next_count=state["next_count"],
            snapshot=state["snapshot"],
            latest=latest and ScoringResult(**latest),
        )


def _on_cpu(value: PendingEvent | ScoringResult) -> dict[str, Any]:
    return {**vars(value), "scores": {name: s.cpu() for name, s in value.scores.items()}}


def held(masks: Masks, pending: PendingEvent | None) -> dict[str, Tensor]:
    """Return a tensor in the shape of each parameter that masks or a pending event are about."""
    return {**(pending.scores if pending is not None else {}), **masks}


def _record(stored: Mapping[str, Any]) -> PruningRecord:
    return cast(PruningRecord, {**stored, "target": _target(stored["target"])})


def _plain(target: Target) -> float | dict[str, float]:
    return {"threshold": target.value} if isinstance(target, Threshold) else target


def _target(plain: float | dict[str, float]) -> Target:
    return Threshold(plain["threshold"]) if isinstance(plain, dict) else plain


def _largest_removed(scores: Scores, before: Masks, after: Masks) -> float | None:
    """Return the largest score among the weights that an event has removed."""
    removed = {
        name: ~mask & before[name] if name in before else ~mask for name, mask in after.items()
    }
    largest = [
        float(score[removed[name]].max()) for name, score in scores.items() if removed[name].any()
    ]
    return max(largest, default=None)
