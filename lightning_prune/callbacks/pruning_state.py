"""What a pruner remembers: the event it has to carry out, the records of those it has, the masks.

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
from lightning_prune.masking import density, pack_masks, sparsity, unpack_masks

VERSION = 1


@dataclass(frozen=True)
class PendingEvent:
    """A target that is decided on but not yet carried out.

    Args:
        epoch: The epoch whose target it is.
        target: What is asked for.
        scores: R; empty if the criterion needs none.
        samples: How many samples R is summed over.
        dropped_energy: The share of the output energy left out of R.
        seconds: The time scoring took.
    """

    epoch: int
    target: Target
    scores: Scores = field(default_factory=dict)
    samples: int = 0
    dropped_energy: float = 0.0
    seconds: float = 0.0


class PruningRecord(TypedDict):
    """One pruning event.

    Attributes:
        epoch: The epoch whose target this was, counted from 0.
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
    event: PendingEvent, scores: Scores, *, before: Masks, after: Masks, seconds: float
) -> PruningRecord:
    """Return the record of an event that has been carried out.

    Args:
        event: What was decided.
        scores: The criterion's scores, by which it was decided.
        before: The masks until then; a parameter without one is complete.
        after: The masks from now on.
        seconds: The time that selection took, beside scoring.
    """
    return PruningRecord(
        epoch=event.epoch,
        target=event.target,
        sparsity=sparsity(after),
        kept=sum(int(mask.sum()) for mask in after.values()),
        total=sum(mask.numel() for mask in after.values()),
        density=density(after),
        threshold=_largest_removed(scores, before, after),
        samples=event.samples,
        dropped_energy=event.dropped_energy,
        seconds=event.seconds + seconds,
    )


def pack(
    masks: Masks, history: list[PruningRecord], pending: PendingEvent | None, next_epoch: int
) -> dict[str, Any]:
    """Return a state that ``torch.load(weights_only=True)`` reads; scores only while pending."""
    waiting = None
    if pending is not None:
        scores = {name: score.cpu() for name, score in pending.scores.items()}
        waiting = {**vars(pending), "target": _plain(pending.target), "scores": scores}
    return {
        "version": VERSION,
        "masks": pack_masks(masks),
        "history": [{**record, "target": _plain(record["target"])} for record in history],
        "pending": waiting,
        "next_epoch": next_epoch,
    }


def unpack(state: Mapping[str, Any]) -> tuple[Masks, list[PruningRecord], PendingEvent | None, int]:
    """Return the masks, history, pending event and next epoch of a packed state.

    Raises:
        ValueError: The state was written by another version of its format.
    """
    if state.get("version") != VERSION:
        raise ValueError(
            f"Expected a pruning state of version {VERSION}, but the checkpoint has version "
            f"{state.get('version')!r}. Load it with the release of lightning_prune that wrote it."
        )
    history = [_record(record) for record in state["history"]]
    waiting = state["pending"]
    pending = waiting and PendingEvent(**{**waiting, "target": _target(waiting["target"])})
    return unpack_masks(state["masks"]), history, pending, state["next_epoch"]


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
