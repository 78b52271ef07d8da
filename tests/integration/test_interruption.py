"""A run that is killed between two steps and resumed ends, bit for bit, like one that was not.

This file is also the program that is killed: started as a script it forks one process for each run,
which trains on real digits, writes checkpoints, and kills itself where it is told to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_prune import RandomSigns, Rewind, SaliencyPruningCallback

STEPS, EPOCHS, BATCH = 5, 6, 64
EVENTS = {0: 0.3, 2: 0.6, 5: 0.8}
"""With a checkpoint each 3 steps, that of step 15 is written between epoch 2 and its validation."""

PRUNERS: dict[str, tuple[dict[int, float], dict[str, Any]]] = {
    "by the validation's scores": (EVENTS, {}),
    "by magnitude": (EVENTS, {"criterion": "magnitude"}),
    "by the scores of another loader": (EVENTS, {"scoring_loader": "scoring_loader"}),
    "by random signs": (EVENTS, {"signs": RandomSigns(draws=2)}),
    "rewound": ({2: 0.6, 5: 0.8}, {"rewind": Rewind(epoch=1)}),
}
"""Schedules, and arguments of the pruner."""


@dataclass(frozen=True)
class Case:
    """Where a run is killed, and which checkpoints it writes.

    Args:
        hook: The hook in which it is killed, or ``"never"``.
        step: The number of optimizer steps made by then.
        save: When ModelCheckpoint saves.
        inside: A hook of a validation's second batch in which a checkpoint is written, at ``step``.
        plain: Whether to look at what Lightning does without a pruner, too.
        interval: After how many training steps a validation comes.
        pruner: Which one.
    """

    hook: str
    step: int
    save: dict[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 3})
    inside: str | None = None
    plain: bool = False
    interval: int = STEPS
    pruner: str = "by the validation's scores"

    @property
    def uninterrupted(self) -> str:
        """The name of the run that it is to end like."""
        return f"never, validated each {self.interval} steps, {self.pruner}"


EACH_EPOCH = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
CASES = {
    "before the first event": Case("on_train_batch_start", 4),
    "within the validation of an event": Case("on_validation_batch_end", 15),
    "between validation and masks": Case("on_train_epoch_end", 15),
    "after the masks, resumed from before the validation": Case(
        "on_train_batch_start", 17, plain=True
    ),
    "between validation and masks, both in the checkpoint": Case(
        "on_train_batch_start", 15, EACH_EPOCH, plain=True
    ),
    "in the epoch after an event": Case("on_train_batch_start", 18, EACH_EPOCH),
    "in the middle of a later epoch": Case("on_train_batch_start", 23, plain=True),
    "before the last validation of an epoch": Case(
        "on_train_batch_start", 14, {"every_n_train_steps": 2}, plain=True, interval=2
    ),
    "within the last validation of an epoch": Case(
        "on_validation_end", 14, inside="on_validation_batch_end", interval=2
    ),
    "between two validations of an epoch": Case("on_train_batch_start", 13, interval=2),
    "after the last validation": Case("on_train_end", 30),
    **{
        f"between epoch and validation, {pruner}": Case("on_train_batch_start", 17, pruner=pruner)
        for pruner in ("by magnitude", "by the scores of another loader")
    },
    "where the weights to go back to are those of the next step": Case(
        "on_train_batch_start", 7, {"every_n_train_steps": 5}, pruner="rewound"
    ),
    **{
        f"resumed from within {hook}": Case("on_validation_end", 15, inside=hook, plain=True)
        for hook in ("on_validation_batch_start", "validation_step", "on_validation_batch_end")
    },
    "resumed from within a validation, by random signs": Case(
        "on_validation_end", 15, inside="validation_step", pruner="by random signs"
    ),
    "resumed from within the last validation": Case(
        "on_validation_end", 30, inside="validation_step"
    ),
}


# The program


class Shuffled(Sampler[int]):
    """An order of its own for each epoch, which Lightning tells it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(STEPS * BATCH, generator=generator).tolist())


class Resumable(DataLoader):
    """Goes on where a checkpoint was written within an epoch, by Lightning's state protocol."""

    done = 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.tensor(list(self.sampler))
        self.done %= STEPS
        while self.done < STEPS:
            self.done += 1
            yield self.dataset[order[(self.done - 1) * BATCH : self.done * BATCH]]

    def __len__(self) -> int:
        return STEPS

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Mlp(L.LightningModule):
    """64-24-10, Adam."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        self.within_step: Callable[..., None] = lambda *_: None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.within_step(self.trainer, batch_idx)

    def scoring_loader(self) -> list[Any]:
        return list(self.trainer.val_dataloaders)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def act(
    hook: str, action: Callable[[L.Trainer], None], condition: Callable[..., bool]
) -> L.Callback:
    """Return a callback that does something in one hook."""

    def run(trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        if not trainer.sanity_checking and condition(trainer, *rest):
            action(trainer)

    callback = L.Callback()
    setattr(callback, hook, run)
    return callback


def die(trainer: L.Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, case: Case, *, pruned: bool, resume: Path | None = None) -> None:
    """Train, from the start or from a checkpoint; write down how it ends, if it does."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = (x / 16).float()
    model = Mlp()
    events, arguments = PRUNERS[case.pruner]
    pruner = SaliencyPruningCallback(events if pruned else {}, **arguments)
    callbacks: list[L.Callback] = [
        pruner,
        ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **case.save),
    ]
    if resume is None and case.inside is not None:
        path = folder / "inside.ckpt"

        def second(trainer: L.Trainer, *rest: Any) -> bool:
            return trainer.global_step == case.step and rest[-1] == 1

        if case.inside == "validation_step":
            model.within_step = lambda trainer, i: (
                trainer.save_checkpoint(path) if second(trainer, i) else None
            )
        else:
            callbacks.append(
                act(case.inside, lambda trainer: trainer.save_checkpoint(path), second)
            )
    if resume is None and case.hook != "never":
        callbacks.append(act(case.hook, die, lambda trainer, *_: trainer.global_step == case.step))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        val_check_interval=case.interval,
        callbacks=callbacks,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    val = DataLoader(TensorDataset(x[-130:], y[-130:]), batch_size=40)
    trainer.fit(
        model,
        Resumable(TensorDataset(x[: STEPS * BATCH], y[: STEPS * BATCH]), sampler=Shuffled()),
        val,
        ckpt_path=resume,
        weights_only=True if resume else None,
    )
    end = {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "masks": pruner.masks,
        "history": [{k: v for k, v in r.items() if k != "seconds"} for r in pruner.history],
        "resumed from": None if resume is None else resume.name,
    }
    torch.save(end, folder / "end.pt")


def in_a_process(target: Callable[..., None], *args: Any, **kwargs: Any) -> int:
    """Run a function in a forked process and return how that ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        target(*args, **kwargs)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killed_and_resumed(folder: Path, case: Case, *, pruned: bool) -> None:
    folder.mkdir(parents=True)
    code = in_a_process(train, folder, case, pruned=pruned)
    if case.hook == "never":
        return
    if code != -signal.SIGKILL:
        raise RuntimeError(
            f"{folder.name}: expected the run to be killed, but it ended with {code}"
        )
    newest = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    in_a_process(train, folder, case, pruned=pruned, resume=newest)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, case in CASES.items():
        whole = replace(case, hook="never", inside=None)
        for run, kind in ((case.uninterrupted, whole), (name, case)):
            for pruned in (True, False) if kind.plain else (True,):
                path = folder / f"{run}, {'pruned' if pruned else 'plain'}"
                if not path.exists():
                    killed_and_resumed(path, kind, pruned=pruned)


# The tests


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Make all the runs, once, and return how the one of a name ended."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    def end_of(name: str) -> dict[str, Any]:
        path = folder / name / "end.pt"
        assert path.exists(), f"{name} has not ended:\n{done.stderr}"
        return torch.load(path, weights_only=True)

    return end_of


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Return the places where two nested results are not the same, bit for bit."""
    if isinstance(expected, Tensor):
        return [] if torch.equal(found, expected) else [where]
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return [d for k in expected for d in differences(found[k], expected[k], f"{where}/{k}")]
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        return [d for i, e in enumerate(expected) for d in differences(found[i], e, f"{where}/{i}")]
    return [] if found == expected else [f"{where}: {found!r} instead of {expected!r}"]


ENDS = ("weights", "optimizer", "masks", "history")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
def test_lightning_itself_resumes_bit_for_bit_with_these_loaders(runs, name: str) -> None:
    found, expected = runs(f"{name}, plain"), runs(f"{CASES[name].uninterrupted}, plain")
    assert found["resumed from"] is not None
    for what in ("weights", "optimizer"):
        assert differences(found[what], expected[what], what) == []


@pytest.mark.parametrize("name", CASES)
def test_a_killed_and_resumed_run_ends_like_the_uninterrupted_one(runs, name: str) -> None:
    found, expected = runs(f"{name}, pruned"), runs(f"{CASES[name].uninterrupted}, pruned")
    assert found["resumed from"] is not None
    assert [record["target"] for record in expected["history"]] == list(
        PRUNERS[CASES[name].pruner][0].values()
    )
    # Among other things: each of the 130 validation samples was scored once.
    for what in ENDS:
        assert differences(found[what], expected[what], what) == []


def resumed(folder: Path, events: dict[int, float], model: Mlp | None = None) -> Any:
    """Prune by one schedule for two epochs, and by another one for four more."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    data = TensorDataset((x / 16).float()[:320], y[:320])
    path = folder / "after-two-epochs.ckpt"
    for epochs, schedule, of in ((2, {0: 0.3}, Mlp()), (6, events, model or Mlp())):
        pruner = SaliencyPruningCallback(schedule)
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[pruner],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            of,
            DataLoader(data, batch_size=64),
            DataLoader(data, batch_size=160),
            ckpt_path=path if epochs == 6 else None,
            weights_only=True,
        )
        trainer.save_checkpoint(path)
    return pruner


def test_a_resumed_run_goes_on_with_the_next_target_of_another_schedule(tmp_path: Path) -> None:
    # Not with that of epoch 0, which had its event.
    pruner = resumed(tmp_path, {0: 0.4, 3: 0.5, 4: 0.6})
    assert [(r["epoch"], r["target"]) for r in pruner.history] == [(0, 0.3), (3, 0.5), (4, 0.6)]
    assert pruner.sparsity == pytest.approx(0.6, abs=1e-3)


def test_another_schedule_brings_back_no_weights(tmp_path: Path) -> None:
    pruner = resumed(tmp_path, {3: 0.1})
    assert [r["target"] for r in pruner.history] == [0.3]
    assert pruner.sparsity == pytest.approx(0.3, abs=1e-3)


def test_a_checkpoint_of_another_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Renamed(Mlp):
        """Loads the same weights, by names of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = self.net
            del self.net

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

        def load_state_dict(
            self, state: dict[str, Tensor], strict: bool = True, **kwargs: Any
        ) -> Any:
            renamed = {name.replace("net.", "layers."): tensor for name, tensor in state.items()}
            return super().load_state_dict(renamed, strict=strict, **kwargs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            pytest.fail("A training step was made.")

    model = Renamed()
    with pytest.raises(ValueError, match=r"another model(.|\n)*'net.0.weight'(.|\n)*not there"):
        resumed(tmp_path, {3: 0.5}, model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
