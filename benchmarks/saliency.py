"""What scores cost: our engine against the plain pass, torch.func and BackPACK.

    python benchmarks/saliency.py                  # ratios, growth and memory
    python benchmarks/saliency.py --only ratios    # one part
    python benchmarks/saliency.py --backpack       # adds BackPACK

The results go to benchmarks/results/saliency.*. BackPACK has to be installed for its part, see
benchmarks/README.md.

Every figure of time is a ratio over one plain forward and backward pass of the same data in the
same process, medians of interleaved runs. Memory is the growth of the process's peak, each case in
a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import networks
from lightning_prune.saliency import SaliencyAccumulator, squared_gradients

RESULTS = Path(__file__).parent / "results"
TOLERANCES = (0.0, 1e-3)


def interleaved(
    cases: dict[str, Callable[[], Any]], repeats: int, slow: frozenset[str] = frozenset()
) -> dict[str, float]:
    """Return the median seconds of each case.

    The cases take turns. Slow ones run three times at most.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(repeats + 1):
        for name, run in cases.items():
            if name in slow and i > 3:
                continue
            start = time.perf_counter()
            run()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def plain_pass(model: nn.Module, inputs: list[Tensor], labels: list[Tensor]) -> Callable[[], None]:
    """Return one forward and backward pass over the data, as training does it."""
    parameters = list(model.parameters())

    def run() -> None:
        for x, y in zip(inputs, labels, strict=True):
            torch.autograd.grad(F.cross_entropy(model(x), y), parameters)

    return run


def ours(
    model: nn.Module,
    inputs: list[Tensor],
    tolerance: float,
    logits: list[Tensor] | None = None,
    fresh: bool = False,
) -> Callable[[], Any]:
    """Return our scoring pass; a ``fresh`` one proves its closed forms anew in every run."""
    kept = SaliencyAccumulator(model, tolerance=tolerance)

    def run() -> dict[str, Tensor]:
        accumulator = SaliencyAccumulator(model, tolerance=tolerance) if fresh else kept
        accumulator.reset()
        for i, x in enumerate(inputs):
            accumulator.update(x, None if logits is None else logits[i])
        return accumulator.compute()

    return run


def torch_func(model: nn.Module, inputs: list[Tensor]) -> Callable[[], Any]:
    """Return vmap(jacrev) of the softmax, in chunks of 16 samples."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def probability(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (weights, buffers), (x[None],))[0].softmax(-1)

    def run() -> dict[str, Tensor]:
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x in inputs:
            for part in x.split(16):
                for name, jacobian in vmap(jacrev(probability), in_dims=(None, 0))(
                    parameters, part
                ).items():
                    total[name] += jacobian.square().sum((0, 1))
        return total

    return run


def backpack(model: nn.Module, inputs: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return BackPACK's SumGradSquared once per class, and its DiagGGNExact."""
    from backpack import backpack as extensions  # noqa: PLC0415  (optional: only for --backpack)
    from backpack import extend  # noqa: PLC0415  (likewise)
    from backpack.extensions import DiagGGNExact, SumGradSquared  # noqa: PLC0415  (likewise)

    # Extended modules keep their hooks, which the other methods must not pay for.
    model, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def squares() -> None:
        for x in inputs:
            p = model(x).softmax(-1)
            for c in range(p.shape[1]):
                with extensions(SumGradSquared(), retain_graph=True):
                    p[:, c].sum().backward(retain_graph=True)

    def fisher() -> dict[str, Tensor]:
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for x in inputs:
            with extensions(DiagGGNExact()):
                logits = model(x)
                loss(logits, logits.argmax(1)).backward()
            for name, parameter in model.named_parameters():
                total[name] += parameter.diag_ggn_exact
        return total

    return squares, fisher


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the largest error over the largest score, the worst of all parameters.

    Parameters whose score is 0 to round-off are left out.
    """
    floor = 1e-10 * max(float(score.max()) for score in exact.values())
    errors = [
        float((found[k] - v).abs().max() / v.max())
        for k, v in exact.items()
        if float(v.max()) > floor
    ]
    return max(errors)


def ratios(repeats: int, with_backpack: bool) -> list[dict[str, Any]]:
    """Measure every network at every tolerance."""
    rows = []
    for name in networks.NETWORKS:
        samples = networks.VALIDATION if "28" in name or "LeNet" in name or "512" in name else 256
        net = networks.trained(name, samples=samples)
        with torch.no_grad():
            logits = [net.model(x) for x in net.inputs]
        cases = {"plain": plain_pass(net.model, net.inputs, net.labels)}
        for tolerance in TOLERANCES:
            cases[f"tolerance {tolerance:g}"] = ours(net.model, net.inputs, tolerance)
            cases[f"tolerance {tolerance:g}, logits known"] = ours(
                net.model, net.inputs, tolerance, logits
            )
            cases[f"tolerance {tolerance:g}, from nothing"] = ours(
                net.model, net.inputs, tolerance, fresh=True
            )
        rivals = {}
        if name in ("784-128-10", "LeNet-5"):
            rivals["torch.func"] = torch_func(net.model, net.inputs)
            if with_backpack:
                squares, fisher = backpack(net.model, net.inputs)
                rivals |= {"BackPACK, once per class": squares, "BackPACK DiagGGNExact": fisher}
        medians = interleaved({**cases, **rivals}, repeats, frozenset(rivals))
        exact = squared_gradients(net.model.double(), [x.double() for x in net.inputs])
        net.model.float()
        row: dict[str, Any] = {
            "network": name,
            "accuracy": round(net.accuracy, 4),
            "plain_ms": round(1e3 * medians["plain"], 2),
        }
        row["ratio"] = {
            k: round(v / medians["plain"], 3) for k, v in medians.items() if k != "plain"
        }
        row["error"] = {k: relative_error(run(), exact) for k, run in cases.items() if k != "plain"}
        if with_backpack and "BackPACK DiagGGNExact" in rivals:
            fisher_ours = squared_gradients(net.model, net.inputs, target="fisher")
            row["fisher_error_against_backpack"] = relative_error(
                fisher_ours, rivals["BackPACK DiagGGNExact"]()
            )
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def growth(repeats: int) -> list[dict[str, Any]]:
    """Measure how the cost grows with samples, classes and parameters.

    The networks are at initialisation, made sure.
    """
    rows = []
    cases = [("samples", n, 256, 10, 128) for n in (64, 256, 1024, 4096)]
    cases += [("classes", c, 128, c, 256) for c in (10, 100, 1000, 32000)]
    cases += [("hidden width", w, 256, 10, w) for w in (64, 256, 1024, 4096)]
    for what, value, batch, classes, width in cases:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, classes))
        with torch.no_grad():
            # Confident, as trained networks are.
            model[2].weight.mul_(60.0 if classes <= 10 else 90.0)
        x = torch.randn(value if what == "samples" else batch, 256)
        inputs = list(x.split(batch))
        labels = [torch.zeros(len(part), dtype=torch.long) for part in inputs]
        runs = {
            "plain": plain_pass(model, inputs, labels),
            "tolerance 0.001": ours(model, inputs, 1e-3),
        }
        if classes <= 1000:
            runs["tolerance 0"] = ours(model, inputs, 0.0)
        medians = interleaved(runs, repeats, frozenset({"tolerance 0"} if classes > 100 else ()))
        row = {"grows": what, "value": value, "plain_ms": round(1e3 * medians["plain"], 3)}
        row["ratio"] = {
            k: round(v / medians["plain"], 3) for k, v in medians.items() if k != "plain"
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


MEMORY_CASES = ("784-128-10", "LeNet-5", "ResNet-20", "encoder", "wide batch", "many classes")


def memory_case(name: str, tolerance: float, workspace: int) -> dict[str, Any]:
    """Return by how much scoring raises the peak of this process.

    The rise is over the peak of a plain pass on the same data.
    """
    torch.manual_seed(0)
    if name == "many classes":
        model, x = (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32000)),
            torch.randn(64, 784),
        )
        with torch.no_grad():
            model[3].weight.mul_(60.0)
    elif name == "wide batch":
        model, x = networks.lenet(), torch.randn(8192, 1, 28, 28)
    else:
        build, size, _, batch = networks.NETWORKS[name]
        model, x = build(), torch.randn(4 * batch, 1, size, size)
    model.eval()
    y = torch.zeros(len(x), dtype=torch.long)
    plain_pass(model, [x], [y])()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    squared_gradients(model, [x], tolerance=tolerance, workspace=workspace)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    return {
        "case": name,
        "samples": len(x),
        "tolerance": tolerance,
        "workspace_mib": workspace // 2**20,
        "parameters_mib": round(parameters, 1),
        "plain_peak_mib": before // 1024,
        "extra_peak_mib": round((after - before) / 1024, 1),
    }


def memory() -> list[dict[str, Any]]:
    """Measure each case in a process of its own."""
    rows = []
    for name in MEMORY_CASES:
        for tolerance in (0.001,) if name == "many classes" else TOLERANCES:
            command = [
                sys.executable,
                __file__,
                "--memory-case",
                name,
                "--tolerance",
                str(tolerance),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(done.stdout.splitlines()[-1], flush=True)
    return rows


HEAD = """# What scores cost

Ratios over one plain forward and backward pass of the same data, in the same process, medians.
"From nothing" proves the closed forms anew in every run; "logits known" is what the callback does.
"""


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [HEAD, *([results["note"], ""] if "note" in results else [])]
    if "ratios" in results:
        lines += [results["made"]["ratios"], ""]
        columns = list(dict.fromkeys(k for row in results["ratios"] for k in row["ratio"]))
        lines += [
            f"| network | plain pass, ms | {' | '.join(columns)} |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for row in results["ratios"]:
            cells = []
            for column in columns:
                error = row["error"].get(column)
                cells.append(
                    f"{row['ratio'].get(column, '-')}"
                    + (f" (error {error:.1e})" if error is not None else "")
                )
            lines.append(f"| {row['network']} | {row['plain_ms']} | {' | '.join(cells)} |")
        lines.append("")
    for part in ("growth", "memory"):
        if part in results:
            lines += [results["made"][part], ""]
            columns = list(results[part][0])
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [
                "| " + " | ".join(str(row[c]) for c in columns) + " |" for row in results[part]
            ] + [""]
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("ratios", "growth", "memory"), help="run one part")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved runs of each case")
    parser.add_argument("--backpack", action="store_true", help="measure BackPACK too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "saliency.json")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    parser.add_argument("--tolerance", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--workspace", type=int, default=256 * 2**20, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_case:
        print(
            json.dumps(memory_case(arguments.memory_case, arguments.tolerance, arguments.workspace))
        )
        return
    # Other parts stay as they were measured.
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results: dict[str, Any] = {"made": {}, **(known if arguments.only else {})}
    made = (
        f"Made by `python benchmarks/saliency.py {' '.join(sys.argv[1:])}` on "
        f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}."
    )
    parts: dict[str, Callable[[], Any]] = {
        "ratios": partial(ratios, arguments.repeats, arguments.backpack),
        "growth": partial(growth, arguments.repeats),
        "memory": memory,
    }
    for part in [arguments.only] if arguments.only else parts:
        results[part], results["made"][part] = parts[part](), made
    if arguments.only in (None, "ratios"):
        results.pop("note", None)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
