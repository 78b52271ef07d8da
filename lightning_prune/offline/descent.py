"""One way down: a trained model is scored, loses weights and is corrected, stage by stage.

Enters: shares to be removed, and samples. Leaves: masks, on a model that has zeros in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune._types import Forward, Likelihood, Masks, Scores
from lightning_prune.masking import count_removed, unread_rows, zero_removed
from lightning_prune.offline.generated import Trial, group_divergences
from lightning_prune.passes.isolation import evaluating
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import Calibration, Refit, hold_out, obs_prices, refit_survivors
from lightning_prune.saliency import RandomSigns, Target, squared_gradients
from lightning_prune.selection import Criterion, Selection
from lightning_prune.selection.ranking import complete_masks


@dataclass(frozen=True)
class Scoring:
    """How the weights of a network as it is now are ranked; for the arguments see ``prune``."""

    model: nn.Module
    parameters: Mapping[str, Tensor]
    ranking: Criterion
    target: Target
    likelihood: Likelihood
    tolerance: float
    signs: RandomSigns | None
    forward: Forward

    def __call__(self, batches: list[Any], masks: Masks) -> tuple[Scores, Scores | None]:
        """Return the scores of all weights, and R where the ranking needs it."""
        names = list(self.parameters)
        if self.ranking.needs_scores:
            with evaluating(self.model):  # batch norm that is training has no scores to give
                saliency = squared_gradients(
                    self.model,
                    batches,
                    target=self.target,
                    likelihood=self.likelihood,
                    tolerance=self.tolerance,
                    signs=self.signs,
                    forward=self.forward,
                    parameters=names,
                )
            return self.ranking(saliency, self.parameters), saliency
        prices: Scores = {}
        if self.ranking.needs_prices:
            prices = obs_prices(
                self.model,
                masks,
                names,
                batches,
                forward=self.forward,
                likelihood=self.likelihood,
                one_by_one=self.ranking.one_by_one,
            )
        return self.ranking(prices, self.parameters), None


@dataclass(frozen=True)
class Pruned:
    """What a way down has led to.

    Attributes:
        masks: Those in force at its end.
        guarded: The parameters that the guard spared.
        left: What no refit corrected, and why.
        unread: What to warn of look-up tables.
    """

    masks: Masks
    guarded: list[str]
    left: dict[str, str]
    unread: list[str]


@dataclass(frozen=True)
class Descent:
    """A model on its way down from its dense self; a call is one way down, in stages.

    Args:
        scoring: The model, and how its weights are ranked.
        selection: What is removed as one piece, and what is spared.
        method: Which refit follows each stage, ``None`` for none.
    """

    scoring: Scoring
    selection: Selection
    method: Refit | None

    def __call__(
        self,
        dense: Teacher,
        path: list[float],
        masks: Masks | None,
        real: list[Any],
        extra: list[Any],
    ) -> Pruned:
        """Prune along a path.

        If anything goes wrong the model is somewhere on its way: ``dense``, which is the model as
        it is now, can take it back.
        """
        model, parameters = self.scoring.model, self.scoring.parameters
        fit, held_out = hold_out(real)
        calibration = self._calibration(dense, fit, held_out, extra)
        masks = complete_masks(dict(parameters), masks)
        corrected, left, guarded = set[str](), dict[str, str](), list[str]()
        unread: dict[str, str] = {}
        for share in path:
            scores, saliency = self.scoring([*real, *extra], masks)
            selected = self.selection(scores, share, masks=masks, saliency=saliency)
            if saliency is not None:
                unread = {**unread_rows(model, saliency, masks, selected.masks), **unread}
            masks, guarded = selected.masks, selected.guarded
            zero_removed(parameters, masks)
            if self.method is not None and count_removed(masks)[0]:
                report = refit_survivors(model, masks, calibration, self.method)
                corrected.update(report.refitted)
                left = report.left
        left = {n: why for n, why in left.items() if n not in corrected}
        return Pruned(masks, guarded, left, list(unread.values()))

    def trial(self, path: list[float], masks: Masks | None) -> Trial:
        """Return a way down that is taken back: batches -> how far it leads from the dense model.

        That is (real, generated, unseen) -> the divergence on each group of unseen samples, nats.
        """

        def measured(real: list[Any], extra: list[Any], unseen: list[Any]) -> Tensor:
            dense = Teacher.of(self.scoring.model)
            try:
                self(dense, path, masks, real, extra)
                return group_divergences(
                    self.scoring.model, self._calibration(dense, [], unseen, [])
                )
            finally:
                dense.restore(self.scoring.model)

        return measured

    def _calibration(
        self, dense: Teacher, fit: list[Any], held_out: list[Any], extra: list[Any]
    ) -> Calibration:
        how = self.scoring.forward, self.scoring.likelihood
        return Calibration(dense, fit, held_out, *how, extra)
