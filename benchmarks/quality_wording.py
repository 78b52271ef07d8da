"""How the pages of the quality benchmark say things: names of arms, cells, marks, tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks import quality_arms as arms
from benchmarks.quality_statistics import NO_PRUNING, Estimate

LABELS = {
    "random": "random",
    "magnitude-layer": "\\|w\\| per layer",
    "magnitude-global": "\\|w\\| global",
    "snip": "\\|w g\\| (SNIP's)",
    "saliency": "R",
    "taylor": "w² R",
    "w2-fisher": "w² Fisher",
    "w2-empirical-fisher": "w² empirical Fisher",
    "obs": "OBS",
    "obc": "OBC",
    "ModelPruning": "ModelPruning",
    "ModelPruning-same": "ModelPruning, our schedule",
    "recipe": "recipe",
    "recipe-distill": "recipe + distillation",
    "recipe-layers": "recipe + layers",
    "recipe-no-decay": "recipe without decay",
    "recipe-one-shot": "recipe, one event in epoch 7",
    "recipe-no-batch-norm": "recipe without batch norm's new statistics",
    "recipe-obs": "recipe by OBS",
    "recipe-taylor": "recipe by w² R",
    "recipe-fisher": "recipe by w² Fisher",
    "unit-magnitude": "\\|w\\|, units",
    "unit-taylor": "w² R, units",
    "torch-pruning-magnitude": "torch-pruning, magnitude",
    "torch-pruning-taylor": "torch-pruning, Taylor",
}


def label(arm: str) -> str:
    """Return how an arm is called on the page."""
    base, *parts = arm.split("+")
    named = {
        "layers": "layers",
        "outputs": "outputs",
        "shifts": "shifts",
        "first": "first",
        "distill": "distillation",
    }
    return " + ".join([LABELS.get(base, base), *(named[part] for part in parts)])


def name_of(arm: str) -> str:
    """Return how what is compared with is called in a sentence."""
    others = {"dense": "the dense network", NO_PRUNING: "the dense network trained on"}
    return others.get(arm, label(arm))


def percent(share: float) -> str:
    """Return a share as it heads a column."""
    return f"{100 * share:g} %"


def cell(found: Estimate | None, *, sign: bool = False, most: int = 0) -> str:
    """Return mean and half width, e.g. ``"93.1 ± 0.4"``."""
    if found is None:
        return ""
    text = f"{found.mean:+.1f}" if sign else f"{found.mean:.1f}"
    text += f" ± {found.half:.1f}" if math.isfinite(found.half) else ""
    return text + (f" <sub>({found.seeds})</sub>" if found.seeds < most else "")


def mark(found: Estimate | None) -> str:
    """Return a sign if the interval of a difference excludes 0."""
    if found is None or not (found.above_zero or found.below_zero):
        return ""
    return " ▲" if found.above_zero else " ▽"


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a table whose first column is text and the rest numbers."""
    head = list(head)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def order(arm: str) -> tuple[int, int, str]:
    """Sort arms: criteria as the package has them, each with its variants; then the others."""
    base = arm.split("+", maxsplit=1)[0]
    known = [*reversed(arms.CRITERIA_NAMES), *LABELS]
    return known.index(base) if base in known else len(known), arm.count("+"), arm
