"""Pruning with few real digits: what do generated ones add, in the scoring and in the training?

    python benchmarks/generative.py --workers 1    # runs; stop and start it at any time
    python benchmarks/generative.py --report       # writes docs/generative.md, from the rows

784-128-10 loses 90, 95, 98 or 99 % of its weights by w^2 R in 8 events, at the start of the first 8
of 12 epochs of 57 steps, and all that scoring, VAE and training have is a draw of 100 to 4,000 real
digits. A row is one pruned network, appended to results/generative.jsonl as soon as it is measured;
a row that is there is not measured again.

Regimes:
    pretrained  the dense network has been trained on 3,600 digits: data are short for pruning only
    scratch     the dense network has been trained on the draw's digits, too

Arms:
    real          684 steps on real digits
    real-equal    twice as many steps: the control of all arms that see a second batch each step
    real-distill  the distillation term of the generated arms on a second batch of real digits
    noise         the same term on real digits under Gaussian noise
    shifts        the same term on real digits moved by up to a pixel
    score         samples of the VAE join the scoring, one for each real digit; its control is real
    train         the term on samples of the VAE, a batch for each real one
    train-batch   samples join the batch, labelled by the dense network
    both          score and train
    selected      both, with the samples of which the score is starved, of four times as many
    adaptive      both, the term's factor following the gap between training and held-out loss
    adaptive-equal  the same; where the factor is 0 there are twice as many steps, on real digits

Runs are paired by seed: the digits, the dense network, the real batches. The learning rate is
chosen for each arm on the validation part, with draws of other seeds, at 98 %.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import quality_networks as subjects
from benchmarks.generative_arms import (
    ARMS,
    DISTILLATION,
    NETWORK,
    Arm,
    Few,
    dense,
    fine_tuned,
    fitted_vae,
)
from benchmarks.generative_calibration import SPLIT, check_start
from benchmarks.quality import TUNING_SEEDS, Row, append, best_rate, key, reached, read_rows
from lightning_prune.augment.mixing import Distillation

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "generative.jsonl"
REAL = (100, 200, 500, 1000, 4000)
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
SEEDS = 8
SCRATCH_ARMS = ("real-equal", "train", "both")
RATES = (1e-3, 3e-3, 1e-2)
TUNED_AT = 0.98
TUNED_WITH = {100: 200, 200: 200, 500: 1000, 1000: 1000, 4000: 1000}
"""Digits -> digits of the runs that choose the rate: the nearer of two. The validation part, which
chooses, is training data with 4,000."""

GRID = [Distillation(weight, t) for weight in (0.3, 0.5, 0.9) for t in (1.0, 2.0)]
# Accuracy on the validation part, mean of the two tuning draws at the best rate, 1e-2 for all:
# weight 0.3: 86.2 (T = 1), 87.6 (T = 2); 0.5: 86.2, 87.5; 0.9: 88.2, 87.5. Taken: 0.9 and T = 1.


@dataclass(frozen=True)
class Block:
    """Work that is done before that of the next block; the seeds are its outermost loop."""

    regime: str
    real: tuple[int, ...]
    sparsities: tuple[float, ...]


BLOCKS = (
    Block("pretrained", (200, 100), (0.98,)),
    Block("pretrained", (4000,), (0.98,)),
    Block("scratch", (200, 100), (0.98,)),
    Block("pretrained", (4000, 1000, 500, 200, 100), (0.98, 0.95, 0.99, 0.9)),
    Block("scratch", (200, 100, 500, 1000), (0.98, 0.95, 0.99, 0.9)),
)
"""The most telling first."""


@dataclass(frozen=True)
class Draw:
    """What a process does in one go: arms and sparsities of one draw, or of one tuning draw."""

    regime: str
    real: int
    seed: int
    sparsities: tuple[float, ...]
    arms: tuple[str, ...]
    tuning: bool = False

    def row(self, arm: str, share: float, lr: float | None = None) -> Row:
        """Return the part of a row that says which one it is."""
        row: Row = {
            "family": "tuning" if self.tuning else family(self.regime, self.real),
            "network": NETWORK,
            "arm": f"{arm}, {self.real} real" if self.tuning else arm,
            "sparsity": share,
            "seed": self.seed,
        }
        return row if lr is None else {**row, "lr": lr}


def family(regime: str, real: int) -> str:
    """Return the family of a row."""
    return f"{regime}, {real} real"


def measured(net: nn.Module, network: nn.Module, part: str, seconds: tuple[float, float]) -> Row:
    """Return what a row says about a pruned network; the only reader of the test part."""
    part_of = subjects.test_part if part == "test" else subjects.validation_part
    data = part_of(NETWORK, SPLIT)
    return {
        "accuracy": subjects.accuracy(net, data),
        "loss": subjects.mean_loss(net, data),
        "dense": subjects.accuracy(network, data),
        "reached": reached(net),
        "seconds": sum(seconds),
        "vae_seconds": seconds[1],
    }


def run(draw: Draw, *, path: Path, cache: Path) -> str:
    """Measure what is missing of a draw; return a line on it."""
    torch.set_num_threads(1)
    start, new = time.perf_counter(), 0
    try:
        for arm in draw.arms:
            for share in draw.sparsities:
                new += _measure(draw, arm, share, path, cache)
    except Exception:  # noqa: BLE001  (one draw that fails must not end a night's run)
        return f"FAILED {draw}\n{traceback.format_exc()}"
    what = "tuning" if draw.tuning else draw.regime
    return (
        f"{time.perf_counter() - start:7.1f} s  {new:3d} new rows  {what}, {draw.real} real, "
        f"seed {draw.seed}"
    )


def _measure(draw: Draw, name: str, share: float, path: Path, cache: Path) -> int:
    rates = RATES if draw.tuning else (None,)
    there = read_rows(path)
    missing = [lr for lr in rates if key(draw.row(name, share, lr)) not in there]
    for rate in missing:
        lr = tuned_rate(name, draw.real, path) if rate is None else rate
        net, network, mix, seconds = trained(draw, ARMS[name], share, lr, cache)
        part = "validation" if draw.tuning else "test"
        row = draw.row(name, share, lr) | measured(net, network, part, seconds)
        check_start(there.values(), row)
        append(path, row | ({"mix": mix} if ARMS[name].adaptive else {}))
    return len(missing)


def trained(
    draw: Draw,
    arm: Arm,
    share: float,
    lr: float,
    cache: Path,
    distillation: Distillation = DISTILLATION,
) -> tuple[nn.Module, nn.Module, float, tuple[float, float]]:
    """Return the pruned network, the dense one, the last mix; and CPU seconds, run and VAE."""
    few = Few.of(draw.real, draw.seed)
    network = dense(draw.regime, few, draw.real, draw.seed, cache)
    vae, fitting = None, 0.0
    if arm.second == "vae":
        vae, fitting = fitted_vae(few, draw.real, draw.seed, cache)
    start = time.process_time()
    net, mix = fine_tuned(
        network, arm, few, vae, target=share, lr=lr, seed=draw.seed, distillation=distillation
    )
    return net, network, mix, (time.process_time() - start, fitting)


def tuned_rate(arm: str, real: int, path: Path) -> float:
    """Return the best learning rate of an arm on the validation part, from the tuning's rows."""
    named = f"{arm}, {TUNED_WITH[real]} real"
    rows = [r for r in read_rows(path).values() if (r["family"], r["arm"]) == ("tuning", named)]
    if len(rows) != len(RATES) * len(TUNING_SEEDS):
        raise RuntimeError(
            f"Expected {len(RATES) * len(TUNING_SEEDS)} tuning rows of arm {named!r} in {path}, "
            f"but found {len(rows)}."
        )
    return best_rate(rows)


def phases(seeds: int, real: list[int], patterns: list[str]) -> Iterator[list[Draw]]:
    """Yield lists of draws, each to be finished before the next is begun, in order of worth."""
    arms = tuple(a for a in ARMS if any(fnmatchcase(a, p) for p in patterns))
    for block in BLOCKS:
        sizes = [n for n in block.real if n in real]
        own = arms if block.regime == "pretrained" else [a for a in arms if a in SCRATCH_ARMS]
        # Dense networks from scratch take the rates of the others.
        yield [
            Draw("pretrained", n, seed, (TUNED_AT,), (arm,), tuning=True)
            for n in dict.fromkeys(TUNED_WITH[n] for n in sizes)
            for arm in own
            for seed in TUNING_SEEDS
        ]
        yield [
            Draw(block.regime, n, seed, block.sparsities, tuple(own))
            for seed in range(seeds)
            for n in sizes
        ]


def tune_distillation(cache: Path) -> None:
    """Print what the term's settings come to, in points on the validation part at 98 %."""
    torch.set_num_threads(1)
    validation = subjects.validation_part(NETWORK)
    for distillation in GRID:
        line = []
        for lr in RATES:
            found = []
            for seed in TUNING_SEEDS:
                draw = Draw("pretrained", 200, seed, (TUNED_AT,), ("train",), tuning=True)
                net, *_ = trained(draw, ARMS["train"], TUNED_AT, lr, cache, distillation)
                found.append(subjects.accuracy(net, validation))
            line.append(sum(found) / len(found))
        print(
            distillation,
            *(f"{lr:g}: {a:.2f}" for lr, a in zip(RATES, line, strict=True)),
            flush=True,
        )


def main() -> None:
    """Read the options, share the draws out to the processes, say what they did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0")
    parser.add_argument("--real", nargs="+", type=int, default=list(REAL), choices=REAL)
    parser.add_argument("--arms", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--list", action="store_true", help="print the order and do nothing")
    parser.add_argument("--tune", action="store_true", help="the term's weight and temperature")
    parser.add_argument("--report", action="store_true", help="write docs/generative.md")
    options = parser.parse_args()
    cache = RESULTS / ".cache"
    if options.tune:
        tune_distillation(cache)
        return
    if options.report:
        from benchmarks.generative_report import PAGE, write  # noqa: PLC0415

        write(read_rows(options.out).values(), PAGE)
        print(PAGE)
        return
    work = list(phases(options.seeds, options.real, options.arms))
    if options.list:
        print(*(draw for phase in work for draw in phase), sep="\n")
        return
    job = partial(run, path=options.out, cache=cache)
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for phase in work:
            for line in pool.imap_unordered(job, phase):
                print(line, flush=True)


if __name__ == "__main__":
    main()
