"""A model whose inputs and outputs are nodes of their own in autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.removal.running import Run


class Entrance(nn.Module):
    """An input, as a node of the graph: a concatenation has to know how wide it is."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.channels = int(example.shape[-1 if example.dim() == 3 else min(1, example.dim() - 1)])

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` as the output of a node."""
        return x.detach().requires_grad_() * 1.0


class EntrancePruner:
    """What torch-pruning asks about an :class:`Entrance`, which is never cut."""

    pruning_dim = 1

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Return the layer as it is."""
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        """Return the width of the input."""
        return int(layer.channels)

    get_in_channels = get_out_channels


class Opened(nn.Module):
    """A model whose inputs are nodes, and whose outputs are nodes that no layer owns."""

    def __init__(self, model: nn.Module, inputs: Any, run: Run) -> None:
        super().__init__()
        self.model = model
        self.run = run
        self.outputs: list[Tensor] = []
        leaves = pytree.tree_leaves(inputs)
        self.entrances = nn.ModuleList(Entrance(x) for x in leaves if _differentiable(x))

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Leave out modules that compare otherwise than by identity.

        A metric of torchmetrics makes another metric of ``==``, which counts as true: torch-pruning
        would then find every layer in its list of ignored ones.
        """
        for name, module in super().named_modules(*args, **kwargs):
            comparison: object = type(module).__eq__
            if comparison is object.__eq__:
                yield name, module

    def forward(self, inputs: Any) -> list[Tensor]:
        """Return the tensors in the model's output that gradients reach."""
        entrances = iter(self.entrances)
        opened = pytree.tree_map(lambda x: next(entrances)(x) if _differentiable(x) else x, inputs)
        found = self.run(self.model, opened)
        self.outputs = [each * 1.0 for each in found if each.grad_fn is not None]
        return self.outputs


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0
