"""Inputs to prove a smaller model by: like the example, and unlike it as far as the model goes.

Enters: example inputs, and for the unlike ones the model. Leaves: inputs of the same form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.removal.calls import copied
from lightning_prune.removal.running import Run


def probes(inputs: Any) -> list[Any]:
    """Return the inputs and random ones of the same shapes.

    Floating-point tensors are drawn with the mean and the standard deviation of the example, once
    about its mean and once about zero and three times as wide; all others are permuted.
    """
    return [inputs, _redrawn(inputs, 1.0, 1.0), _redrawn(inputs, 0.0, 3.0)]


def _redrawn(inputs: Any, centre: float, width: float) -> Any:
    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.numel():
            return leaf
        if not leaf.is_floating_point():
            order = torch.randperm(leaf.numel()).to(leaf.device)
            return leaf.reshape(-1)[order].reshape(leaf.shape)
        spread = leaf.std(correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        noise = torch.randn(leaf.shape, dtype=leaf.dtype).to(leaf.device)
        return leaf.mean() * centre + noise * spread * width

    return pytree.tree_map(draw, inputs)


def variants(inputs: Any, model: nn.Module, run: Run) -> list[Any]:
    """Return inputs unlike the example in what no redrawing changes, if the model takes them.

    A mask of ones stays one however it is permuted, and a sum over positions is the same for as
    many of them: what is a constant for the example need not be one. So integers and bits are drawn
    anew (a quarter of them and all, none in the first place of the last axis: no sample is masked
    as a whole), and each size but the batch's is doubled and halved, for two samples: on all axes
    that have it, or, if the model does not take that, on one.

    They are tried on copies on the CPU and have to be run on copies: a model may keep a table that
    grows with the inputs.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    batch = next((len(leaf) for leaf in leaves if leaf.dim()), 0)
    found: list[Any] = []

    def taken(change: Callable[[Any, int], Any]) -> bool:
        """Change the leaves by ``change(leaf, number)``; keep the result if the model takes it."""
        try:
            flat, form = pytree.tree_flatten(inputs)
            changed = pytree.tree_unflatten([change(leaf, i) for i, leaf in enumerate(flat)], form)
            if not _is_taken(changed, model, run):
                return False
        except Exception:  # noqa: BLE001 (whatever a model does with a size it was not made for)
            return False
        found.append(changed)
        return True

    for old in sorted({size for leaf in leaves for size in leaf.shape[1:] if size}):
        for new in (2 * old, old // 2):
            resized = partial(_resized, batch=batch, old=old, new=new)
            if new and not taken(resized):
                for place in _places(inputs, batch, old):
                    taken(partial(resized, only=place))
    if any(_is_discrete(leaf) for leaf in leaves):
        for share in (0.25, 1.0):
            taken(partial(_flipped, share=share))
    return found


def _is_taken(inputs: Any, model: nn.Module, run: Run) -> bool:
    inputs = pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, inputs)
    with torch.no_grad():
        return telling(run(copied(model).cpu(), inputs))


def telling(outputs: list[Tensor]) -> bool:
    """Tell whether outputs prove anything when others agree with them: no NaN, nor infinite all."""
    return not any(bool(x.isnan().any()) for x in outputs) and all(
        bool(x.isfinite().any()) for x in outputs if x.numel()
    )


def _places(inputs: Any, batch: int, size: int) -> list[tuple[int, int]]:
    """Return the axes of a size, as number of the leaf and axis, if there are several."""
    found = [
        (number, axis)
        for number, leaf in enumerate(pytree.tree_leaves(inputs))
        if isinstance(leaf, Tensor)
        for axis, length in enumerate(leaf.shape)
        if length == size and not (axis == 0 and length == batch)
    ]
    return found if len(found) > 1 else []


def _resized(
    leaf: Any, number: int, *, batch: int, old: int, new: int, only: tuple[int, int] | None = None
) -> Any:
    """Return two samples in which all axes of one size, or only one of them, have another."""
    if not isinstance(leaf, Tensor):
        return leaf
    for axis, size in enumerate(leaf.shape):
        if axis == 0 and size == batch:
            leaf = leaf[:2]
        elif size == old and only in (None, (number, axis)):
            leaf = torch.cat([leaf, leaf], axis).narrow(axis, 0, new)
    return leaf


def _is_discrete(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())


def _flipped(leaf: Any, number: int, *, share: float) -> Any:
    if not _is_discrete(leaf) or not leaf.numel():
        return leaf
    chosen = torch.rand(leaf.shape) < share
    long = [axis for axis, size in enumerate(leaf.shape) if size > 1]
    if long:
        chosen.select(long[-1], 0).fill_(False)
    if leaf.dtype == torch.bool:
        return leaf ^ chosen.to(leaf.device)
    low, high = min(0, int(leaf.min())), min(max(1, int(leaf.max())), 2**63 - 2)
    drawn = torch.randint(low, high + 1, leaf.shape)
    return torch.where(chosen.to(leaf.device), drawn.to(leaf), leaf)
