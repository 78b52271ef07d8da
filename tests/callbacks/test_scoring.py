"""The scoring pass makes use of what the validation step has computed, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.callbacks.scoring import ScoringOptions, ScoringPass
from lightning_prune.saliency import SaliencyAccumulator, squared_gradients
from tests import reference


class Counting(nn.Sequential):
    """Counts the samples it runs on; costly enough for rows to be chosen from logits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Flatten()]
        super().__init__(*layers, nn.Linear(64 * 16, 10))
        with torch.no_grad():
            self[5].weight.mul_(20.0)  # sure of itself: most samples carry nothing
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x)


def autocast(model: Counting, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


STEPS: dict[str, tuple[Callable[[Counting, Tensor], Any], bool]] = {
    "calls the model once": (lambda model, x: model(x), True),
    "calls it twice": (lambda model, x: (model(x), model(x.flip(-1))), False),
    "calls a part of it": (lambda model, x: nn.Sequential(*model)(x), False),
    "in half precision": (autocast, False),
}


@pytest.mark.parametrize("step", STEPS)
def test_logits_of_the_step_are_used_where_they_can_be(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    update = SaliencyAccumulator.update
    monkeypatch.setattr(
        SaliencyAccumulator,
        "update",
        lambda self, batch, logits=None: (
            given.append(logits is not None),
            update(self, batch, logits),
        ),
    )
    model, x = Counting().eval(), torch.randn(64, 1, 8, 8)
    names = [name for name, _ in model.named_parameters()]
    scoring = ScoringPass(model, names, ScoringOptions(tolerance=1e-3))
    run, reused = STEPS[step]
    for part in x.split(32):
        with torch.no_grad():
            run(model, part)
        scoring.add(part)
    scoring.close()
    assert given == [reused, reused]
    assert not model._forward_hooks
    monkeypatch.undo()
    expected = squared_gradients(model, x.split(32), tolerance=1e-3)
    assert reference.largest_error(scoring._accumulator.compute(), expected) < 1e-5


def test_a_forward_pass_is_saved() -> None:
    model, x = Counting().eval(), torch.randn(64, 1, 8, 8)
    seen = {}
    for reuse in (True, False):
        options = ScoringOptions(forward=None if reuse else lambda module, batch: module(batch))
        scoring = ScoringPass(model, ["0.weight"], options)
        with torch.no_grad():
            model(x)
        model.seen = 0
        scoring.add(x)
        scoring.close()
        seen[reuse] = model.seen
    assert seen[False] - seen[True] == 64
