"""What arrives at a layer: which of its inputs are the same number for all data, and which number.

Nothing is assumed about activations, batch norm, pooling or flattening between the layers: the
model runs on several inputs and the numbers are read where they arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.removal import layers
from lightning_prune.removal.calls import copied
from lightning_prune.removal.running import Run

_SAME = 1e-12  # relative: a vectorised tanh differs from a scalar one in the last bit


@dataclass
class Arriving:
    """The range of each input of a layer.

    Args:
        low: Smallest number seen, shape (inputs,).
        high: Largest number seen, shape (inputs,).
    """

    low: Tensor
    high: Tensor

    @property
    def constant(self) -> Tensor:
        """Which inputs were the same for all samples at all positions, shape (inputs,)."""
        return (self.high - self.low) <= _SAME * self.value.abs().clamp(min=1e-3)

    @property
    def value(self) -> Tensor:
        """The number in the middle of each range, shape (inputs,)."""
        return torch.where(self.high == self.low, self.low, (self.high + self.low) / 2)


def observe(
    model: nn.Module, inputs: Sequence[Any], unlike: Sequence[Any], run: Run
) -> Mapping[int, Arriving]:
    """Run the model and return what arrived at each Linear and convolution, by the layer's id.

    Args:
        model: The model.
        inputs: Inputs like the example.
        unlike: Others, which copies of the model are run on.
        run: How it is run.
    """
    seen: dict[str, Arriving] = {}
    with torch.no_grad():
        for each in inputs:
            with _watching(model, seen):
                run(model, each)
        for each in unlike:
            twin = copied(model)
            with _watching(twin, seen):
                run(twin, each)
    return {id(model.get_submodule(name)): arriving for name, arriving in seen.items()}


@contextmanager
def _watching(model: nn.Module, seen: dict[str, Arriving]) -> Iterator[None]:
    names = {id(module): name for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor) or not args[0].numel():
            return
        x = args[0].detach()
        spatial = len(getattr(module, "kernel_size", ()))
        x = x.movedim(x.dim() - 1 - spatial, 0)
        x = x.reshape(len(x), -1)
        low, high = x.amin(1), x.amax(1)
        past = seen.get(names[id(module)])
        if past is not None:
            low, high = torch.minimum(low, past.low), torch.maximum(high, past.high)
        seen[names[id(module)]] = Arriving(low, high)

    kinds = (nn.Linear, *layers.CONVOLUTIONS, *layers.TRANSPOSED)
    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def has_border(module: nn.Module) -> bool:
    """Tell whether a constant input gives a layer other outputs at the border than inside."""
    if isinstance(module, layers.TRANSPOSED):
        return True
    if not isinstance(module, layers.CONVOLUTIONS) or module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding != "valid" and any(size > 1 for size in module.kernel_size)
    return any(int(size) > 0 for size in module.padding)


def fold(module: nn.Module, inputs: Tensor, values: Tensor) -> bool:
    """Move constant inputs into a layer's bias, which is created where there is none.

    Args:
        module: A Linear, or a convolution without zero padding.
        inputs: Which inputs, shape (constants,).
        values: Their constants, shape (constants,).

    Returns:
        Whether there is a bias now that there was not.
    """
    if not bool(values.any()):
        return False
    weight = layers.columns(module)
    constants = torch.zeros(len(weight)).to(weight)
    constants[inputs] = values.to(weight)
    groups = int(getattr(module, "groups", 1))
    outputs = layers.width(module, "outputs")
    added = torch.einsum(
        "giok,gi->go",
        weight.view(groups, len(weight) // groups, outputs // groups, -1),
        constants.view(groups, -1),
    ).reshape(-1)
    bias = module._parameters["bias"]
    if bias is not None:
        bias.data += added
        return False
    if not bool(added.any()):
        return False
    module.bias = nn.Parameter(added.clone())
    return True


def merge(module: nn.Module, away: Tensor, into: int, factors: Tensor) -> None:
    """Let one input stand for others that are multiples of it.

    With zero padding a constant channel is no constant at the border, but all constant channels
    have the same shape there: the sum of their contributions is that of one of them, with the sum
    of the weights.

    Args:
        module: A Linear or a convolution without groups.
        away: The inputs that it stands for, shape (away,).
        into: The input that stays.
        factors: Each of those inputs as a multiple of the one that stays, shape (away,).
    """
    weight = module._parameters["weight"]
    if weight is None:
        raise TypeError(f"Expected a layer with a weight, but got {module}.")
    axis = 0 if isinstance(module, layers.TRANSPOSED) else 1
    lines = weight.data.movedim(axis, 0)
    lines[into] += torch.tensordot(factors.to(lines), lines[away], dims=1)
