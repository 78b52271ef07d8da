"""A schedule for the eye: as a table in a terminal, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_prune._targets import Target, Threshold, describe_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table_of(events: Mapping[int, Target], epochs: int, last_epoch: int | None) -> str:
    """Return events as lines ``epoch | target | note``.

    Args:
        events: Epoch -> target, in order.
        epochs: How many epochs the run has.
        last_epoch: The last epoch of the schedule, ``None`` if unknown; a shorter run is told so.
    """
    lines = (
        [f"{'epoch':>5} | {'target':>7} | note"] if events else [f"No event in {epochs} epochs."]
    )
    removed: float | None = 0.0
    for epoch, target in events.items():
        note, removed = _note(target, removed)
        lines.append(f"{epoch:>5} | {describe_target(target):>7} | {note}")
    if last_epoch is not None and last_epoch >= epochs:
        lines.append(
            f"The schedule goes on to epoch {last_epoch}; a run of {epochs} epochs ends after "
            f"epoch {epochs - 1}."
        )
    return "\n".join(lines)


def _note(target: Target, removed: float | None) -> tuple[str, float | None]:
    """Return what an event does, and the share removed after it (``None``: the scores decide)."""
    if isinstance(target, Threshold):
        return "removes the weights with scores up to there; how many, the scores decide", None
    if removed is None:
        return "tops up what the threshold has removed", None
    if target <= removed:
        return "nothing new", removed
    new = target - removed
    note = f"removes {100 * new:.1f} % of all weights"
    if removed:
        note += f", {100 * new / (1 - removed):.1f} % of those left"
    return note, target


def draw(events: Mapping[int, Target], epochs: int, ax: Axes | None) -> Axes:
    """Draw events as a staircase of the share removed; a dotted line stands for a threshold.

    Args:
        events: Epoch -> target, in order.
        epochs: How many epochs the run has.
        ax: Where to; ``None`` makes new axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415  (nothing else here needs it)
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib to plot a schedule, but it cannot be imported. Install it with "
            "`pip install matplotlib`, or print schedule.table(epochs) instead."
        ) from error
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    shares = {e: 100 * t for e, t in events.items() if not isinstance(t, Threshold)}
    levels = [0.0, *shares.values()]
    ax.step([0, *shares, epochs], [*levels, levels[-1]], where="post", color="C0")
    ax.plot(list(shares), list(shares.values()), "o", color="C0", label="share removed")
    for epoch, target in events.items():
        if isinstance(target, Threshold):
            ax.axvline(epoch, linestyle=":", color="C1", label=f"scores {describe_target(target)}")
    ax.set(xlabel="epoch", ylabel="weights removed (%)", xlim=(0, epochs), ylim=(0, 102))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    if len(shares) < len(events):
        ax.legend(loc="best")
    return ax
