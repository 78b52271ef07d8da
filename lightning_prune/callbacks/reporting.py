"""What a user sees of pruning: one line an event, a table at the end, scalars and histograms.

Enters: records of events. Leaves: text, and calls to Lightning's loggers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune._targets import Threshold, describe_target
from lightning_prune._types import Masks, Scores
from lightning_prune.callbacks.pruning_state import PruningRecord
from lightning_prune.masking import density, sparsity
from lightning_prune.passes.precision import precise

HISTOGRAM_SAMPLES = 1_000_000
"""A histogram looks at no more scores than this of a parameter, evenly spaced."""

ON_ONE_LINE = 6
"""So many parameters are told of on one line; of a transformer each has its own."""


def event_line(record: PruningRecord) -> str:
    """Return an event as a sentence.

    Example:
        >>> print(event_line(_EXAMPLE))
        Epoch 2: pruned to 50.0 % (500 of 1,000 weights left; removed scores up to 1.5e-07; 0.2 s).
    """
    cut = record["threshold"]
    removed = "nothing removed" if cut is None else f"removed scores up to {cut:.2g}"
    return (
        f"Epoch {record['epoch']}: pruned to {100 * record['sparsity']:.1f} % "
        f"({record['kept']:,} of {record['total']:,} weights left; {removed}; "
        f"{record['seconds']:.1f} s)."
    )


def guarded_line(epoch: int, guarded: Iterable[str], density: Mapping[str, float]) -> str:
    """Say which parameters were kept from losing all, or more than they may.

    Example:
        >>> guarded_line(2, ["fc.weight"], {"fc.weight": 0.01})
        'Epoch 2: fc.weight would have lost too much; the guard against collapse left it 1.0 %.'
    """
    left = [f"{100 * density[name]:.1f} %" for name in guarded]
    it = "it" if len(left) == 1 else "them"
    return (
        f"Epoch {epoch}: {', '.join(guarded)} would have lost too much; the guard against collapse "
        f"left {it} {', '.join(left)}."
    )


def table(history: list[PruningRecord]) -> str:
    """Return the events as a table, and below it the density of each parameter after the last one.

    Example:
        >>> print(table([_EXAMPLE]))
        epoch     target  sparsity  weights left  threshold  samples  seconds
            2     50.0 %    50.0 %           500    1.5e-07       64      0.2
        Left in each parameter: fc.weight 50.0 %
    """
    if not history:
        return "No pruning event has happened."
    rows = [
        f"{'epoch':>5}{'target':>11}{'sparsity':>10}{'weights left':>14}{'threshold':>11}"
        f"{'samples':>9}{'seconds':>9}"
    ]
    for record in history:
        cut = "-" if record["threshold"] is None else f"{record['threshold']:.2g}"
        rows.append(
            f"{record['epoch']:>5}{describe_target(record['target']):>11}"
            f"{100 * record['sparsity']:>8.1f} %{record['kept']:>14,}{cut:>11}"
            f"{record['samples'] or '-':>9}{record['seconds']:>9.1f}"
        )
    return "\n".join([*rows, *_left(history[-1]["density"])])


def _left(density: Mapping[str, float]) -> list[str]:
    """Return how much is left of each parameter: on one line, or of many on one line each.

    Example:
        >>> for line in _left({f"layers.{i}.weight": i / 10 for i in range(4, 11)}):
        ...     print(line)
        Left in each parameter:
          layers.4.weight     40.0 %
          layers.5.weight     50.0 %
          layers.6.weight     60.0 %
          layers.7.weight     70.0 %
          layers.8.weight     80.0 %
          layers.9.weight     90.0 %
          layers.10.weight   100.0 %
    """
    head = "Left in each parameter:"
    if len(density) <= ON_ONE_LINE:
        return [f"{head} {', '.join(f'{name} {100 * d:.1f} %' for name, d in density.items())}"]
    width = max(map(len, density))
    return [head, *(f"  {name:<{width}}{100 * d:>8.1f} %" for name, d in density.items())]


def metrics(
    history: list[PruningRecord],
    names: Iterable[str],
    prefix: str = "prune",
    masks: Masks | None = None,
) -> dict[str, float]:
    """Return the state of pruning as scalars: complete from the first epoch, before any event.

    ``prune/target`` is what the last event asked for: a share, or ``T`` of a threshold.

    Args:
        history: The events so far.
        names: The parameters that are pruned.
        prefix: What stands before the slash; a second pruner in a Trainer needs its own.
        masks: Those in force, which count before any event.
    """
    if not history:
        masks = {} if masks is None else masks
        reached, kept = sparsity(masks), density(masks)
        densities = {f"{prefix}/density/{name}": kept.get(name, 1.0) for name in names}
        return {f"{prefix}/sparsity": reached, f"{prefix}/target": reached, **densities}
    last = history[-1]
    target = last["target"]
    found = {
        f"{prefix}/sparsity": last["sparsity"],
        f"{prefix}/target": target.value if isinstance(target, Threshold) else target,
        f"{prefix}/dropped_energy": last["dropped_energy"],
        **{f"{prefix}/density/{name}": share for name, share in last["density"].items()},
    }
    if last["threshold"] is not None:
        found[f"{prefix}/threshold"] = last["threshold"]
    return found


LENT = ("log", "log_dict")
"""Methods of the model that Lightning hangs on its callbacks for a run and does not take back."""


def give_back(callback: Callback) -> None:
    """Take Lightning's log methods off a callback: they would keep the model of a run alive."""
    for name in LENT:
        callback.__dict__.pop(name, None)


def without_lent(callback: Callback) -> dict[str, Any]:
    """Return what a copy (deepcopy, pickle) of a callback takes along: not the model."""
    return {name: value for name, value in callback.__dict__.items() if name not in LENT}


def log_metrics(trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
    """Log scalars from an epoch hook by Lightning's own ``log``; one is for the progress bar."""
    if trainer.barebones:
        return
    how: dict[str, Any] = {
        "on_step": False,
        "on_epoch": True,
        "batch_size": 1,
        "sync_dist": trainer.world_size > 1,  # the same on all ranks; a mean of equals
    }
    for name, value in values.items():
        pl_module.log(name, value, prog_bar=name.endswith("/sparsity"), **how)


class EpochLog:
    """Logs scalars once an epoch, and densities only where they have changed.

    A call of Lightning's ``log`` takes a millisecond, and there may be hundreds of parameters.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a fit."""
        self._epoch = -1
        self._values: dict[str, float] = {}

    def has(self, epoch: int) -> bool:
        """Whether this epoch's values were logged."""
        return self._epoch == epoch

    def __call__(
        self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]
    ) -> None:
        """Log what is new."""
        news = {
            name: value
            for name, value in values.items()
            if "/density/" not in name or self._values.get(name) != value
        }
        log_metrics(trainer, pl_module, news)
        self._epoch, self._values = trainer.current_epoch, values


def log_after_fit(trainer: Trainer, values: dict[str, float]) -> None:
    """Write scalars straight to the loggers: after the last epoch Lightning's ``log`` is closed."""
    values = {"epoch": max(0, trainer.current_epoch - 1), **values}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def log_histograms(trainer: Trainer, scores: Scores, masks: Masks, prefix: str = "prune") -> None:
    """Write a histogram of log10(score) for each parameter, where the logger takes histograms.

    Zeros have no logarithm and are left out, and so are weights that were removed before.

    Args:
        trainer: Its loggers are asked for ``experiment.add_histogram``, as TensorBoard's has it.
        scores: The scores by which an event decided.
        masks: The masks before the event; a parameter without one is complete.
        prefix: What stands before the first slash.
    """
    experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    writers = [e for e in experiments if callable(getattr(e, "add_histogram", None))]
    if not writers:
        return
    for name, score in scores.items():
        values = _spread(score if name not in masks else score[masks[name].to(score.device)])
        values = values[values > 0].log10().cpu()
        for writer in writers if values.numel() else ():
            writer.add_histogram(f"{prefix}/score_log10/{name}", values, trainer.global_step)


def _spread(score: Tensor) -> Tensor:
    """Return the scores of a parameter in one row, thinned out evenly if there are too many."""
    flat = score.detach().reshape(-1)
    return precise(flat[:: max(1, -(-flat.numel() // HISTOGRAM_SAMPLES))])


_EXAMPLE = PruningRecord(
    epoch=2,
    step=300,
    target=0.5,
    sparsity=0.5,
    kept=500,
    total=1000,
    density={"fc.weight": 0.5},
    threshold=1.5e-7,
    samples=64,
    dropped_energy=0.0,
    seconds=0.2,
)
