"""Example inputs as a call of the model: positional or by keyword, at any batch size.

Enters: example inputs as the user writes them. Leaves: an answer of the model, the same inputs with
more or fewer samples, or a copy of the model that can be called without its Trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import batch_size, take_samples

Model = TypeVar("Model", bound=nn.Module)

COMPILED_FROM = "_torchdynamo_orig_callable"
"""Where torch notes on a compiled function what it was compiled from."""


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that example inputs stand for.

    Args:
        example_inputs: A tuple or list is one argument an entry, a mapping one keyword an entry;
            anything else is the only argument.

    Raises:
        TypeError: No tensor is among them.

    Example:
        >>> args, keywords = arguments({"x": torch.ones(2, 3)})
        >>> args, list(keywords)
        ((), ['x'])
    """
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(_plain(example_inputs))):
        raise TypeError(
            "Expected argument `example_inputs` to be a tensor, a tuple of a call's arguments or a "
            f"dict of its keywords, with a tensor among them, but got {example_inputs!r:.80}."
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def answer(model: nn.Module, example_inputs: Any) -> Any:
    """Return what the model says to example inputs, as it is: mode and gradients are the caller's.

    Example:
        >>> answer(nn.Flatten(), (torch.ones(2, 3, 4),)).shape
        torch.Size([2, 12])
    """
    args, keywords = arguments(example_inputs)
    return model(*args, **keywords)


def resized(example_inputs: Any, samples: int) -> Any:
    """Return example inputs of the same form with ``samples`` samples, repeated or cut.

    Axis 0 of the first tensor counts the samples; every tensor with an axis 0 of the same length
    is resized along.

    Raises:
        ValueError: There is no sample to repeat, or no axis that counts samples.

    Example:
        >>> resized((torch.tensor([[1], [2]]),), 3)[0].tolist()
        [[1], [2], [1]]
    """
    arguments(example_inputs)
    try:
        size = batch_size(example_inputs)
    except BatchFormatError:
        size = 0
    if not size:
        raise ValueError(
            "Expected argument `example_inputs` to hold at least one sample, counted by axis 0 of "
            "its first tensor, but it has none."
        )
    return take_samples(example_inputs, torch.arange(samples) % size)


def copied(model: Model) -> Model:
    """Return a deep copy that runs as it was written; that of a LightningModule has no Trainer.

    Lightning keeps the Trainer in the module, and with it the loaders, the optimizers and the
    loggers, which nobody wants copied along and some of which cannot be. What ``module.compile()``
    or ``torch.compile(module)`` made of a method would go on to run the original's, so the copy has
    the plain method. A tensor with a history that is kept on a module (a loss) is copied without.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in ("_trainer", "_fabric", "_compiler_ctx"):
            if (attached := vars(module).get(name)) is not None:
                memo[id(attached)] = None
        for leaf in pytree.tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                memo[id(leaf)] = leaf.detach().clone()
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        _as_written(module, memo)
        if "_metric_attributes" in vars(module):
            # A LightningModule's notes on its metrics, by identity: a copy has others.
            vars(module)["_metric_attributes"] = None
    return twin


def _as_written(module: nn.Module, memo: dict[int, Any]) -> None:
    """Take off a copied module what was compiled of the original, which copies by reference.

    Args:
        module: Of the copy.
        memo: What ``copy.deepcopy`` noted: the original's modules and their twins.
    """
    held = vars(module)
    # nn.Module leaves it out of a copy, LightningModule does not.
    held.pop("_compiled_call_impl", None)
    for name, value in list(held.items()):
        method = value
        while isinstance(method, FunctionType) and hasattr(method, COMPILED_FROM):
            method = getattr(method, COMPILED_FROM)
        if method is value or not isinstance(method, MethodType) or id(method.__self__) not in memo:
            continue
        if method.__func__ is getattr(type(module), name, None):
            del held[name]
        else:
            held[name] = copy.deepcopy(method, memo)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
