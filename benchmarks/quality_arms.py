"""The arms of the quality benchmark: what ranks the weights, what corrects the survivors, how.

An arm is named by its parts: a criterion, then any of ``+layers`` (least squares, layer by layer),
``+outputs`` (Gauss-Newton against the network's output), ``+shifts`` (scored by and fitted to three
copies more of each training digit, moved by up to a pixel), ``+first`` (all pruning before the
fine-tuning, as without retraining, instead of in its course) and ``+distill`` (half of the
fine-tuning's loss is the distance from the dense network).
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality_networks import Batches, fingerprint, moved, train_part
from lightning_prune._types import Masks, Scores
from lightning_prune.masking import MaskKeeper, find_prunable
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit.calibration import Calibration, hold_out
from lightning_prune.refit.gauss_newton import refit_outputs
from lightning_prune.refit.layerwise import refit_layers
from lightning_prune.refit.obs import obs_prices
from lightning_prune.saliency import squared_gradients
from lightning_prune.selection import CRITERIA, Selection

TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
STAGES = 26
COPIES = 3
EPOCHS, EVENTS = 12, 8
TEMPERATURE = 1.0  # 2 and 4 were tried on 784-128-10 and lost a point more at 98 %

SQUARED_GRADIENTS = {
    "saliency": "probability",
    "taylor": "probability",
    "w2-fisher": "fisher",
    "w2-empirical-fisher": "empirical_fisher",
}
CRITERIA_NAMES = (
    "taylor", "magnitude-global", "magnitude-layer", "snip", "w2-fisher", "obs",
    "w2-empirical-fisher", "saliency", "random", "obc",
)  # fmt: skip

RECIPE_BY = {"recipe-obs": "obs", "recipe-taylor": "taylor", "recipe-fisher": "w2-fisher"}
"""The recipe by another ranking -> the plain loop that it is bit for bit without batch norm."""


@dataclass(frozen=True)
class Arm:
    """One way to prune."""

    criterion: str
    layers: bool = False
    outputs: bool = False
    shifts: bool = False
    first: bool = False
    distill: bool = False

    @classmethod
    def named(cls, name: str) -> Arm:
        """Return the arm of a name such as ``"obs+layers+distill"``."""
        criterion, *parts = name.split("+")
        unknown = set(parts) - {"layers", "outputs", "shifts", "first", "distill"}
        if criterion not in CRITERIA_NAMES or unknown:
            raise ValueError(
                f"Expected an arm made of one of {CRITERIA_NAMES} and any of +layers, +outputs, "
                f"+shifts, +first, +distill, but got {name!r}."
            )
        return cls(criterion, **dict.fromkeys(parts, True))


class Descent:
    """A network on its way down from its dense self: one call is one pruning event.

    Args:
        net: The network, changed in place.
        name: The subject, whose training digits are scored and fitted to.
        arm: What ranks and what corrects.
        seed: For the random ranking.
        trained: The network is trained between events, so a refit keeps it close to what it is just
            before each, as the callback does, and not to what it was at first.
    """

    def __init__(
        self, net: nn.Module, name: str, arm: Arm, seed: int, *, trained: bool = False
    ) -> None:
        self.net, self.arm, self.seed, self.trained = net, arm, seed, trained
        x, y = train_part(name)
        self.labelled = list(zip(x.split(600), y.split(600), strict=True))
        self.names = list(find_prunable(net).parameters)
        self.masks: Masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self._weights()}
        self.selection = Selection(
            scope="layer" if arm.criterion == "magnitude-layer" else "global"
        )
        # The calibration of a refit reads no labels.
        fit, held_out = hold_out([x for x, _ in self.labelled])
        copies: list[tuple[Tensor, Tensor]] = []
        if arm.shifts:  # of what is fitted to; what is held out is seen in no form
            random = torch.Generator().manual_seed(seed)
            labels, _ = hold_out([y for _, y in self.labelled])
            for _ in range(COPIES):
                copies += [(moved(a, 1, random), b) for a, b in zip(fit, labels, strict=True)]
        self.scored = [*self.labelled, *copies]
        self.calibration = Calibration(
            Teacher.of(net), fit, held_out, generated=[x for x, _ in copies]
        )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.net.named_parameters())
        return ((name, parameters[name].detach()) for name in self.names)

    def __call__(self, share: float) -> Masks:
        """Remove weights until ``share`` of them are gone, correct the others; return the masks."""
        training = self.net.training
        self.net.eval()
        if self.trained:
            self.calibration = replace(self.calibration, dense=Teacher.of(self.net))
        self.masks = self.selection(self.scores(), share, masks=self.masks).masks
        with torch.no_grad():
            for name, weight in self._weights():
                weight.mul_(self.masks[name])
        if self.arm.layers:
            refit_layers(self.net, self.masks, self.calibration)
        if self.arm.outputs:
            refit_outputs(self.net, self.masks, self.calibration)
        self.net.train(training)
        return self.masks

    def scores(self) -> Scores:
        """Return the arm's score of every weight as the network is now."""
        criterion, weights = self.arm.criterion, dict(self._weights())
        if criterion == "random":
            return CRITERIA["random"][0]({}, weights, seed=self.seed)
        if criterion.startswith("magnitude"):
            return {name: weight.abs() for name, weight in weights.items()}
        if criterion == "snip":
            return {name: (weights[name] * g).abs() for name, g in self._loss_gradient().items()}
        if criterion in ("obs", "obc"):
            inputs, one_by_one = [x for x, _ in self.scored], criterion == "obc"
            return obs_prices(self.net, self.masks, self.names, inputs, one_by_one=one_by_one)
        squares = squared_gradients(
            self.net,
            self.scored,
            target=SQUARED_GRADIENTS[criterion],
            tolerance=1e-3,
            parameters=self.names,
        )
        return squares if criterion == "saliency" else CRITERIA["taylor"][0](squares, weights)

    def _loss_gradient(self) -> dict[str, Tensor]:
        parameters = dict(self.net.named_parameters())
        total = {name: torch.zeros_like(parameters[name]) for name in self.names}
        for x, y in self.scored:
            loss = F.cross_entropy(self.net(x), y, reduction="sum")
            grads = torch.autograd.grad(loss, [parameters[name] for name in self.names])
            for name, g in zip(self.names, grads, strict=True):
                total[name] += g
        return total


def stages() -> list[float]:
    """Return the shares of one path at a constant rate to 99.5 %, with all targets on it."""
    last = 1 - TARGETS[-1]
    return sorted({*(1 - last ** (k / STAGES) for k in range(1, STAGES)), *TARGETS})


def without_retraining(
    dense: nn.Module, name: str, arm: Arm, seed: int, last: float = TARGETS[-1]
) -> Iterator[tuple[float, nn.Module, float]]:
    """Yield (target, network, CPU seconds until there) along one path down to ``last``."""
    net = copy.deepcopy(dense)
    seconds, start = 0.0, time.process_time()
    descent = Descent(net, name, arm, seed)
    for share in (share for share in stages() if share <= last):
        descent(share)
        if share in TARGETS:
            seconds += time.process_time() - start
            yield share, net, seconds
            start = time.process_time()


def learning_rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: 1, and a cosine to 0 in the last third.

    Example:
        >>> [round(learning_rate(step, 12), 2) for step in (0, 8, 10, 12)]
        [1.0, 1.0, 0.5, 0.0]
    """
    progress = max(0.0, step / steps - 2 / 3) * 3
    return (1 + math.cos(math.pi * progress)) / 2


def event_share(event: int, target: float, events: int = EVENTS) -> float:
    """Return the share that is removed with an event, counted from 0, at a constant rate."""
    return target if event == events - 1 else 1 - (1 - target) ** ((event + 1) / events)


def fine_tuned(
    dense: nn.Module, name: str, arm: Arm, *, target: float, lr: float, seed: int
) -> nn.Module:
    """Return a copy of ``dense`` that was pruned after each of the first 8 of 12 epochs."""
    net = copy.deepcopy(dense).train()
    descent = Descent(net, name, arm, seed, trained=True)

    def prune(epoch: int) -> Masks | None:
        return descent(event_share(epoch - 1, target)) if 1 <= epoch <= EVENTS else None

    train(net, dense, name, prune, lr=lr, seed=seed, distill=arm.distill)
    return net


def trained_on(dense: nn.Module, name: str, *, lr: float, seed: int) -> nn.Module:
    """Return a copy of ``dense`` that had the same 12 epochs of training, and lost nothing."""
    net = copy.deepcopy(dense).train()
    train(net, dense, name, lambda epoch: None, lr=lr, seed=seed, distill=False)
    return net


def pruned_first(
    dense: nn.Module, name: str, arm: Arm, *, target: float, seed: int, cache: Path
) -> tuple[nn.Module, float]:
    """Return a copy of ``dense`` pruned without retraining, and the CPU seconds that it took.

    The way down leads through all targets and knows no learning rate: it is gone once and kept.
    """
    parts = ("layers", "outputs", "shifts")
    text = "+".join([arm.criterion, *(part for part in parts if getattr(arm, part))])
    start = f"{name}-{seed}-{fingerprint(dense)}-{text}"
    files = {share: cache / f"{start}-{share}.pt" for share in TARGETS}
    if not files[target].exists():
        for share, pruned, seconds in without_retraining(dense, name, arm, seed):
            part = files[share].with_suffix(f".{os.getpid()}")
            torch.save({"weights": pruned.state_dict(), "seconds": seconds}, part)
            part.rename(files[share])
    found = torch.load(files[target], weights_only=True)
    net = copy.deepcopy(dense)
    net.load_state_dict(found["weights"])
    return net, found["seconds"]


def fine_tuned_under_masks(
    net: nn.Module, dense: nn.Module, name: str, arm: Arm, *, lr: float, seed: int
) -> nn.Module:
    """Train a pruned network in place, what is zero stays zero, and return it."""
    masks = {n: p.detach() != 0 for n, p in find_prunable(net).parameters.items()}
    train(net.train(), dense, name, {0: masks}.get, lr=lr, seed=seed, distill=arm.distill)
    return net


def train(
    net: nn.Module,
    dense: nn.Module,
    name: str,
    masks: Callable[[int], Masks | None],
    *,
    lr: float,
    seed: int,
    distill: bool,
) -> None:
    """Train for 12 epochs, under the masks that ``masks(epoch)`` gives before an epoch."""
    keeper, batches = MaskKeeper(), Batches(name, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    steps = EPOCHS * len(batches)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, steps))
    with keeper.attach(dict(net.named_parameters()), [optimizer]):
        for epoch in range(EPOCHS):
            if (new := masks(epoch)) is not None:
                keeper.update(new)
            for x, y in batches:
                optimizer.zero_grad()
                _loss(net, dense, x, y, distill=distill).backward()
                optimizer.step()
                decay.step()


def _loss(net: nn.Module, dense: nn.Module, x: Tensor, y: Tensor, *, distill: bool) -> Tensor:
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    if not distill:
        return loss
    with torch.no_grad():
        answer = (dense(x) / TEMPERATURE).softmax(1)
    distance = F.kl_div((logits / TEMPERATURE).log_softmax(1), answer, reduction="batchmean")
    return 0.5 * loss + 0.5 * TEMPERATURE**2 * distance
