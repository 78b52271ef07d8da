"""Checkpoints that are compared with their like: the best one of each sparsity."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.scoring import is_fitting
from lightning_prune.callbacks.sparsity_level import (
    DIGITS,
    MeasuredBefore,
    check_pruners,
    check_target,
    pruning_is_over,
    sparsity_in_force,
)

Levels: TypeAlias = Literal["each", "last"]

_RANKING = (
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "best_model_path",
    "best_model_score",
    "current_score",
)
"""The attributes in which ModelCheckpoint keeps its ranking; here there is one of each level."""


class SparsityCheckpoint(ModelCheckpoint):
    """Save the best checkpoints at each sparsity reached, or at the last one only.

    Lightning's ``ModelCheckpoint`` compares a pruned model with the dense one it was, and keeps the
    dense one because it scores best. This one keeps a ranking for each sparsity: a checkpoint is
    compared with, and replaces, those of its own level only. Levels are sparsities rounded to 4
    decimals. Everything else is ``ModelCheckpoint``'s, for each level by itself (``save_top_k`` is
    a number of files a level) and ``save_last`` for all.

    A checkpoint's level is the sparsity of the weights that are in it. A metric that is older than
    the last pruning event, which can be seen only when saving between two validations, was measured
    on other weights: such a checkpoint is not ranked.

    Args:
        dirpath: The directory to save to.
        filename: The files' name; ``-{sparsity:.4f}`` is added to one without a ``{sparsity}``.
        monitor: The metric to rank by; ``None`` keeps the latest checkpoint of each level.
        levels: ``"each"`` ranks at every sparsity, the dense model's 0 included. ``"last"`` saves
            (other than by ``save_last``) only once the masks of the last target are in force.
        target: For ``levels="last"``: the share removed, in [0, 1), from which on to save; by
            default the last target of the pruners' schedules. Needed if a schedule does not know
            its end (a callable).
        **kwargs: As for :class:`lightning.pytorch.callbacks.ModelCheckpoint`: ``mode``,
            ``save_last``, ``save_top_k``, ...

    Attributes:
        best_model_path: The best checkpoint at the highest sparsity that has one; also what
            ``trainer.test(ckpt_path="best")`` takes.
        best_model_score: Its score. The other attributes of a ranking are of that level, too.

    Raises:
        ValueError: ``levels`` or ``target`` is not among its values.
        PruningSetupError: At the start of a fit: the Trainer has no pruner, or, with
            ``levels="last"``, one whose schedule does not know its end, and there is no ``target``.

    Example:
        >>> checkpoint = SparsityCheckpoint(monitor="val_loss", mode="min", save_last=True)
        >>> checkpoint.filename
        '{epoch}-{step}-{sparsity:.4f}'
        >>> checkpoint.best_by_sparsity  # after a fit {0.0: ("....ckpt", 0.12), 0.5: ...}
        {}
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        *,
        levels: Levels = "each",
        target: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename, monitor, **kwargs)
        if levels not in get_args(Levels):
            raise ValueError(
                f"Expected argument `levels` to be one of {get_args(Levels)}, but got {levels!r}."
            )
        check_target(target)
        self.levels = levels
        self.target = target
        self.filename = _with_sparsity(filename, named=self.auto_insert_metric_name)
        self._measured_before = MeasuredBefore(monitor)
        self._unranked = self._ranking()
        self._rankings: dict[float, dict[str, Any]] = {}
        self._level: float | None = None  # the one whose ranking is in the attributes

    @property
    def best_by_sparsity(self) -> dict[float, tuple[str, float | None]]:
        """Sparsity -> (path, score) of its best checkpoint; without a ``monitor`` no score."""
        found = {}
        for level, ranking in sorted(self._all_rankings().items()):
            score = ranking["best_model_score"]
            if ranking["best_model_path"]:
                found[level] = (ranking["best_model_path"], None if score is None else float(score))
        return found

    @property
    @override
    def state_key(self) -> str:
        """Tell apart the rankings of all levels and of the last one, in one Trainer."""
        return f"{super().state_key}[{self.levels}]"

    # ------------------------------------------------------------------ before and after the fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            last = self.levels == "last"
            check_pruners(trainer, type(self).__name__, needs_end=last, target=self.target)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if (
            self.levels == "last"
            and not getattr(trainer, "fast_dev_run", False)
            and not pruning_is_over(trainer, self.target)
        ):
            rank_zero_warn(
                "SparsityCheckpoint(levels='last') has saved no checkpoint in this fit: it ends at "
                f"a sparsity of {sparsity_in_force(trainer):.4f}, before the last target's masks "
                "were in force in an epoch. Train for longer, or choose levels='each'."
            )

    # ------------------------------------------------------------------ a ranking for each level

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer):
            self._measured_before.note(trainer)
        super().on_validation_end(trainer, pl_module)

    @override
    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        level = torch.tensor(_level_of(trainer), dtype=torch.float64)
        return {**super()._monitor_candidates(trainer), "sparsity": level}

    @override
    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        if self.levels == "last" and not pruning_is_over(trainer, self.target):
            return
        if self._measured_before.an_event(trainer):
            return
        self._hold(_level_of(trainer))
        try:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        finally:
            self._hold(self._highest())

    def _highest(self) -> float:
        """Return the highest level that has a checkpoint."""
        rankings = self._all_rankings()
        return max(rankings, key=lambda level: (rankings[level]["best_model_path"] != "", level))

    def _hold(self, level: float) -> None:
        """Put the ranking of a level into the attributes in which ModelCheckpoint looks for it."""
        self._rankings = self._all_rankings()
        ranking = self._rankings.setdefault(level, {**self._unranked, "best_k_models": {}})
        self._level = level
        for name, value in ranking.items():
            setattr(self, name, value)

    def _ranking(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RANKING}

    def _all_rankings(self) -> dict[float, dict[str, Any]]:
        held = {} if self._level is None else {self._level: self._ranking()}
        return {**self._rankings, **held}

    # ------------------------------------------------------------------ the state

    @override
    def state_dict(self) -> dict[str, Any]:
        rankings = self._all_rankings()
        highest = rankings[self._highest()] if rankings else {}
        levels = [{"sparsity": level, **ranking} for level, ranking in rankings.items()]
        return {**super().state_dict(), **highest, "levels": levels}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._rankings, self._level = {}, None
        moved = self.dirpath != state_dict.get("dirpath", self.dirpath)
        for stored in state_dict["levels"]:
            ranking = {name: stored[name] for name in _RANKING}
            if moved:  # as ModelCheckpoint has it: the best is remembered, and the ranking is new
                best = {k: ranking[k] for k in ("best_model_path", "best_model_score")}
                ranking = {**self._unranked, "best_k_models": {}, **best}
            self._rankings[stored["sparsity"]] = ranking
        if self._rankings:
            self._hold(self._highest())


def _level_of(trainer: Trainer) -> float:
    return round(sparsity_in_force(trainer), DIGITS)


def _with_sparsity(filename: str | None, *, named: bool) -> str:
    """Return a template of file names that has the sparsity in it.

    Args:
        filename: The user's, if any.
        named: Whether ModelCheckpoint writes ``name=`` before a value.

    Example:
        >>> _with_sparsity("best", named=True), _with_sparsity("{sparsity:.1f}", named=True)
        ('best-{sparsity:.4f}', '{sparsity:.1f}')
        >>> _with_sparsity(None, named=False)
        '{epoch}-{step}-sparsity={sparsity:.4f}'
    """
    filename = filename or "{epoch}-{step}"
    if re.search(r"\{sparsity[:}]", filename):
        return filename
    value = f"{{sparsity:.{DIGITS}f}}"
    return f"{filename}-{value}" if named else f"{filename}-sparsity={value}"
