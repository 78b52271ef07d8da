"""Draw the picture of the README from real runs of examples/mnist.py.

    python docs/make_picture.py

Runs the example once for every arm and seed that has not finished yet (about two minutes a
seed), reads results.json, weights.pt and the TensorBoard events back, and writes
docs/images/mnist.png. Nothing in the picture comes from anywhere else.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "mnist.png"


@dataclass(frozen=True)
class Arm:
    """One line of the first panel: what it is called, and how the example is told to run it."""

    label: str
    options: tuple[str, ...]
    color: str
    style: str = "o-"


ARMS = {
    "taylor": Arm("w² R (default)", (), "#c2410c"),
    "no-vae": Arm("w² R without the VAE", ("--no-vae",), "#c2410c", "o:"),
    "magnitude": Arm("|w|", ("--criterion", "magnitude"), "#334155"),
    "saliency": Arm("R, as published", ("--criterion", "saliency"), "#0e7490"),
    "random": Arm("random", ("--criterion", "random"), "#a8a29e"),
}
INK, PAPER = "#1c1917", "#ffffff"


def ensure_run(folder: Path, *options: str) -> None:
    """Run the example into ``folder`` unless a finished run lies there."""
    results = folder / "results.json"
    if results.exists() and len(json.loads(results.read_text())["rows"]) == 6:
        return
    command = [sys.executable, str(ROOT / "examples" / "mnist.py"), "--out", str(folder), *options]
    subprocess.run(command, check=True)


def rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's table."""
    found: list[dict[str, float]] = json.loads((folder / "results.json").read_text())["rows"]
    return found


def draw_tradeoff(axes: Axes, runs: dict[str, list[Path]]) -> None:
    """Test accuracy against the share of weights left, one line an arm, mean over seeds."""
    for name, folders in runs.items():
        accuracy = np.array([[row["test_accuracy"] for row in rows(f)] for f in folders])
        density = [1 - row["sparsity"] for row in rows(folders[0])]
        arm, width = ARMS[name], 2.4 if name == "taylor" else 1.6
        axes.plot(
            density, accuracy.mean(0), arm.style, color=arm.color, lw=width, ms=4, label=arm.label
        )
        if "-" in arm.style:
            low, high = accuracy.min(0), accuracy.max(0)
            axes.fill_between(density, low, high, color=arm.color, alpha=0.13, lw=0)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    axes.set_ylim(0.78, 0.96)  # random leaves the frame; its last value is written at the edge
    axes.set_xlabel("weights left (%)")
    axes.set_title("Test accuracy (%) by what ranks the weights")
    end = np.mean([rows(folder)[-1]["test_accuracy"] for folder in runs["random"]])
    axes.annotate(
        f"{end:.0%} at 2 %".replace("%", " %", 1),
        (0.041, 0.782),
        ha="left",
        color=ARMS["random"].color,
    )
    seeds = len(next(iter(runs.values())))
    axes.legend(loc="lower left", title=f"mean and range of {seeds} seeds", alignment="left")


def draw_run(axes: Axes, folder: Path, events: EventAccumulator) -> None:
    """One run, epoch by epoch: the network's accuracy over the share that was removed."""
    values = [event.value for event in events.Scalars("val/accuracy")]
    epochs = np.arange(1, len(values) + 1)
    last_epochs = [int(row["last_epoch"]) + 1 for row in rows(folder)]
    sparsity = [row["sparsity"] for row in rows(folder)]
    axes.stairs(sparsity, [0, *last_epochs], fill=True, color="#fed7aa", alpha=0.75, lw=0)
    for start, share in zip(last_epochs[:-1], sparsity[1:], strict=True):
        axes.text(start + 0.4, 0.03, f"{100 * share:.0f} %", color="#9a3412", fontsize=9)
    axes.plot(epochs, values, "o-", color=INK, ms=3, lw=1.4)
    axes.set_xlim(0, len(values) + 0.5)
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("epoch")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    axes.set_title("One run: weights removed (shaded) and validation accuracy, %")


def draw_pixels(axes: Axes, folder: Path) -> None:
    """How many of its 128 weights the first layer has kept for each of the 784 pixels."""
    weights = torch.load(folder / "weights.pt", weights_only=True)["1.weight"]
    kept = (weights != 0).sum(0).reshape(28, 28)
    picture = axes.imshow(kept.numpy(), cmap="YlOrBr")
    axes.set_title("What the first layer still looks at")
    axes.set_axis_off()
    bar = axes.figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label(f"weights left a pixel, of {len(weights)}", fontsize=8)
    bar.outline.set_visible(False)


def draw_generated(axes: Axes, events: EventAccumulator) -> None:
    """The last grid of digits that the VAE wrote to TensorBoard."""
    tag = events.Tags()["images"][0]
    grid = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)).convert("L")
    axes.imshow(255 - np.asarray(grid), cmap="gray")
    axes.set_title("Digits drawn by the VAE beside it")
    axes.set_axis_off()


def main() -> None:
    """Run what has to be run, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="runs per criterion (default: 3)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "picture")
    options = parser.parse_args()

    runs = {name: [options.runs / f"{name}-{s}" for s in range(options.seeds)] for name in ARMS}
    for name, folders in runs.items():
        for seed, folder in enumerate(folders):
            ensure_run(folder, *ARMS[name].options, "--seed", str(seed))
    shown = runs["taylor"][0]
    events = EventAccumulator(str(shown), size_guidance={"images": 0, "scalars": 0})
    events.Reload()

    plt.rcParams.update({
        "font.size": 9,
        "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#a8a29e",
        "text.color": INK, "legend.frameon": False, "figure.facecolor": PAPER,
    })  # fmt: skip
    figure, axes = plt.subplot_mosaic(
        [["tradeoff", "pixels"], ["run", "generated"]], figsize=(9.6, 6.6), width_ratios=[1.75, 1],
        layout="constrained",
    )  # fmt: skip
    draw_tradeoff(axes["tradeoff"], runs)
    draw_run(axes["run"], shown, events)
    draw_pixels(axes["pixels"], shown)
    draw_generated(axes["generated"], events)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
