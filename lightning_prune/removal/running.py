"""How a model is run to be proved right: its inputs, inputs like them, and what comes out.

Enters: a model, example inputs, perhaps a ``forward``. Leaves: tensors, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.passes.batches import outside_inference_mode
from lightning_prune.removal.proof import RemovalError

Run: TypeAlias = Callable[[nn.Module, Any], list[Tensor]]
"""``run(model, inputs)``: the tensors in the model's output."""


def runner(forward: Callable[[nn.Module, Any], Any] | None) -> Run:
    """Return the function that runs a model on inputs and lists the tensors of its output.

    Args:
        forward: ``forward(model, inputs)``; by default a tensor is the model's one argument, a
            tuple or list its positional ones, and a mapping its keyword arguments.
    """

    def run(model: nn.Module, inputs: Any) -> list[Tensor]:
        if forward is not None:
            output = forward(model, inputs)
        elif isinstance(inputs, Mapping):
            output = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = model(*inputs)
        else:
            output = model(inputs)
        return tensors_in(output, model)

    return run


def tensors_in(output: Any, model: nn.Module) -> list[Tensor]:
    """List the tensors in a nested output, in a fixed order.

    Raises:
        RemovalError: There is none.
    """
    found = list(_nested(output, set()))
    if not found:
        raise RemovalError(
            f"Expected {type(model).__name__} to return tensors, nested in any way, but got a "
            f"{type(output).__name__} without any. Pass `forward=lambda model, inputs: tensor`."
        )
    return found


def _nested(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in containers that torch knows, in other mappings and in objects."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, (nn.Module, type)):
            seen.add(id(leaf))  # an object may hold itself
            inner = [*leaf.values()] if isinstance(leaf, Mapping) else []
            inner += [*leaf] if isinstance(leaf, (list, tuple)) else []
            inner += [*vars(leaf).values()] if hasattr(leaf, "__dict__") else []
            for each in inner:
                yield from _nested(each, seen)


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Refuse, for a block that runs a copy of a model, that a module of the model itself runs.

    A function that was hung on a module and holds on to it (a decorated ``forward``, a lambda over
    ``self``) is not copied along, and whatever is proved of such a copy is proved of the original.

    Raises:
        RemovalError: One does.
    """

    def refuse(module: nn.Module, args: Any) -> None:
        raise RemovalError(
            f"Expected a copy of {type(model).__name__} to run its own layers, but it called a "
            f"{type(module).__name__} of the original: a function set as an attribute of a module, "
            "such as a decorated `forward` or a lambda over `self`, holds on to it. Make it a "
            "method of the class."
        )

    handles = [each.register_forward_pre_hook(refuse) for each in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def floats_as(inputs: Any, dtype: torch.dtype | None) -> Any:
    """Return the inputs as tensors of our own, the floating-point ones in ``dtype`` if given."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        own = leaf.detach().clone()
        return own.to(dtype) if dtype is not None and own.is_floating_point() else own

    return pytree.tree_map(cast, outside_inference_mode(inputs))


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
    many of them: what is a constant for the example need not be one. So a quarter of the integers
    and bits are drawn anew (none in the first place of the last axis: no sample is masked as a
    whole), and each size but the batch's is doubled and halved, for two samples. What makes the
    model fail, or give NaN or infinity, is left out.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    batch = next((len(leaf) for leaf in leaves if leaf.dim()), 0)
    sizes = {size for leaf in leaves for size in leaf.shape[1:] if size > 1}
    changes = [(old, new) for old in sorted(sizes) for new in (2 * old, old // 2)]
    found = [_resized(inputs, batch, old, new) for old, new in changes]
    if any(not leaf.is_floating_point() for leaf in leaves):
        found.append(pytree.tree_map(_flipped, inputs))
    return [each for each in found if _is_taken(each, model, run)]


def _is_taken(inputs: Any, model: nn.Module, run: Run) -> bool:
    try:
        with torch.no_grad():
            outputs = run(model, inputs)
    except Exception:  # noqa: BLE001 (whatever a model does with a size it was not made for)
        return False
    return all(bool(output.isfinite().all()) for output in outputs)


def _resized(inputs: Any, batch: int, old: int, new: int) -> Any:
    """Return two samples in which every axis of one size has another."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for axis, size in enumerate(leaf.shape):
            if axis == 0 and size == batch:
                leaf = leaf[:2]
            elif size == old:
                leaf = torch.cat([leaf, leaf], axis).narrow(axis, 0, new)
        return leaf

    return pytree.tree_map(resize, inputs)


def _flipped(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.is_floating_point() or not leaf.numel():
        return leaf
    chosen = torch.rand(leaf.shape) < 0.25
    if leaf.dim():
        chosen[..., 0] = False
    if leaf.dtype == torch.bool:
        return leaf ^ chosen.to(leaf.device)
    low, high = min(0, int(leaf.min())), max(1, int(leaf.max()))
    drawn = torch.randint(low, high + 1, leaf.shape)
    return torch.where(chosen.to(leaf.device), drawn.to(leaf), leaf)
