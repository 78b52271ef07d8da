"""Names -> the parameters of a model that are to be scored, and a check of their scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.exceptions import NonFiniteScoresError


def named_tensors(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    """Return the parameters of these names in the model's order; None means all, tied ones once.

    Raises:
        ValueError: Naming what is unknown and what is there.
    """
    known: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=names is None))
    if names is None:
        chosen = known
    else:
        names = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                "Expected argument `parameters` to name parameters of the model but got "
                f"{unknown}. It has {list(known)}."
            )
        wanted = set(names)
        chosen = {name: known[name] for name in known if name in wanted}
    chosen = {name: p for name, p in chosen.items() if p.is_floating_point()}
    if not chosen:
        raise ValueError(
            "Expected at least one floating point parameter to score, but the selection is empty."
        )
    return chosen


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteScoresError naming the parameters whose scores are NaN or infinite."""
    # A sum is finite only if all its terms are, and takes no memory; the reverse may fail.
    doubtful = {n: score for n, score in scores.items() if not math.isfinite(float(score.sum()))}
    bad = [name for name, score in doubtful.items() if not bool(torch.isfinite(score).all())]
    if bad:
        raise NonFiniteScoresError(f"Expected finite scores, but those of {bad} are not.")
