"""By what are weights ranked? From the saliency R and the weights w to one score per weight."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_prune._types import Scores
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.selection.checks import check_criterion_result

CriterionFunction: TypeAlias = Callable[[Scores, Mapping[str, Tensor]], Scores]
"""``(scores, parameters) -> scores``: R and the weights, both by parameter name, to a ranking."""


@dataclass(frozen=True)
class Criterion:
    """A way to rank weights, and whether it has to see R first.

    Args:
        name: What the user called it, for messages.
        needs_scores: Whether the squared gradients R enter; without them no scoring pass is needed.
        function: The ranking itself.
        needs_prices: Whether second-order prices enter, in the place of R.
        one_by_one: Whether they are those of weights that leave their row one after another.
    """

    name: str
    needs_scores: bool
    function: CriterionFunction
    needs_prices: bool = False
    one_by_one: bool = False

    def __call__(self, scores: Scores, parameters: Mapping[str, Tensor]) -> Scores:
        """Return one finite score for each weight; larger is more important.

        Args:
            scores: R for each parameter, or its prices if ``needs_prices``; otherwise ignored.
            parameters: The weights, by name, as they are now.

        Raises:
            TypeError: A callable of the user's gave back something else than tensors by name.
            ValueError: Names or shapes of the result are not those of ``parameters``.
            NonFiniteScoresError: A score is NaN or infinite; the message names the parameter.
        """
        weights = {name: parameter.detach() for name, parameter in parameters.items()}
        with torch.no_grad():
            result = self.function(scores, weights)
        try:
            found = check_criterion_result(result, weights)
        except (TypeError, ValueError, NonFiniteScoresError) as error:
            raise type(error)(f"The scores of criterion {self.name}: {error}") from error
        # A callable may give back the weights themselves, which will change under the scores.
        held = {weight.untyped_storage().data_ptr() for weight in weights.values()}
        return {
            name: score.clone() if score.untyped_storage().data_ptr() in held else score
            for name, score in found.items()
        }


def saliency(scores: Scores, parameters: Mapping[str, Tensor]) -> Scores:
    """Return R itself: how far the output moves when the weight moves by one."""
    return {name: scores[name] for name in parameters}


def taylor(scores: Scores, parameters: Mapping[str, Tensor]) -> Scores:
    """Return ``w^2 R``: how far, to first order, the output moves when the weight is removed.

    Source: Molchanov, Mallya, Tyree, Frosio and Kautz, 2019, "Importance estimation for neural
    network pruning" (there with the loss in place of the outputs).
    """
    return {
        name: parameter.to(scores[name].dtype).square() * scores[name]
        for name, parameter in parameters.items()
    }


def magnitude(scores: Scores, parameters: Mapping[str, Tensor]) -> Scores:
    """Return ``|w|``; R does not enter."""
    return {name: parameter.abs() for name, parameter in parameters.items()}


def obs(scores: Scores, parameters: Mapping[str, Tensor]) -> Scores:
    """Return the second-order prices, which stand in the place of R and are a ranking already.

    A weight's price is ``w^2 / [H^-1]_ii`` of its row's surviving inputs, times the row's output
    saliency: what the removal costs once the other weights of its row have made up for it.

    Source: Hassibi and Stork, 1993, "Second order derivatives for network pruning: Optimal Brain
    Surgeon" (there with the loss's own Hessian).
    """
    return {name: scores[name] for name in parameters}


def obc(scores: Scores, parameters: Mapping[str, Tensor]) -> Scores:
    """Return second-order prices that know of one another.

    What a weight costs when its row is taken apart, the cheapest weight first. ``"obs"`` prices
    each as if the others stayed.

    Source: Frantar, Singh and Alistarh, 2022, "Optimal Brain Compression: a framework for accurate
    post-training quantization and pruning".
    """
    return {name: scores[name] for name in parameters}


def random(scores: Scores, parameters: Mapping[str, Tensor], *, seed: int = 0) -> Scores:
    """Return uniform noise: the control that every other criterion has to beat.

    The noise depends on ``seed`` and the shapes only: it is drawn on the CPU by a generator of its
    own, so it is the same at every event, on every device and after a resume, and the global random
    state is untouched.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator).to(parameter.device)
        for name, parameter in parameters.items()
    }


CriterionLike: TypeAlias = (
    Literal["saliency", "taylor", "obs", "obc", "magnitude", "random"] | CriterionFunction
)
"""What users give: a name, in this order for configuration files, or a function."""

CRITERIA: Mapping[str, tuple[CriterionFunction, bool]] = {
    "saliency": (saliency, True),
    "taylor": (taylor, True),
    "obs": (obs, False),
    "obc": (obc, False),
    "magnitude": (magnitude, False),
    "random": (random, False),
}
"""Name -> the ranking and whether it needs R."""


def resolve_criterion(criterion: CriterionLike, *, seed: int = 0) -> Criterion:
    """Return the criterion a user asked for by name or wrote as a function.

    Args:
        criterion: ``"saliency"`` (R), ``"taylor"`` (w^2 R), ``"obs"`` and ``"obc"`` (second order),
            ``"magnitude"`` (|w|), ``"random"``, or a callable ``(scores, parameters) -> scores``. A
            callable gets R; one that does without says so by an attribute ``needs_scores = False``
            and then gets an empty mapping.
        seed: For ``"random"``.

    Raises:
        ValueError: There is no criterion of that name.
        TypeError: ``criterion`` is neither a name nor callable.

    Example:
        >>> resolve_criterion("taylor").needs_scores, resolve_criterion("magnitude").needs_scores
        (True, False)
        >>> resolve_criterion("tailor")
        Traceback (most recent call last):
            ...
        ValueError: Expected argument `criterion` to be one of 'saliency', 'taylor', 'obs', \
'obc', 'magnitude', 'random' or a callable (scores, parameters) -> scores, but got 'tailor'. Did \
you mean 'taylor'?
    """
    names = ", ".join(map(repr, CRITERIA))
    expected = (
        f"Expected argument `criterion` to be one of {names} or a callable "
        f"(scores, parameters) -> scores, but got {criterion!r}."
    )
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            close = difflib.get_close_matches(criterion, CRITERIA, n=1)
            raise ValueError(expected + (f" Did you mean {close[0]!r}?" if close else ""))
        function, needs_scores = CRITERIA[criterion]
        if function is random:
            function = partial(random, seed=seed)
        priced, one_by_one = function in (obs, obc), function is obc
        return Criterion(criterion, needs_scores, function, priced, one_by_one)
    if isinstance(criterion, type) or not callable(criterion):
        raise TypeError(expected)
    name = getattr(criterion, "__name__", type(criterion).__name__)
    return Criterion(name, bool(getattr(criterion, "needs_scores", True)), criterion)
