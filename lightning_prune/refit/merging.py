"""Few batches of a good size: not more samples than asked for, small ones put together.

Enters: batches in the user's form. Leaves: batches of the same form and content.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune.passes.batches import batch_size, outside_inference_mode, take_samples

AT_MOST = 1024
"""Samples in a merged batch; more of them made no pass faster, measured on a small network."""


def first_samples(batches: Iterable[Any], samples: int) -> list[Any]:
    """Return the batches up to ``samples`` samples; the last one may be cut.

    Example:
        >>> first_samples([torch.arange(3), torch.arange(3), torch.arange(3)], 4)
        [tensor([0, 1, 2]), tensor([0])]
    """
    taken: list[Any] = []
    for batch in batches:
        if samples <= 0:
            break
        size = batch_size(batch)
        taken.append(batch if size <= samples else take_samples(batch, torch.arange(samples)))
        samples -= size
    return taken


def merge_batches(batches: Iterable[Any], at_most: int = AT_MOST) -> Iterator[Any]:
    """Yield the same samples in the same order, in batches of up to ``at_most``.

    Neighbours are put together if they have the same form and hold nothing but tensors with one
    entry a sample, equal in type and shape but for the number of samples. Others are passed on as
    they are. Inference tensors come out as plain ones.

    Example:
        >>> x = torch.ones(2, 3)
        >>> [tuple(batch.shape) for batch in merge_batches([x, x, x], at_most=4)]
        [(4, 3), (2, 3)]
    """
    waiting: list[Any] = []
    form: Hashable = None
    for batch in map(outside_inference_mode, batches):
        new = _form(batch)
        size = sum(map(batch_size, waiting)) + batch_size(batch)
        if waiting and (new is None or new != form or size > at_most):
            yield _concatenated(waiting)
            waiting = []
        waiting.append(batch)
        form = new
    if waiting:
        yield _concatenated(waiting)


def _form(batch: Any) -> Hashable:
    """Describe everything about a batch but its length; None for what can't be put together."""
    leaves, structure = pytree.tree_flatten(batch)
    size = batch_size(batch)
    if not all(isinstance(t, Tensor) and t.ndim and len(t) == size for t in leaves):
        return None
    # As text, since not every version of torch can hash the structure.
    return str(structure), tuple((t.shape[1:], t.dtype, t.device) for t in leaves)


def _concatenated(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    return pytree.tree_map(lambda *leaves: torch.cat(leaves), *batches)
