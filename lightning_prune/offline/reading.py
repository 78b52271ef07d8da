"""The user's batches as a list, and what to say where they are one batch instead.

Enters: whatever was given as ``batches``. Leaves: a list of batches, or an error that says what to
give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_prune.exceptions import BatchFormatError, NonFiniteScoresError
from lightning_prune.passes.isolation import own_randomness


def read_batches(batches: Iterable[Any], seed: int) -> list[Any]:
    """Return all batches, read with random numbers of our own.

    Raises:
        TypeError: It is a tensor, whose rows would be the batches, or a mapping: one batch.
        ValueError: There are none.
    """
    if isinstance(batches, (Tensor, Mapping)):
        got = (
            f"one tensor of shape {tuple(batches.shape)}"
            if isinstance(batches, Tensor)
            else f"one {type(batches).__name__} with the keys {list(batches)}"
        )
        raise TypeError(
            f"Expected `batches` to be an iterable of batches, but got {got}. If that is a batch, "
            "give it in a list: `[batch]`."
        )
    with own_randomness(torch.device("cpu"), seed, "batches"):  # a DataLoader draws a seed
        real = list(batches)
    if not real:
        raise ValueError("Expected at least one batch to prune by but `batches` was empty.")
    return real


@contextmanager
def several_batches(real: list[Any]) -> Iterator[None]:
    """Say of batches that could not be run if they look like the parts of a single one.

    ``(x, y)`` in place of ``[(x, y)]`` is taken for two batches, x and y, and each may be one: so
    nothing is said before one of them has failed.

    Raises:
        BatchFormatError: In place of what a model, or ``forward``, has raised.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        if isinstance(error, NonFiniteScoresError) or not _looks_like_one(real):
            raise
        shapes = ", ".join(str(tuple(part.shape)) for part in real)
        raise BatchFormatError(
            f"Expected `batches` to be an iterable of batches, but got {len(real)} tensors with "
            f"the same number of samples and otherwise unlike, {shapes}. Each was taken for a "
            "batch, and one of them could not be run. If they are the inputs and the labels of one "
            f"batch, give that in a list: `[(x, y)]`. The error was {type(error).__name__}: {error}"
        ) from error


def _looks_like_one(real: list[Any]) -> bool:
    if len(real) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in real):
        return False
    forms = {(part.shape[1:], part.dtype) for part in real}
    return len({len(part) for part in real}) == 1 and len(forms) > 1
