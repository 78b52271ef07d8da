"""What pruning costs a fit: time per epoch, and bytes in a checkpoint.

    python benchmarks/fit_overhead.py                                  # Adam, 6 times 16 epochs
    python benchmarks/fit_overhead.py --optimizer adam sgd adam-fused  # all three
    python benchmarks/fit_overhead.py --flush-denormals                # a diagnosis, see below

LeNet-5 on the 5,000 digits, validation a fifth of the training data, real Trainers, all fits of one
optimizer from the same weights, which have been trained for some epochs without pruning. The fits
of a round run side by side in one process, an epoch of each in turn: the speed of a shared machine
wanders by a fifth from one minute to the next, which would otherwise decide the result. An epoch is
training and validation and all that callbacks do between its start and the next one's; the first
two of a fit are not counted, so that the only event of "masks in force" lies before what is
measured. A ratio is that of two fits' epochs of the same turn; the table has the median of these
ratios over all turns, and in brackets its 95 % interval. Where other programs share the machine,
the CPU ratio (of the time this process has computed for, by all its threads) says more than that of
the clock; most with ``--threads 1``.

Checkpoints are those of ``trainer.save_checkpoint`` at the end of the fits.

``--flush-denormals`` has the CPU treat numbers below 1e-38 as zero, in all fits alike: arithmetic
with them is slow on many CPUs. ``--square-roots`` measures what Adam's own arithmetic makes of a
tensor of such numbers, and of exact zeros.

The results go to benchmarks/results/fit_overhead.*.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import networks
from lightning_prune import SaliencyPruningCallback
from lightning_prune.masking import find_prunable

RESULTS = Path(__file__).parent / "results"
TRAIN, VALIDATION = 4160, 832  # 65 and 13 batches of 64
WARM_UP = 2  # epochs of a fit that are not counted
TARGETS = {"ours, masks in force": 1.02, "ours, an event every epoch": 1.12}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
}


class LeNet(L.LightningModule):
    """LeNet-5 and what its training needs; it knows nothing of pruning."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.network = networks.lenet()
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) to (N, 10)."""
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log cross-entropy and accuracy."""
        logits = self(batch[0])
        self.log("val/loss", F.cross_entropy(logits, batch[1]))
        self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of this run."""
        return OPTIMIZERS[self.optimizer](self.parameters())


class Turns(L.Callback):
    """Let the fits of several threads run one epoch at a time, in turn, and note their lengths.

    The first callback of its fit, so that the others' work falls between its marks.
    """

    def __init__(self, name: str, order: Baton) -> None:
        self.name = name
        self.order = order
        self.epochs: list[tuple[float, float]] = []
        self.began: tuple[float, float] | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the end of the epoch before, and wait until it is this fit's turn."""
        self.on_train_end(trainer, pl_module)
        self.order.take(self.name)
        self.began = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the end of an epoch and let the next fit go on."""
        if self.began is None:
            return
        clock, cpu = self.began
        self.epochs.append((time.perf_counter() - clock, time.process_time() - cpu))
        self.began = None
        self.order.give(self.name)


class Baton:
    """Who may run: each fit once in a round, and each round in another order."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.names = names
        self.generator = random.Random(seed)
        self.queue: list[str] = []
        self.changed = threading.Condition()

    def take(self, name: str) -> None:
        """Wait until it is the turn of this fit."""
        with self.changed:
            self.changed.wait_for(lambda: self._next() == name)

    def give(self, name: str) -> None:
        """End the turn of this fit."""
        with self.changed:
            self.queue.remove(name)
            self.changed.notify_all()

    def _next(self) -> str:
        if not self.queue:
            self.queue = self.generator.sample(self.names, len(self.names))
        return self.queue[0]


def rising(epochs: int) -> dict[int, float]:
    """Return targets for every epoch, from 0.5 up to 0.9."""
    return {epoch: 0.5 + 0.4 * epoch / max(1, epochs - 1) for epoch in range(epochs)}


def arms(epochs: int) -> dict[str, Callable[[], list[L.Callback]]]:
    """Return what is compared: name -> the callbacks of a fit."""
    share = 1 - 0.1 ** (1 / epochs)  # of the weights left, so that nine in ten are gone at the end
    return {
        "plain": list,
        "a callback that does nothing": lambda: [L.Callback()],
        "ours, masks in force": lambda: [SaliencyPruningCallback({0: 0.8})],
        "ours, an event every epoch": lambda: [SaliencyPruningCallback(rising(epochs))],
        "Lightning's ModelPruning, every epoch": lambda: [
            ModelPruning(
                "l1_unstructured",
                parameter_names=["weight"],
                amount=share,
                use_global_unstructured=True,
                use_lottery_ticket_hypothesis=False,  # it would go back to the first weights
            )
        ],
    }


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the training data, shuffled anew in each epoch, and the validation data."""
    x, y = networks.digits()
    train = TensorDataset(x[:TRAIN], y[:TRAIN])
    rest = TensorDataset(x[TRAIN : TRAIN + VALIDATION], y[TRAIN : TRAIN + VALIDATION])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(rest, batch_size=64)


def fit(
    optimizer: str, callbacks: list[L.Callback], epochs: int, start: dict[str, Tensor] | None
) -> tuple[L.Trainer, LeNet]:
    """Train from the given weights, or from the initialisation."""
    torch.manual_seed(0)
    model = LeNet(optimizer)
    if start is not None:
        model.load_state_dict(start)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    gc.collect()
    trainer.fit(model, *loaders())
    return trainer, model


def checkpoint_bytes(trainer: L.Trainer) -> int:
    """Return the size of the file that the Trainer writes now."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(path)
        return path.stat().st_size


def side_by_side(
    optimizer: str, epochs: int, start: dict[str, Tensor] | None, seed: int
) -> dict[str, tuple[Turns, L.Trainer, LeNet]]:
    """Run all fits at once, each in a thread of its own that computes only in its turn."""
    cases = arms(epochs)
    order = Baton(list(cases), seed)
    done: dict[str, tuple[Turns, L.Trainer, LeNet]] = {}

    def run(name: str) -> None:
        turns = Turns(name, order)
        done[name] = (turns, *fit(optimizer, [turns, *cases[name]()], epochs, start))

    threads = [threading.Thread(target=run, args=(name,)) for name in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of a median, from the ranks of the values (exact, no model)."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * n**0.5  # 1.96 standard deviations of a binomial(n, 1/2)
    return ordered[max(0, int(n / 2 - reach))], ordered[min(n - 1, int(n / 2 + reach))]


def measure(optimizer: str, repeats: int, epochs: int, pretrain: int) -> dict[str, Any]:
    """Return times and checkpoints of all arms with one optimizer."""
    start = fit(optimizer, [], pretrain, None)[1].state_dict() if pretrain else None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms(epochs)}
    for turn in range(repeats):
        fits = side_by_side(optimizer, epochs, start, turn)
        for name, (turns, _, _) in fits.items():
            times[name] += turns.epochs[WARM_UP:]
    sizes = {name: checkpoint_bytes(trainer) for name, (_, trainer, _) in fits.items()}
    found = {name: zeros(model) for name, (_, _, model) in fits.items()}
    total = sum(weight.numel() for weight in find_prunable(LeNet(optimizer)).parameters.values())
    rows = []
    for name, mine in times.items():
        clock, cpu = (
            [a[i] / b[i] for a, b in zip(mine, times["plain"], strict=True)] for i in (0, 1)
        )
        row = {
            "fit": name,
            "epoch_ms": round(1e3 * statistics.median(seconds for seconds, _ in mine), 1),
            "epochs": len(mine),
            "ratio": round(statistics.median(clock), 3),
            "ratio_interval": [round(end, 3) for end in interval(clock)],
            "cpu_ratio": round(statistics.median(cpu), 3),
            "target": TARGETS.get(name),
            "zeros_at_end": round(found[name], 4),
            "checkpoint_growth": sizes[name] - sizes["plain"],
            "growth_allowed": total // 8 + 4096 if name in TARGETS else None,
        }
        rows.append(row)
        print(json.dumps({"optimizer": optimizer, **row}), flush=True)
    return {"optimizer": optimizer, "prunable_weights": total, "rows": rows}


def zeros(model: LeNet) -> float:
    """Return the share of the prunable weights that are exactly zero."""
    weights = find_prunable(model).parameters.values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights)


def square_roots() -> dict[str, float]:
    """Return the microseconds that the square root of 48,000 equal numbers takes.

    Adam takes that of its second moments in every step; of removed weights they are zero.
    """
    found = {}
    for value in (1.0, 1e-30, 1e-40, 0.0):
        x = torch.full((48_000,), value)
        out, times = torch.empty_like(x), []
        for _ in range(300):
            start = time.perf_counter()
            torch.sqrt(x, out=out)
            times.append(time.perf_counter() - start)
        found[str(value)] = round(1e6 * statistics.median(times), 1)
    return found


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# What pruning costs a fit",
        "",
        "Ratios of an epoch's time (training and validation) over that of the plain fit, medians "
        "over all epochs; in brackets their 95 % intervals. Growth is that of the checkpoint at "
        "the end of the fit, against one bit a prunable weight and 4 KiB.",
        "",
        f"Made by `{results['command']}` on {results['machine']}.",
        "",
    ]
    if "square_roots_us" in results:
        of = ", ".join(f"{n}: {us}" for n, us in results["square_roots_us"].items())
        lines += [f"Square roots of 48,000 equal numbers, microseconds: {of}.", ""]
    for part in results["optimizers"]:
        lines += [
            f"LeNet-5 with {part['optimizer']}, {part['prunable_weights']:,} prunable weights:",
            "",
            "| fit | epoch, ms | ratio | CPU ratio | at most | zeros at the end "
            "| growth, bytes | at most |",
            "|---" * 8 + "|",
        ]
        for row in part["rows"]:
            low, high = row["ratio_interval"]
            zeros = f"{100 * row['zeros_at_end']:.1f} %"
            lines.append(
                f"| {row['fit']} | {row['epoch_ms']} | {row['ratio']} ({low} to {high}) "
                f"| {row['cpu_ratio']} | {row['target'] or '-'} | {zeros} "
                f"| {row['checkpoint_growth']:,} | {row['growth_allowed'] or '-'} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=6, help="rounds of fits, each from the start"
    )
    parser.add_argument(
        "--epochs", type=int, default=16, help="of a fit; the first two do not count"
    )
    parser.add_argument("--pretrain", type=int, default=15, help="epochs before all fits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["adam"])
    parser.add_argument("--flush-denormals", action="store_true", help="numbers < 1e-38 are zero")
    parser.add_argument("--square-roots", action="store_true", help="measure these too")
    parser.add_argument("--out", type=Path, default=RESULTS / "fit_overhead.json")
    arguments = parser.parse_args()
    if arguments.epochs <= WARM_UP or arguments.repeats < 1:
        parser.error(f"expected --epochs above {WARM_UP} and --repeats of 1 or more")
    if arguments.flush_denormals and not torch.set_flush_denormal(True):
        parser.error("this CPU cannot flush denormals")
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/fit_overhead.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"Lightning {L.__version__}, Python {platform.python_version()}",
    }
    if arguments.square_roots:
        results["square_roots_us"] = square_roots()
    results["optimizers"] = [
        measure(optimizer, arguments.repeats, arguments.epochs, arguments.pretrain)
        for optimizer in arguments.optimizer
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
