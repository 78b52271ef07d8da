"""A model's weights of an earlier moment, kept as plain tensors, and what they answer.

Enters: a model. Leaves: the logits it gave then. The model is never copied: its own modules run
with the kept tensors in the place of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune._types import Forward
from lightning_prune.passes.isolation import evaluating


class Teacher:
    """A model's parameters and buffers as they were.

    Args:
        weights: Tensors by their ``named_parameters()`` or ``named_buffers()`` name.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> teacher = Teacher.of(model)
        >>> x = torch.ones(1, 2)
        >>> before = model(x)
        >>> _ = nn.init.zeros_(model.weight)
        >>> bool(torch.equal(teacher.logits(model, x, lambda module, batch: module(batch)), before))
        True
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)

    @classmethod
    def of(cls, module: nn.Module) -> Teacher:
        """Keep what ``module`` is now. Costs the memory of its parameters and buffers."""
        named = [*module.named_parameters(), *module.named_buffers()]
        return cls({name: tensor.detach().clone() for name, tensor in named})

    @classmethod
    def given(cls, module: nn.Module, weights: Mapping[str, Tensor]) -> Teacher:
        """Keep copies of the weights of a state dict of ``module``, as it would load them.

        What its own state dict leaves out (buffers that are not persistent) is as it is now.

        Raises:
            ValueError: Names are missing or unknown, or shapes differ; the message begins in the
                middle of a sentence.
        """
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        known = module.state_dict().keys()
        shapes = [
            f"{name!r} is {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in named.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        missing = [f"{n!r} is missing" for n in named if n in known and n not in weights]
        unknown = [f"{n!r} is unknown" for n in weights if n not in known]
        if faults := [*shapes, *missing, *unknown]:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ValueError(f"{', '.join(faults[:3])}{more}")
        return cls(
            {
                name: weights.get(name, tensor).detach().to(tensor, copy=True)
                for name, tensor in named.items()
            }
        )

    def like(self, module: nn.Module) -> Teacher:
        """Return these weights on the device and in the precision of the module's own."""
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        moved = {name: tensor.to(named[name]) for name, tensor in self.weights.items()}
        same = all(moved[name] is tensor for name, tensor in self.weights.items())
        return self if same else Teacher(moved)

    def fits(self, module: nn.Module) -> bool:
        """Whether every kept tensor has its place in ``module``."""
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {name: t.shape for name, t in named.items()} == {
            name: t.shape for name, t in self.weights.items()
        }

    def restore(self, module: nn.Module) -> None:
        """Give ``module`` its kept weights and buffers back, in place."""
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, tensor in self.weights.items():
                named[name].copy_(tensor)

    def logits(self, module: nn.Module, batch: Any, forward: Forward) -> Tensor:
        """Return what ``forward(module, batch)`` gave with the kept weights, in eval mode."""
        with torch.no_grad(), evaluating(module):
            return logits_with(self.weights, module, batch, forward)


def logits_with(
    weights: Mapping[str, Tensor], module: nn.Module, batch: Any, forward: Forward
) -> Tensor:
    """Return ``forward(module, batch)`` with these parameters and buffers in place of its own."""
    named = {f"module.{name}": tensor for name, tensor in weights.items()}
    logits: Tensor = functional_call(_Bound(module, forward), named, (batch,))
    return logits


class _Bound(nn.Module):
    """``forward(module, batch)`` as a module of its own, so that functional_call can run it."""

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.module = module
        self.calls = (forward,)  # in a tuple, lest a forward that is a module be registered

    def forward(self, batch: Any) -> Tensor:
        return self.calls[0](self.module, batch)
