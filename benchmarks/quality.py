"""Accuracy against sparsity: our scores, refits and recipe beside those of others.

    python benchmarks/quality.py                       # runs; stop and start it at any time
    python benchmarks/quality.py --networks 784-128-10 --families fine-tuned --arms taylor 'Model*'
    python benchmarks/quality_report.py                # the table and the curves, from the rows

A row is one network at one sparsity: it is appended to benchmarks/results/quality.jsonl as soon as
it is measured, and a row that is there already is not measured again. All arms of a (network, seed)
start from the same dense network, kept in benchmarks/results/.cache. A row has its fingerprint:
where the cache was lost, and a new training on another processor rounds otherwise, the rows of the
old one are measured again.

Families:
    no-retraining  26 stages at a constant rate to 99.5 %, a row at each of six sparsities.
    fine-tuned     12 epochs of training after the dense ones, an event after each of the first 8
                   (or all of them before), the learning rate decayed in the last third. Its base
                   is chosen for each (network, arm) on the validation part by seeds of their own.
    structured     the same training, whole hidden units removed, a row at each of two shares; half
                   of the arms are torch-pruning's, of the extra `removal`.
    tuning         the choices of a base: accuracy and loss on the validation part.

The order of the work is by network, then seed, then family, then arm, the most telling arms first.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import quality_arms as arms
from benchmarks import quality_networks as subjects
from benchmarks import quality_structured as units_removed
from benchmarks.quality_statistics import NO_PRUNING

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "quality.jsonl"
SEEDS = 5
TUNING_SEEDS = (1000, 1001)  # two: 400 digits tell rates apart to a point and a half
TUNED_AT = (0.95, 0.98)  # but for the structured arms, which are tuned at both of their shares
RATES = (3e-3, 1e-2, 2e-2, 4e-2)  # of six arms on two networks all lost at 6e-2

Row = dict[str, Any]
Key = tuple[Any, ...]


def _orders() -> dict[str, list[str]]:
    """Return family -> its arms, the most telling first."""
    from benchmarks.quality_trainers import MODEL_PRUNING, RECIPE  # noqa: PLC0415  (Lightning)

    first = ["taylor", "magnitude-global", "obc"]
    criteria = [*first, *(name for name in arms.CRITERIA_NAMES if name not in first)]
    layers = [f"{criterion}+layers" for criterion in criteria]
    outputs = ["obs+outputs", "obc+outputs", "taylor+outputs"]
    shifted = ["obs+outputs+shifts", "obs+layers+shifts", "taylor+outputs+shifts"]
    return {
        "no-retraining": [*criteria, *outputs, *shifted, *layers],
        "fine-tuned": [
            "taylor", "recipe", *MODEL_PRUNING, NO_PRUNING, *criteria[1:],
            *(arm for arm in RECIPE if arm != "recipe"),
            *(f"{arm}+distill" for arm in layers),
            "obs+layers+first", "obs+outputs+first",
        ],
        units_removed.FAMILY: list(units_removed.ARMS),
    }  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One arm of one family on one network and seed: what a process does in one go."""

    network: str
    seed: int
    family: str
    arm: str


def key(row: Row) -> Key:
    """Return what tells rows apart."""
    rate = row.get("lr") if row["family"] == "tuning" else None
    return (*(row[part] for part in ("family", "network", "arm", "sparsity", "seed")), rate)


def read_rows(path: Path) -> dict[Key, Row]:
    """Return the rows there are; of rows with the same key the last. A torn last line is left."""
    rows: dict[Key, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the process was ended in the middle of it
            continue
        rows[key(row)] = row
    return rows


def append(path: Path, row: Row) -> None:
    """Append a row as one line; other processes may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, 2)
        file.seek(max(end - 1, 0))
        torn = end and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")


def reached(net: nn.Module) -> float:
    """Return the share of prunable weights that are exactly zero."""
    weights = arms.find_prunable(net).parameters.values()
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def facts(unit: Unit, net: nn.Module, dense: nn.Module) -> Row:
    """Return how much of a network is gone: of its weights, or of a structured arm's units."""
    if unit.arm in units_removed.ARMS:
        return units_removed.facts(net, dense)
    return {"reached": reached(net)}


def write_result(
    path: Path, unit: Unit, share: float, net: nn.Module, dense: nn.Module, **more: Any
) -> None:
    """Measure on the test part, which nothing else reads, and append the row."""
    test = subjects.test_part(unit.network)
    row = {
        **asdict(unit),
        "sparsity": share,
        "accuracy": subjects.accuracy(net, test),
        "dense": subjects.accuracy(dense, test),
        "start": subjects.fingerprint(dense),
        **facts(unit, net, dense),
        **more,
    }
    append(path, row)


def train(
    unit: Unit, dense: nn.Module, share: float, lr: float, cache: Path
) -> tuple[nn.Module, float]:
    """Return the fine-tuned network of an arm, and the seconds of CPU time it took."""
    seconds = 0.0
    start = time.process_time()
    options = {"target": share, "lr": lr, "seed": unit.seed}
    if unit.arm in units_removed.ARMS:
        net = units_removed.structured(dense, unit.network, unit.arm, **options)
    elif unit.arm == NO_PRUNING:
        net = arms.trained_on(dense, unit.network, lr=lr, seed=unit.seed)
    elif unit.arm.startswith(("ModelPruning", "recipe")):
        from benchmarks.quality_trainers import in_trainer  # noqa: PLC0415  (imports Lightning)

        net = in_trainer(dense, unit.network, unit.arm, **options)
    elif (arm := arms.Arm.named(unit.arm)).first:
        net, seconds = arms.pruned_first(
            dense, unit.network, arm, target=share, seed=unit.seed, cache=cache
        )
        start = time.process_time()  # the way down may have been gone before
        net = arms.fine_tuned_under_masks(net, dense, unit.network, arm, lr=lr, seed=unit.seed)
    else:
        net = arms.fine_tuned(dense, unit.network, arm, **options)
    return net, seconds + time.process_time() - start


def tuned_rate(unit: Unit, path: Path, cache: Path) -> float:
    """Return the best learning rate of an arm on the validation part; measure what is missing."""
    runs = [Unit(unit.network, seed, "tuning", unit.arm) for seed in TUNING_SEEDS]
    cases = [
        {**asdict(tuning), "sparsity": s, "lr": lr}
        for tuning in runs
        for lr in RATES
        for s in tuned_at(unit)
    ]
    rows = read_rows(path)
    for case in cases:
        tuning = Unit(**{part: case[part] for part in asdict(unit)})
        dense = subjects.dense(unit.network, tuning.seed, cache)
        start = subjects.fingerprint(dense)
        if rows.get(key(case), {}).get("start") == start:
            continue
        rows = read_rows(path)  # another process may have been at it
        if rows.get(key(case), {}).get("start") == start:
            continue
        net, seconds = train(tuning, dense, case["sparsity"], case["lr"], cache)
        validation = subjects.validation_part(unit.network)
        measured = {
            "accuracy": subjects.accuracy(net, validation),
            "loss": subjects.mean_loss(net, validation),
            "start": start,
            **facts(tuning, net, dense),
            "seconds": seconds,
        }
        append(path, {**case, **measured})
    return best_rate(read_rows(path)[key(case)] for case in cases)


def best_rate(rows: Iterable[Row]) -> float:
    """Return the rate of the best mean accuracy; of equal ones, that of the smaller mean loss."""
    sums: dict[float, tuple[float, float]] = {}
    for row in rows:
        accuracy, loss = sums.get(row["lr"], (0.0, 0.0))
        sums[row["lr"]] = (accuracy + row["accuracy"], loss - row["loss"])
    return max(sums, key=lambda rate: (round(sums[rate][0], 6), sums[rate][1]))


def run(
    unit: Unit, *, path: Path, cache: Path, shares: tuple[float, ...] | None, threads: int
) -> str:
    """Measure what is missing of a unit, by default at its family's shares; return a line on it."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    try:
        count = _measure(unit, shares_of(unit) if shares is None else shares, path, cache)
    except Exception:  # noqa: BLE001  (one arm that fails must not end a night's run)
        return f"FAILED {unit}\n{traceback.format_exc()}"
    return f"{time.perf_counter() - start:7.1f} s  {count} new rows  {unit}"


def shares_of(unit: Unit) -> tuple[float, ...]:
    """Return the sparsities at which a unit is measured."""
    if unit.arm == NO_PRUNING:
        return (0.0,)
    return units_removed.SHARES if unit.family == units_removed.FAMILY else arms.TARGETS


def tuned_at(unit: Unit) -> tuple[float, ...]:
    """Return the sparsities at which the learning rate of a unit is chosen."""
    return TUNED_AT if shares_of(unit) == arms.TARGETS else shares_of(unit)


def _measure(unit: Unit, shares: tuple[float, ...], path: Path, cache: Path) -> int:
    """Write the rows that are not there, or are of another dense network or learning rate."""
    dense = subjects.dense(unit.network, unit.seed, cache)
    lr = None if unit.family == "no-retraining" else tuned_rate(unit, path, cache)
    valid = {"start": subjects.fingerprint(dense), **({} if lr is None else {"lr": lr})}
    rows = read_rows(path)
    there = {s: rows.get(key({**asdict(unit), "sparsity": s}), {}) for s in shares}
    missing = [s for s in shares if not valid.items() <= there[s].items()]
    write = partial(write_result, path, unit)
    if lr is None and missing:
        arm = arms.Arm.named(unit.arm)
        path_down = arms.without_retraining(dense, unit.network, arm, unit.seed, max(missing))
        for share, net, seconds in path_down:
            if share in missing:
                write(share, net, dense, seconds=seconds)
    elif lr is not None:
        for share in missing:
            net, seconds = train(unit, dense, share, lr, cache)
            write(share, net, dense, seconds=seconds, lr=lr)
    return len(missing)


def units(
    networks: Iterable[str], seeds: int, families: Iterable[str], patterns: Iterable[str]
) -> Iterator[Unit]:
    """Yield the work in the order in which it is worth most if stopped."""
    orders, families, patterns = _orders(), list(families), list(patterns)
    for network in networks:
        for seed in range(seeds):
            for family in families:
                for arm in orders[family]:
                    unit = Unit(network, seed, family, arm)
                    if _says_something(unit) and any(fnmatchcase(arm, p) for p in patterns):
                        yield unit


def _says_something(unit: Unit) -> bool:
    """Return whether a network has what an arm is about, and can afford it."""
    subject = subjects.SUBJECTS[unit.network]
    if "outputs" in unit.arm and unit.network != "784-40-20-10":  # where refits are worth most
        return unit.arm.startswith("obs") and unit.network != "LeNet-5"  # hours
    if unit.family == units_removed.FAMILY:
        return unit.network in units_removed.NETWORKS
    if unit.arm == "obc" and unit.family == "fine-tuned":
        return subject.batch_norm  # without one it is the recipe, bit for bit
    if "shifts" in unit.arm:  # copies like those that the dense network was trained on
        return subject.shifts
    return subject.batch_norm or unit.arm not in ("recipe-no-batch-norm", *arms.RECIPE_BY)


def main() -> None:
    """Read the options, share the units out to the processes, say what they did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names, orders = list(subjects.SUBJECTS), _orders()
    default = [name for name in names if name != "ResNet-20"]
    parser.add_argument("--networks", nargs="+", default=default, choices=names, metavar="NAME")
    parser.add_argument("--families", nargs="+", default=list(orders), choices=orders)
    parser.add_argument("--arms", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0")
    parser.add_argument(
        "--sparsities", nargs="+", type=float, help="instead of those of each family"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--list", action="store_true", help="print the order and do nothing")
    options = parser.parse_args()

    work = list(units(options.networks, options.seeds, options.families, options.arms))
    if options.list:
        print(*work, sep="\n")
        return
    job = partial(
        run,
        path=options.out,
        cache=options.out.parent / ".cache",
        shares=tuple(options.sparsities) if options.sparsities else None,
        threads=options.threads,
    )
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for line in pool.imap_unordered(job, work):
            print(line, flush=True)


if __name__ == "__main__":
    main()
