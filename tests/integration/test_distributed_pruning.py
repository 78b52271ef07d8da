"""Two processes come to the same masks, and to those that one process comes to.

This file is also the program: started as a script it trains with two processes and with one, and
writes down what each process has found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from lightning_prune import SaliencyPruningCallback, VAEAugmentCallback
from lightning_prune.callbacks.preflight import PruningSetupError

TRAIN, BATCH = 320, 64
EVENTS = {0: 0.5, 1: 0.8}


@dataclass(frozen=True)
class Case:
    """A way to spread validation samples over processes.

    Args:
        sizes: The number of samples in each validation loader.
        sampler: Whether the loader has a sampler of the user's own, which Lightning wraps.
        generated: Whether a generator's inputs join the scoring.
        refit: Which refit follows an event, with second-order prices.
    """

    sizes: tuple[int, ...]
    sampler: bool = False
    generated: bool = False
    refit: str | None = None


CASES = {
    "even shards": Case((130,)),
    "a sample is repeated": Case((131,)),
    "nearly all are repeats": Case((1,)),
    "several loaders, one repeats": Case((57, 60)),
    "a sampler of the user's": Case((131,), sampler=True),
}
"""Cases in which one process and two see the same samples, and score all of their energy."""

OWN_WAYS = {
    "generated inputs join": Case((131,), generated=True),
    "layers are refitted": Case((131,), refit="layers"),
    "outputs are refitted": Case((131,), refit="outputs"),
}
"""Cases in which what is scored depends on the process."""


# The program


class Backwards(Sampler[int]):
    """From the last sample to the first."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size - 1, -1, -1))


class Mlp(L.LightningModule):
    """64-24-10 in double precision: sums in another order differ by 1e-16, no score ties by it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).double()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    def train_dataloader(self) -> DataLoader:
        # Not shuffled: all processes together see the batches that a single one sees, and the
        # weights are the same but for round-off.
        part, world = digits(0, TRAIN), self.trainer.world_size
        sampler = DistributedSampler(part, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(part, batch_size=BATCH // world, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class WriteDown(L.Callback):
    """Each process writes what it has found."""

    def __init__(self, pruner: SaliencyPruningCallback, folder: Path) -> None:
        self.pruner, self.folder = pruner, folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pruner = self.pruner
        end = {
            "masks": pruner.masks,
            "scores": pruner.scores,
            "weights": {name: p.detach() for name, p in pl_module.named_parameters()},
            "history": [{k: v for k, v in r.items() if k != "seconds"} for r in pruner.history],
        }
        torch.save(end, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def digits(first: int, last: int | None) -> TensorDataset:
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    return TensorDataset(x[first:last] / 16, y[first:last])


def train(folder: Path, case: Case, processes: int) -> None:
    loaders, end = [], 1700
    for size in case.sizes:
        part, sampler = digits(end - size, end), Backwards(size) if case.sampler else None
        loaders.append(DataLoader(part, batch_size=20 // processes, sampler=sampler))
        end -= size
    how = {"criterion": "obs", "refit": case.refit} if case.refit else {}
    pruner = SaliencyPruningCallback(EVENTS, tolerance=0.0, **how)
    write: list[L.Callback] = [pruner, WriteDown(pruner, folder)]
    if case.generated:
        write.append(VAEAugmentCallback(inject=("saliency",), warmup=2))
    L.Trainer(
        max_epochs=3,
        callbacks=write,
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Mlp(), val_dataloaders=loaders)


def refused(folder: Path) -> None:
    """Write down how a fit ends that shards parameters."""
    pruner, model = SaliencyPruningCallback(EVENTS), Mlp()
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[pruner],
        accelerator="cpu",
        devices=1,
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.configure_model = lambda: None  # what this strategy asks for
    data = DataLoader(TensorDataset(torch.zeros(8, 64).double(), torch.zeros(8).long()))
    try:
        trainer.fit(model, data, data)
    except PruningSetupError as error:
        (folder / "refused.txt").write_text(f"{model.steps} steps. {error}")


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Two processes first: what has computed gradients must not be forked.
    for processes in (2, 1):
        for name, case in {**CASES, **OWN_WAYS}.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            train(folder / name, case, processes)
    refused(folder)


# The tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make all the runs, once."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MASTER_ADDR": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Callable[..., dict[str, Any]]:
    """Return what a process of a run has found."""
    return lambda name, world, rank: torch.load(folder / name / f"{world}-{rank}.pt")


@pytest.mark.parametrize("name", [*CASES, *OWN_WAYS])
def test_all_processes_come_to_the_same_masks(found, name: str) -> None:
    first, second = (found(name, 2, rank) for rank in (0, 1))
    assert [record["sparsity"] for record in first["history"]] == pytest.approx(
        list(EVENTS.values()), abs=1e-3
    )
    assert first["history"] == second["history"]
    for what in ("masks", "scores", "weights"):
        for key, tensor in first[what].items():
            assert torch.equal(tensor, second[what][key]), (what, key)


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_a_single_process(found, name: str) -> None:
    one, two = found(name, 1, 0), found(name, 2, 0)
    for key, mask in one["masks"].items():
        assert torch.equal(two["masks"][key], mask), key
        torch.testing.assert_close(two["scores"][key], one["scores"][key], rtol=1e-8, atol=1e-18)
    for record in (*one["history"], *two["history"]):
        assert record["samples"] == sum(CASES[name].sizes)


def test_each_process_adds_its_share_of_generated_inputs(found) -> None:
    # Half as many as real ones: of 66 samples here, of 65 there.
    (record, *_) = found("generated inputs join", 2, 0)["history"]
    assert record["samples"] == 131 + 33 + 32


def test_sharded_parameters_are_refused_before_the_first_step(folder: Path) -> None:
    said = (folder / "refused.txt").read_text()
    assert said.startswith("0 steps.")
    assert "ModelParallelStrategy" in said
    assert "strategy='ddp'" in said


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_every_sharding_strategy_is_refused_at_setup(kind: type) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    # Some need a GPU, or a package that is not here, before they can be made.
    trainer._accelerator_connector.strategy = kind.__new__(kind)
    with pytest.raises(PruningSetupError, match=kind.__name__):
        SaliencyPruningCallback(EVENTS).setup(trainer, Mlp(), "fit")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
