"""Two hundred combinations of optimizer, precision, accumulation, schedule and interruption.

Of each the same is asked: masked weights and momenta are exactly zero after every step, exactly as
many are masked as the schedule says, and the run resumed from a checkpoint written somewhere on the
way ends bit for bit like the one that was not interrupted.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Rewind, SaliencyPruningCallback, Selection
from tests.callbacks.pruning_cases import QUIET, TOTAL, WEIGHTS, Digits, digits

BATCHES, EPOCHS = 4, 4

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov, foreach": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, foreach=True
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.002, momentum=0.5, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2, history_size=2),
}


@dataclass(frozen=True)
class Combination:
    optimizer: str
    precision: Any
    accumulate: int
    clip: float | None
    schedule: dict[int, float]
    criterion: str
    granularity: str
    rewind: str | None
    save_at: int
    """The batch, counted through, after which the checkpoint is written; an epoch's last: at its
    end."""


@st.composite
def combinations(draw: Any) -> Combination:
    optimizer = draw(st.sampled_from(list(OPTIMIZERS)))
    epochs = sorted(draw(st.sets(st.integers(0, EPOCHS - 1), min_size=1, max_size=3)))
    granularity = draw(st.sampled_from(["weight", "weight", "weight", "2:4"]))
    most = 0.5 if granularity == "2:4" else 0.97
    shares = sorted(draw(st.floats(0.0, most)) for _ in epochs)
    accumulate = draw(st.sampled_from([1, 2, 3]))
    # Half-way through an accumulation Lightning's checkpoints lose the gradients.
    ends = [b for b in range(1, BATCHES + 1) if b == BATCHES or b % accumulate == 0]
    return Combination(
        optimizer,
        # Under "64-true" Lightning itself loads the weights in float32 on resuming.
        draw(st.sampled_from(["32-true", "bf16-mixed"])),
        accumulate,
        # The fused optimizer clips by itself, LBFGS finds its own gradients.
        None if optimizer in ("lbfgs", "adam, fused") else draw(st.sampled_from([None, 0.05])),
        dict(zip(epochs, shares, strict=True)),
        draw(st.sampled_from(["taylor", "saliency", "magnitude", "random"])),
        granularity,
        draw(st.sampled_from([None, None, "weights", "learning_rate"])),
        draw(st.integers(0, EPOCHS - 1)) * BATCHES + draw(st.sampled_from(ends)),
    )


class Batches:
    """A loader that goes on where it was, as its state says."""

    def __init__(self) -> None:
        x, y = digits()
        size = 24
        self.batches = [(x[i : i + size], y[i : i + size]) for i in range(0, size * BATCHES, size)]
        self.start = self.at = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for i in range(start, BATCHES):
            self.at = i + 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at % BATCHES}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


class Watch(L.Callback):
    """Check every step; write one checkpoint."""

    def __init__(self, pruner: SaliencyPruningCallback, save_at: int | None, file: Any) -> None:
        self.pruner, self.save_at, self.file = pruner, save_at, file
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.batches += 1
        for name, mask in self.pruner.masks.items():
            parameter = pl_module.get_parameter(name)
            assert not parameter.detach()[~mask].any()
            for optimizer in trainer.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                        assert not value[~mask].any(), (name, key)
        if self.batches == self.save_at and self.batches % BATCHES:
            trainer.save_checkpoint(self.file)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.batches == self.save_at and self.batches % BATCHES == 0:
            trainer.save_checkpoint(self.file)


def run(c: Combination, *, save: Any = None, resume: Any = None) -> tuple[Any, Digits]:
    pruner = SaliencyPruningCallback(
        c.schedule,
        criterion=c.criterion,
        selection=Selection(c.granularity),
        rewind=None if c.rewind is None else Rewind(c.rewind, epoch=0),  # type: ignore[arg-type]
    )
    watch = Watch(pruner, None if save is None else c.save_at, save)
    torch.manual_seed(1)
    model = Digits(OPTIMIZERS[c.optimizer])
    x, y = digits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers, loaders, LBFGS under mixed precision
        L.Trainer(
            max_epochs=EPOCHS,
            precision=c.precision,
            accumulate_grad_batches=c.accumulate,
            gradient_clip_val=c.clip,
            callbacks=[pruner, watch],
            num_sanity_val_steps=0,
            **QUIET,
        ).fit(model, Batches(), DataLoader(TensorDataset(x[-40:], y[-40:]), 40), ckpt_path=resume)
    return pruner, model


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(combinations())
def test_any_combination_holds_its_masks_and_survives_an_interruption(c: Combination) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "saved.ckpt"
        whole, model = run(c, save=file)
        resumed, again = run(c, resume=file)
    last = c.schedule[max(c.schedule)]
    if c.granularity == "weight":
        assert sum(int((~m).sum()) for m in whole.masks.values()) == round(last * TOTAL)
    assert whole.sparsity <= last + 0.5 / TOTAL
    for name, mask in whole.masks.items():
        assert mask.any()
        assert not model.get_parameter(name).detach()[~mask].any()
    assert [(r["epoch"], r["kept"]) for r in resumed.history] == [
        (r["epoch"], r["kept"]) for r in whole.history
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name in WEIGHTS:
        assert torch.equal(whole.masks[name], resumed.masks[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
