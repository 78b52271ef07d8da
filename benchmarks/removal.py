r"""What is gained by cutting out what was pruned: latency, sizes, files.

    MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 \
        python benchmarks/removal.py    # prints the tables that results/removal.md keeps

The two variables let glibc keep freed memory: else some calls, and not others, wait for pages that
the one before gave back, and the same network takes 2 ms or 6 ms.

Structured: half of the channels and hidden units of LeNet-5, ResNet-20 and a small transformer, in
everything they are coupled with, by masks; beside it torch-pruning alone, which cuts the same
shares itself, and a network built with the reduced widths from the start. Unstructured: 784-128-10
and LeNet-5 from the recipe at 98 %, where whole units die by themselves. Latencies are medians over
rounds in which all models take turns, on one thread; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import networks
from benchmarks import quality_networks as subjects
from benchmarks.quality_trainers import in_trainer
from lightning_prune import (
    load_shrunk,
    save_compressed,
    save_shrunk,
    shrink_with_report,
    sparsify,
)
from lightning_prune.removal.costs import count_macs
from lightning_prune.removal.latency import Latency, interleaved

BATCH = 64
CACHE = Path(__file__).parent / "results" / ".cache"
SIZES = {"LeNet-5": (1, 28, 28), "ResNet-20": (1, 32, 32), "encoder": (1, 32, 32)}


def inputs(name: str, n: int = BATCH) -> Tensor:
    """Return real digits of the size that a network takes."""
    return networks.digits(SIZES[name][1])[0][:n]


def half_zeroed(name: str) -> nn.Module:
    """Return a network in which half of the units are zero, in all layers they are coupled with."""
    torch.manual_seed(0)
    model = networks.NETWORKS[name][0]().eval()
    with torch.no_grad():
        for module in model.modules():  # running statistics of a network that has seen something
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.weight[::2] = 0
                if module.bias is not None:
                    module.bias[::2] = 0
            elif isinstance(module, nn.TransformerEncoderLayer):
                module.linear1.weight[::2] = module.linear1.bias[::2] = 0
            elif isinstance(module, nn.Linear) and name == "LeNet-5" and module.out_features > 10:
                module.weight[::2] = module.bias[::2] = 0
    return model


def by_torch_pruning(name: str, x: Tensor) -> tuple[nn.Module, float]:
    """Return the network half cut by torch-pruning, and the seconds that took."""
    import torch_pruning  # noqa: PLC0415  (an extra)

    torch.manual_seed(0)
    model = networks.NETWORKS[name][0]().eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    kept: list[nn.Module] = [last]
    if name == "encoder":  # as above: the hidden units of the feed-forward parts only
        hidden = [m.linear1 for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
        kept = [
            m
            for m in model.modules()
            if isinstance(m, nn.Linear | nn.MultiheadAttention) and m not in hidden
        ]
    start = time.perf_counter()
    torch_pruning.pruner.MagnitudePruner(
        model,
        x[:2],
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=kept,
    ).step()
    return model, time.perf_counter() - start


def rebuilt(small: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network of the small one's widths, built and initialised from the start."""
    with tempfile.TemporaryDirectory() as folder:
        save_shrunk(small, Path(folder) / "small.pt")
        model = load_shrunk(Path(folder) / "small.pt", build()).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.05
    return model


def timed(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, Latency]:
    """Return the latency of each model on a batch, all in the same rounds."""
    with torch.no_grad():
        return interleaved(
            {name: (lambda model=model: model(x)) for name, model in models.items()},
            rounds=rounds,
        )


def structured(rounds: int) -> None:
    """Print what cutting half of the units brings."""
    print("| network | masked, ms | cut, ms | times as fast | against built so | torch-pruning |")
    print("|---|---|---|---|---|---|")
    notes = []
    for name in SIZES:
        x, masked = inputs(name), half_zeroed(name)
        start = time.perf_counter()
        small, report = shrink_with_report(masked, example_inputs=x[:8])
        seconds = time.perf_counter() - start
        other, other_seconds = by_torch_pruning(name, x)
        models = {
            "masked": masked,
            "cut": small.eval(),
            "built": rebuilt(small, networks.NETWORKS[name][0]),
            "theirs": other,
        }
        found = timed(models, x, rounds)
        with torch.no_grad():
            wanted, got = masked(x), small(x)
            off = float((got - wanted).abs().max() / wanted.abs().max())
        print(
            f"| {name} | {1e3 * found['masked'].median:.2f} | {1e3 * found['cut'].median:.2f} "
            f"| {found['masked'].ratio(found['cut']):.2f} "
            f"| {found['cut'].ratio(found['built']):.3f} "
            f"| {found['masked'].ratio(found['theirs']):.2f} times as fast |"
        )
        theirs = sum(p.numel() for p in other.parameters())
        notes.append(
            f"- {name}: {report.parameters_before:,} parameters become "
            f"{report.parameters_after:,} (torch-pruning: {theirs:,}), outputs off by {off:.1e} of "
            f"the largest; {seconds:.1f} s to cut (torch-pruning, which proves nothing: "
            f"{other_seconds:.1f} s)."
        )
    print("\n" + "\n".join(notes))


def unstructured(rounds: int) -> None:
    """Print what is left of networks that the recipe has pruned to 98 %, by two rankings."""
    print(
        "\n| network, 98 % of the weights zero | parameters | multiply-accumulates | of the zeros' "
        "own share | masked, ms | cut, ms | times as fast | and CSR where faster |"
    )
    print("|---|---|---|---|---|---|---|---|")
    cases = [(name, arm) for name in ("784-128-10", "LeNet-5") for arm in ("recipe", "recipe-obs")]
    for name, arm in cases:
        dense = subjects.dense(name, 0, CACHE)
        masked = in_trainer(dense, name, arm, target=0.98, lr=3e-3, seed=0).eval()
        x = subjects.train_part(name)[0][:BATCH]
        small, report = shrink_with_report(masked, example_inputs=x[:8])
        before, nonzero = count_macs(masked, x[:1])
        after, _ = count_macs(small, x[:1])
        sparse, _ = sparsify(small.eval(), x)
        found = timed({"masked": masked, "cut": small, "csr": sparse}, x, rounds)
        print(
            f"| {name}, {arm} | {report.parameters_before:,} to {report.parameters_after:,} "
            f"| {before:,} to {after:,} | {nonzero:,} without zeros "
            f"| {1e3 * found['masked'].median:.3f} | {1e3 * found['cut'].median:.3f} "
            f"| {found['masked'].ratio(found['cut']):.2f} "
            f"| {found['masked'].ratio(found['csr']):.2f} |"
        )


def files() -> None:
    """Print what a file of a network at 95 % takes."""
    print("\n| network, 95 % of the weights zero | dense file, bytes | compressed | share |")
    print("|---|---|---|---|")
    for name in ("784-128-10", "LeNet-300-100", "LeNet-5"):
        model = copy.deepcopy(subjects.dense(name, 0, CACHE))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    limit = parameter.abs().flatten().kthvalue(round(0.95 * parameter.numel()))
                    parameter[parameter.abs() <= limit.values] = 0
        with tempfile.TemporaryDirectory() as folder:
            dense, packed = Path(folder) / "dense.pt", Path(folder) / "packed.safetensors"
            torch.save(model.state_dict(), dense)
            save_compressed(model, packed)
            sizes = dense.stat().st_size, packed.stat().st_size
        print(f"| {name} | {sizes[0]:,} | {sizes[1]:,} | {sizes[1] / sizes[0]:.4f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=51)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"batch {BATCH}, one thread of {os.cpu_count()}, torch {torch.__version__}\n")
    structured(options.rounds)
    unstructured(options.rounds)
    files()


if __name__ == "__main__":
    main()
