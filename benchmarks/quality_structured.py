"""The structured arms of the quality benchmark: whole units and channels, beside torch-pruning.

Every arm removes the same number of units of each hidden layer at the same events, and differs in
which ones it takes. Ours are masked, with all that would make them speak: a row's bias, and the
scale and shift of a batch norm behind it. torch-pruning's are cut out. Units of the output layer
stay.

torch-pruning (Fang et al., 2023, DepGraph: Towards Any Structural Pruning) is imported where it is
used; nothing else here needs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality_arms import EPOCHS, EVENTS, Arm, Descent, event_share, learning_rate
from benchmarks.quality_networks import Batches, train_part
from lightning_prune._types import Masks
from lightning_prune.masking import MaskKeeper
from lightning_prune.selection import Selection

FAMILY = "structured"
NETWORKS = ("LeNet-300-100", "LeNet-5", "digits-8x8-convnet")
SHARES = (0.5, 0.7)
CRITERIA = {"unit-taylor": "taylor", "unit-magnitude": "magnitude-global"}
IMPORTANCES = {
    "torch-pruning-taylor": "TaylorImportance",
    "torch-pruning-magnitude": "MagnitudeImportance",
}
ARMS = (*CRITERIA, *IMPORTANCES)


@dataclass(frozen=True)
class Layer:
    """The parameters that have an entry for each unit of a layer, by name."""

    weight: str
    others: tuple[str, ...]


def layers(net: nn.Module) -> list[Layer]:
    """Return the layers of a chain, in the order of the data, the output layer as the last.

    Example:
        >>> convolution = nn.Conv2d(1, 2, 3, bias=False)
        >>> net = nn.Sequential(convolution, nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
        >>> [(layer.weight, layer.others) for layer in layers(net)]
        [('0.weight', ('1.weight', '1.bias')), ('3.weight', ('3.bias',))]
    """
    found: list[Layer] = []
    for name, module in net.named_modules():
        own = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        if isinstance(module, nn.Conv2d | nn.Linear):
            found.append(Layer(own[0], tuple(own[1:])))
        elif isinstance(module, nn.BatchNorm2d):
            found[-1] = Layer(found[-1].weight, (*found[-1].others, *own))
        elif own:
            raise TypeError(
                f"Expected convolutions, linear layers and batch norms, but got {name!r}, a "
                f"{type(module).__name__} with parameters of its own."
            )
    return found


def width_left(width: int, share: float) -> int:
    """Return how many units of a layer are left: torch-pruning's rounding, for all arms.

    Example:
        >>> width_left(300, 0.7), width_left(16, 0.7), width_left(1, 0.7)
        (90, 4, 1)
    """
    return max(1, int(width * (1 - share)))


def widths(net: nn.Module) -> list[int]:
    """Return how many units of each layer have a weight that is not zero."""
    weights = (net.get_parameter(layer.weight).detach() for layer in layers(net))
    return [int(weight.flatten(1).any(1).sum()) for weight in weights]


def facts(net: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """Return the share of hidden units that are gone, and the parameters left once they are cut."""
    before, after = widths(dense), widths(net)
    count, kept_inputs = 0, 1.0
    for layer, full, left in zip(layers(dense), before, after, strict=True):
        weight = dense.get_parameter(layer.weight)
        inputs = round(kept_inputs * weight.shape[1])
        count += left * (inputs * weight[0, 0].numel() + len(layer.others))
        kept_inputs = left / full
    return {"reached": 1 - sum(after[:-1]) / sum(before[:-1]), "parameters": count}


class Remover(Protocol):
    """What holds a network in training: one call is one pruning event."""

    optimizer: torch.optim.Optimizer

    def __call__(self, share: float) -> None:
        """Remove units until ``share`` of each hidden layer's are gone."""


class Masked:
    """Our arms: units ranked by the sum of their incoming weights' scores, and masked.

    Args:
        net: The network, changed in place.
        name: The subject.
        arm: One of :data:`CRITERIA`.
        optimizer: Makes the optimizer of some parameters.
    """

    def __init__(
        self, net: nn.Module, name: str, arm: str, optimizer: Callable[..., torch.optim.Optimizer]
    ) -> None:
        self.net, self.hidden = net, layers(net)[:-1]
        self.descent = Descent(net, name, Arm(CRITERIA[arm]), seed=0)
        self.selection = Selection("unit", scope="layer")
        self.masks: Masks = {
            layer.weight: torch.ones_like(net.get_parameter(layer.weight), dtype=torch.bool)
            for layer in self.hidden
        }
        self.optimizer = optimizer(net.parameters())
        self.keeper = MaskKeeper().attach(dict(net.named_parameters()), [self.optimizer])

    def __call__(self, share: float) -> None:
        """Remove units until ``share`` of each hidden layer's are gone."""
        self.net.eval()
        scores = self.descent.scores()
        self.net.train()
        masks: Masks = {}
        for layer in self.hidden:
            score, mask = scores[layer.weight], self.masks[layer.weight]
            # One layer at a time: what rounding gives to which layer is the same for all arms.
            target = 1 - width_left(len(score), share) / len(score)
            masks |= self.selection({layer.weight: score}, target, masks={layer.weight: mask}).masks
        self.masks = masks
        self.keeper.update({**masks, **self._silent(masks)})

    def _silent(self, masks: Masks) -> Masks:
        # Without these a unit that is gone would go on as a constant, and learn.
        kept = {layer: masks[layer.weight].flatten(1).any(1) for layer in self.hidden}
        return {name: units for layer, units in kept.items() for name in layer.others}


class Cut:
    """torch-pruning's arms: as its README has it, with this benchmark's rate and data.

    Importances are left at their defaults. Taylor's reads the gradient of the mean cross entropy
    over the training digits, in eval mode. Events replace parameters, so the optimizer starts anew.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        arm: str,
        optimizer: Callable[..., torch.optim.Optimizer],
        target: float,
    ) -> None:
        import torch_pruning as tp  # noqa: PLC0415  (an extra)

        self.net, self.arm, self.make = net, arm, optimizer
        self.x, self.y = train_part(name)
        self.optimizer = optimizer(net.parameters())
        owner = layers(net)[-1].weight.rpartition(".")[0]
        net.eval()
        self.pruner = tp.pruner.MetaPruner(
            net,
            self.x[:1],
            importance=getattr(tp.importance, IMPORTANCES[arm])(),
            pruning_ratio=target,
            iterative_steps=EVENTS,
            iterative_pruning_ratio_scheduler=_rate,
            ignored_layers=[net.get_submodule(owner)],
        )
        net.train()

    def __call__(self, share: float) -> None:
        """Cut the next units out; the pruner counts its steps itself."""
        self.net.eval()
        if self.arm == "torch-pruning-taylor":
            self.net.zero_grad()
            for x, y in zip(self.x.split(600), self.y.split(600), strict=True):
                (F.cross_entropy(self.net(x), y, reduction="sum") / len(self.x)).backward()
        self.pruner.step()
        self.net.train()
        self.optimizer = self.make(self.net.parameters())


def _rate(target: float, steps: int) -> list[float]:
    return [0.0, *(event_share(event, target, steps) for event in range(steps))]


def structured(
    dense: nn.Module, name: str, arm: str, *, target: float, lr: float, seed: int
) -> nn.Module:
    """Return a copy of ``dense`` that lost units after each of the first 8 of 12 epochs."""
    net = copy.deepcopy(dense).train()
    batches = Batches(name, seed)
    steps, step = EPOCHS * len(batches), 0

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr, fused=True)

    remover: Remover = (
        Masked(net, name, arm, adam) if arm in CRITERIA else Cut(net, name, arm, adam, target)
    )
    for epoch in range(EPOCHS):
        if 1 <= epoch <= EVENTS:
            remover(event_share(epoch - 1, target))
        for x, y in batches:
            for group in remover.optimizer.param_groups:
                group["lr"] = lr * learning_rate(step, steps)
            _train(net, remover.optimizer, x, y)
            step += 1
    return net


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
