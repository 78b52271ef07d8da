"""The arms of the generative benchmark: few real digits, and what is put beside them.

All arms of a draw start from the same dense network, which is also the teacher, and see the same
real batches in the same order. What differs is the second input: none, more real digits, copies of
them, or samples of a VAE that has seen these digits only.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import quality_networks as subjects
from benchmarks.generative_calibration import (
    NOISE,
    SETTINGS,
    SPLIT,
    Copies,
    moved,
    trained_vae,
)
from benchmarks.quality_arms import EPOCHS, EVENTS, event_share, learning_rate
from lightning_prune._types import Masks
from lightning_prune.augment.adaptive import START, Losses, MixRule, gap_share, losses_of
from lightning_prune.augment.drawing import Drawing, Place, Select
from lightning_prune.augment.fitting import GeneratorFitter
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm, Distillation
from lightning_prune.augment.vae import DenseVAE
from lightning_prune.masking import MaskKeeper, find_prunable
from lightning_prune.passes.teacher import Teacher
from lightning_prune.saliency import squared_gradients
from lightning_prune.selection import CRITERIA, Selection

NETWORK = "784-128-10"
EPOCH = 57  # steps, as of the 3,600 digits: the same training whatever the number of digits
DENSE_EPOCHS = 20
COMPARED = 256  # training digits that the adaptive mix compares with the held-out ones, at most

# Chosen by arm "train" with 200 digits at 98 %, see the outcome beside generative.GRID.
DISTILLATION = Distillation(weight=0.9, temperature=1.0)

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Arm:
    """What an arm does with the second input.

    Attributes:
        second: Where it comes from; None for an arm without one.
        score: It joins the scoring, one for each real digit.
        train: It joins the training, a batch for each real one: as a distillation term, or behind
            the batch, labelled by the teacher.
        select: How samples of the VAE are drawn.
        adaptive: The term's factor follows the gap between training and held-out loss.
        passes: Steps, in units of the others' number.
        spends: In an epoch without the term the batches that it would have taken are real ones,
            with steps of their own, so that the run sees as many batches as all arms with two.
    """

    second: Literal["real", "noise", "shifts", "vae"] | None = None
    score: bool = False
    train: Literal["term", "batch"] | None = None
    select: Select = "prior"
    adaptive: bool = False
    passes: int = 1
    spends: bool = False


ARMS = {
    "real-equal": Arm(passes=2),
    "train": Arm("vae", train="term"),
    "both": Arm("vae", score=True, train="term"),
    "adaptive": Arm("vae", score=True, train="term", adaptive=True),
    "adaptive-equal": Arm("vae", score=True, train="term", adaptive=True, spends=True),
    "real": Arm(),
    "score": Arm("vae", score=True),
    "shifts": Arm("shifts", train="term"),
    "real-distill": Arm("real", train="term"),
    "noise": Arm("noise", train="term"),
    "train-batch": Arm("vae", train="batch"),
    "selected": Arm("vae", score=True, train="term", select="starved"),
}
"""In the order of the runs."""


@dataclass(frozen=True)
class Few:
    """The real digits of a draw.

    Attributes:
        train: Nine tenths of them: what is scored, fitted to, and shown to the VAE.
        held_out: The others. The adaptive mix reads them, and nothing else.
    """

    train: Data
    held_out: Data

    @classmethod
    def of(cls, n: int, seed: int) -> Few:
        """Draw ``n`` digits; the fewer are among the more. 4,000 are all but the test part."""
        x, y = subjects.train_part(NETWORK, SPLIT)
        if n > len(x):
            more = subjects.validation_part(NETWORK, SPLIT)
            x, y = torch.cat([x, more[0]]), torch.cat([y, more[1]])
        if n > len(x):
            raise ValueError(f"Expected at most {len(x)} digits, but got n = {n}.")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
        held_out, train = order.split([max(10, n // 10), n - max(10, n // 10)])
        return cls((x[train], y[train]), (x[held_out], y[held_out]))


def endless(data: Data, seed: int) -> Iterator[Data]:
    """Yield batches without end: the digits in a new order each time they have all been seen."""
    random = torch.Generator().manual_seed(seed)
    rest = torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < subjects.BATCH:
            rest = torch.cat([rest, torch.randperm(len(data[0]), generator=random)])
        index, rest = rest[: subjects.BATCH], rest[subjects.BATCH :]
        yield data[0][index], data[1][index]


def dense(regime: str, few: Few, n: int, seed: int, cache: Path) -> nn.Module:
    """Return the dense network: of all 3,600 digits, or from scratch on the few."""
    if regime == "pretrained":
        return subjects.dense(NETWORK, seed, cache, SPLIT)
    torch.manual_seed(seed)
    net = subjects.SUBJECTS[NETWORK].build()

    def fit() -> dict[str, Any]:
        optimizer = subjects.ADAM(net.parameters())
        steps = DENSE_EPOCHS * EPOCH
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _, (x, y) in zip(range(steps), endless(few.train, seed), strict=False):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            decay.step()
        return net.state_dict()

    net.load_state_dict(_cached(cache / f"{NETWORK}-scratch-{n}-{seed}.pt", fit))
    return net.eval()


def fitted_vae(few: Few, n: int, seed: int, cache: Path) -> tuple[DenseVAE, float]:
    """Return the VAE of a draw and the CPU seconds that its training took, once."""
    file = cache / f"generative-vae-{n}-{seed}.pt"

    def fit() -> dict[str, Any]:
        start = time.process_time()
        made = trained_vae(few.train[0], seed, SETTINGS)
        return {"vae": made.state_dict(), "seconds": time.process_time() - start}

    kept = _cached(file, fit)
    vae = DenseVAE((1, 28, 28))
    vae.load_state_dict(kept["vae"])
    return vae.eval().requires_grad_(False), kept["seconds"]


def _cached(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")  # renamed when complete: another may be reading
        torch.save(make(), part)
        part.rename(file)
    kept: dict[str, Any] = torch.load(file, weights_only=True)
    return kept


def _first(module: nn.Module, batch: Any) -> Tensor:
    logits: Tensor = module(batch[0])
    return logits


class Second:
    """Where the second inputs of a run come from.

    Args:
        arm: The arm.
        few: The real digits.
        vae: The VAE that has seen them; None for an arm without one.
        seed: Of what is drawn.
        injection: How inputs reach the network.
    """

    def __init__(
        self, arm: Arm, few: Few, vae: nn.Module | None, seed: int, injection: Injection
    ) -> None:
        x, y = few.train
        self.arm, self.injection, self.form = arm, injection, BatchForm((x, y), x, y)
        random = torch.Generator().manual_seed(seed + 1)
        if arm.second == "real":
            batches = endless(few.train, seed + 1)
            self.take = lambda n: torch.cat([next(batches)[0] for _ in range(-(-n // 64))])[:n]
        elif arm.second == "noise":
            noise = lambda p: p + NOISE * torch.randn(p.shape, generator=random)  # noqa: E731
            self.take = Copies(x, seed + 2, noise).sample
        elif arm.second == "shifts":
            self.take = Copies(x, seed + 2, lambda p: moved(p, 1, random)).sample
        elif arm.second == "vae" and vae is not None:
            self.fitter = GeneratorFitter(
                vae, x.shape[1:], x.dtype, x.device, learning_rate=1e-3, seed=seed
            )

    def inputs(self, net: nn.Module, n: int, purpose: str) -> Tensor:
        """Return n inputs (n, 1, 28, 28); ``net`` is asked which samples it is starved of."""
        if self.arm.second != "vae":
            return self.take(n)
        return Drawing(self.arm.select)(
            self.fitter,
            n,
            Place(purpose),
            module=net,
            injection=self.injection,
            form=self.form,
        ).inputs

    def batches(self, net: nn.Module, steps: int) -> Iterator[Tensor | None]:
        """Yield the training's second inputs, a batch a step, drawn together for an epoch."""
        if self.arm.train is None:
            yield from [None] * steps
        else:
            yield from self.inputs(net, steps * subjects.BATCH, "train").split(subjects.BATCH)


def masks_of(net: nn.Module, batches: list[Data], target: float, masks: Masks) -> Masks:
    """Return the next masks: the smallest w^2 R of all layers go."""
    net.eval()
    names = list(masks)
    squares = squared_gradients(net, batches, tolerance=1e-3, parameters=names)
    weights = {name: net.get_parameter(name).detach() for name in names}
    net.train()
    return Selection(scope="global")(
        CRITERIA["taylor"][0](squares, weights), target, masks=masks
    ).masks


def scored(net: nn.Module, second: Second, injection: Injection) -> list[Data]:
    """Return what a scoring pass sees: the real digits and, if they join it, as many others."""
    x, y = second.form.batch
    batches: list[Data] = list(zip(x.split(600), y.split(600), strict=True))
    if second.arm.score:
        inputs = second.inputs(net, len(x), "score")
        batches += [injection.labelled(net, second.form, part) for part in inputs.split(600)]
    return batches


class Mix:
    """The factor of the training term: 1, or what the adaptive mix makes of the two losses.

    As in the callback it starts small, until the first comparison at the end of the first epoch.
    """

    def __init__(self, few: Few, *, adaptive: bool) -> None:
        self.few, self.adaptive, self.rule = few, adaptive, MixRule()
        self.factor, self.used = 1.0, START if adaptive else 1.0

    @torch.no_grad()
    def end_epoch(self, net: nn.Module) -> None:
        """Compare the losses on training and held-out digits, and move the factor."""
        if not self.adaptive:
            return
        net.eval()
        found = [
            Losses.of(losses_of(net(x[:COMPARED]), y[:COMPARED], "categorical"))
            for x, y in (self.few.train, self.few.held_out)
        ]
        net.train()
        if (gap := gap_share(*found)) is not None:
            self.factor = self.rule(self.factor, *gap)
        self.used = self.factor


def fine_tuned(
    network: nn.Module,
    arm: Arm,
    few: Few,
    vae: nn.Module | None,
    *,
    target: float,
    lr: float,
    seed: int,
    distillation: Distillation = DISTILLATION,
) -> tuple[nn.Module, float]:
    """Return a copy of a dense network, pruned at the start of 8 of 12 epochs, and its last mix."""
    net = copy.deepcopy(network).train()
    teacher, injection = Teacher.of(network), Injection(_first, distillation=distillation)
    second, mix = Second(arm, few, vae, seed, injection), Mix(few, adaptive=arm.adaptive)
    names = list(find_prunable(net).parameters)
    masks: Masks = {n: torch.ones_like(net.get_parameter(n), dtype=torch.bool) for n in names}
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    done = 0.0  # epochs, as their lengths may differ
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: learning_rate(done, EPOCHS))
    real, keeper = endless(few.train, seed), MaskKeeper()
    with keeper.attach(dict(net.named_parameters()), [optimizer]):
        for epoch in range(EPOCHS):
            if epoch < EVENTS:
                share = event_share(epoch, target)
                masks = masks_of(net, scored(net, second, injection), share, masks)
                keeper.update(masks)
            alone = arm.spends and not mix.used
            steps = EPOCH * (2 if alone else arm.passes)
            # The iterator of few first: zip takes nothing from the endless one at the end.
            extras = iter([None] * steps) if alone else second.batches(net, steps)
            for extra, batch in zip(extras, real, strict=False):
                _step(net, optimizer, batch, extra, arm, injection, teacher, mix.used)
                done += 1 / steps
                decay.step()
            mix.end_epoch(net)
    return net, mix.used if arm.train else math.nan


def _step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Data,
    extra: Tensor | None,
    arm: Arm,
    injection: Injection,
    teacher: Teacher,
    mix: float,
) -> None:
    if extra is not None and arm.train == "batch":
        batch = injection.joined(net, BatchForm(batch, *batch), extra, None, teacher)
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    if extra is not None and arm.train == "term" and mix:
        parameters = list(net.parameters())
        _, gradients = injection.gradients(net, parameters, (extra,), teacher, scale=mix)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad += gradient
    optimizer.step()
