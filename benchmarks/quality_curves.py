"""The curves of the quality benchmark: accuracy against the share of weights kept."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.quality_statistics import Table, estimate

INK, QUIET = "#1c1917", "#a8a29e"
SHOWN = {
    "no-retraining": {
        "random": ("random", QUIET, ":"),
        "saliency": ("R", "#0e7490", ":"),
        "magnitude-global": ("|w|", "#334155", "-"),
        "taylor": ("w² R", "#c2410c", "--"),
        "taylor+layers": ("w² R + layers", "#c2410c", "-"),
        "obs+layers": ("OBS + layers", "#7c3aed", "--"),
        "obs+outputs": ("OBS + outputs", "#7c3aed", "-"),
        "obs+outputs+shifts": ("OBS + outputs + shifts", "#be185d", "-"),
    },
    "fine-tuned": {
        "random": ("random", QUIET, ":"),
        "ModelPruning": ("Lightning's ModelPruning", "#0e7490", "-"),
        "ModelPruning-same": ("the same, our schedule", "#0e7490", "--"),
        "magnitude-global": ("|w|", "#334155", "-"),
        "taylor": ("w² R", "#c2410c", "--"),
        "recipe": ("recipe", "#c2410c", "-"),
        "obs+outputs+first": ("OBS + outputs first", "#7c3aed", "-"),
    },
}
"""What is drawn; two points of the structured arms make no curve."""

TITLES = {
    "no-retraining": "No retraining",
    "fine-tuned": "12 epochs of training",
    "structured": "Whole units, 12 epochs of training",
}


def draw(tables: dict[str, Table], network: str, file: Path) -> None:
    """Draw one panel a family; intervals are bars, and the dense network is a line."""
    families = [family for family in SHOWN if tables[family].accuracies]
    plt.rcParams.update({
        "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": QUIET,
        "text.color": INK, "legend.frameon": False, "legend.fontsize": 7.5,
    })  # fmt: skip
    figure, panels = plt.subplots(
        1, len(families), figsize=(4.8 * len(families), 4.1), layout="constrained", squeeze=False
    )
    for axes, family in zip(panels[0], families, strict=True):
        _panel(axes, tables[family], family)
        axes.set_title(f"{network}: {TITLES[family].lower()}")
    panels[0][0].set_ylabel("accuracy on the test digits, %")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _panel(axes: Axes, table: Table, family: str) -> None:
    dense = estimate(table.dense_values().values()).mean
    lines = {"dense": (dense, "-")}
    if table.trained_on:
        lines["dense, trained on"] = (estimate(table.trained_on.values()).mean, "--")
    for label, (height, style) in lines.items():
        axes.axhline(height, color=QUIET, lw=0.8, ls=style, label=label)
    shown = [arm for arm in SHOWN[family] if arm in table.accuracies]
    for arm in shown:
        label, color, style = SHOWN[family][arm]
        points = sorted(table.accuracies[arm].items())
        found = [estimate(values.values()) for _, values in points]
        axes.errorbar(
            [100 * (1 - share) for share, _ in points],
            [e.mean for e in found],
            [e.half if math.isfinite(e.half) else 0.0 for e in found],
            color=color, ls=style, lw=1.4, marker="o", ms=2.5, elinewidth=0.8, capsize=2,
            label=label,
        )  # fmt: skip
    kept = [100 * (1 - share) for share in table.shares]
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{k:.3g}" for k in kept])
    axes.set_xlabel("weights kept, %")
    axes.grid(axis="y", color="#e7e5e4", lw=0.6)
    # Where the good ones differ; the lost ones leave the picture and are in the table.
    best = max(e for arm in shown for e in map(_top, table.accuracies[arm].values()))
    bottom = max(0.0, dense - (45 if family == "no-retraining" else 20))
    top = max(best, *(height for height, _ in lines.values()))
    axes.set_ylim(bottom, min(100.0, top) + 0.5)
    # Below, not in the panel: the weak arms fall through its empty corner.
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.47, -0.17), ncols=3, columnspacing=1, handlelength=1.7
    )


def _top(values: dict[int, float]) -> float:
    """Return the upper end of what is drawn for a cell."""
    found = estimate(values.values())
    return found.mean + (found.half if math.isfinite(found.half) else 0.0)
