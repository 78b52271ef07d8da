"""What scores and masks have to be before anything is decided by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune._types import Masks, Scores
from lightning_prune.exceptions import NonFiniteScoresError


def check_scores(scores: Scores) -> None:
    """Refuse scores by which no weights can be ranked.

    Raises:
        ValueError: There are no scores at all.
        NonFiniteScoresError: A score is NaN or infinite; the message names the parameters.
    """
    if not any(score.numel() for score in scores.values()):
        raise ValueError("Expected scores of at least one weight, but got none.")
    broken = [
        f"{name!r} ({int((~torch.isfinite(score)).sum())} of {score.numel()})"
        for name, score in scores.items()
        if not bool(torch.isfinite(score).all())
    ]
    if broken:
        raise NonFiniteScoresError(
            f"Expected finite scores, but got NaN or infinity in {', '.join(broken)}. Nothing is "
            "pruned by them. Has the training diverged? Look at the loss, the learning rate and "
            "the inputs."
        )


def check_masks(masks: Masks | None, scores: Scores) -> None:
    """Refuse masks that do not belong to the scores.

    Raises:
        ValueError: A mask has no score, or another shape than its score.
        TypeError: A mask is not of dtype ``torch.bool``.
    """
    for name, mask in (masks or {}).items():
        if name not in scores:
            raise ValueError(f"Expected a score for every mask, but {name!r} has a mask only.")
        if mask.dtype != torch.bool:
            raise TypeError(f"Expected the mask of {name!r} to be bool, but got {mask.dtype}.")
        check_shape(name, mask, scores[name])


def check_saliency(saliency: Scores | None, scores: Scores) -> Scores:
    """Return R for exactly the weights that are scored, in their order.

    Raises:
        ValueError: There is none, parameters are missing, or a shape is not the score's.
        NonFiniteScoresError: R is NaN or infinite; the message names the parameters.
    """
    missing = [name for name in scores if saliency is None or name not in saliency]
    if saliency is None or missing:
        raise ValueError(
            "Expected argument `saliency` to hold R of every weight, removed ones included, for "
            f"regrowth, but it is missing for {', '.join(map(repr, missing))}. Score with "
            "squared_gradients, or leave `regrow` at 0."
        )
    for name, score in scores.items():
        check_shape(name, saliency[name], score)
    found = {name: saliency[name].detach() for name in scores}
    check_scores(found)
    return found


def check_shape(name: str, tensor: Any, like: Tensor) -> None:
    """Refuse ``tensor`` unless it is a tensor with the shape of ``like``.

    Raises:
        TypeError: It is no tensor.
        ValueError: It has another shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"Expected a tensor for {name!r}, but got {type(tensor).__name__}.")
    if tensor.shape != like.shape:
        raise ValueError(
            f"Expected a tensor of shape {tuple(like.shape)} for {name!r}, but got "
            f"{tuple(tensor.shape)}."
        )


def check_criterion_result(result: Any, parameters: Mapping[str, Tensor]) -> Scores:
    """Return what a criterion gave back if it is a score for every weight, and nothing else.

    Raises:
        TypeError: It is no mapping, or holds something else than tensors.
        ValueError: Names are missing or unknown, or a shape differs from the parameter's.
        NonFiniteScoresError: A score is NaN or infinite.
    """
    if not isinstance(result, Mapping):
        raise TypeError(
            "Expected the criterion to return a mapping parameter name -> scores, but got "
            f"{type(result).__name__}."
        )
    missing = [name for name in parameters if name not in result]
    unknown = [name for name in result if name not in parameters]
    if missing or unknown:
        raise ValueError(
            "Expected the criterion to return scores for exactly the parameters it was given, but "
            f"{missing or 'none'} are missing and {unknown or 'none'} are unknown."
        )
    for name, parameter in parameters.items():
        check_shape(name, result[name], parameter)
    scores = {name: result[name].detach() for name in parameters}
    check_scores(scores)
    return scores
