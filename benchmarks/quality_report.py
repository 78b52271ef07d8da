"""Write docs/quality.md and its curves from the rows of the quality benchmark.

    python benchmarks/quality_report.py

Nothing on the page comes from anywhere else. Run it at any time: it shows what there is.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import quality_arms as arms
from benchmarks.quality import ROWS, read_rows, units
from benchmarks.quality_curves import SHOWN, TITLES, draw
from benchmarks.quality_networks import SUBJECTS
from benchmarks.quality_statistics import Estimate, Row, Table, estimate

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).parent / "quality_page.md"
LABELS = {
    "random": "random",
    "magnitude-layer": "\\|w\\| per layer",
    "magnitude-global": "\\|w\\| global",
    "snip": "\\|w g\\|",
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
    "recipe-one-shot": "recipe in one shot",
    "recipe-no-batch-norm": "recipe without batch norm's new statistics",
    "recipe-obs": "recipe by OBS",
    "recipe-taylor": "recipe by w² R",
    "recipe-fisher": "recipe by w² Fisher",
    "unit-magnitude": "\\|w\\|, units",
    "unit-taylor": "w² R, units",
    "torch-pruning-magnitude": "torch-pruning, magnitude",
    "torch-pruning-taylor": "torch-pruning, Taylor",
}
REFERENCES = {
    "no-retraining": ("dense", "magnitude-global", "taylor"),
    "fine-tuned": ("dense", "ModelPruning", "ModelPruning-same", "taylor"),
    "structured": ("dense", "torch-pruning-magnitude", "torch-pruning-taylor"),
}
TARGETS = (
    # family, network, arm, compared with, sparsity, at least
    *(("no-retraining", "784-40-20-10", arm, None, s, goal)
      for arm in ("obs+outputs", "obs+outputs+shifts")
      for s, goal in ((0.9, 94.0), (0.95, 93.0), (0.98, 91.0))),
    *(("fine-tuned", "784-128-10", "recipe", "dense", s, goal)
      for s, goal in ((0.95, -0.3), (0.98, -1.0), (0.99, -2.5))),
    *(("fine-tuned", "784-128-10", "recipe", "ModelPruning", s, goal)
      for s, goal in ((0.95, 0.5), (0.98, 3.0), (0.99, 8.0))),
    ("fine-tuned", "LeNet-300-100", "recipe", "dense", 0.95, -0.3),
    ("fine-tuned", "LeNet-300-100", "recipe", "dense", 0.985, -1.0),
)  # fmt: skip
"""What was to be reached, written down before the runs."""


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


def accuracy_table(table: Table, family: str) -> str:
    """Return all cells of a family on one network."""
    best = {share: table.best(share) for share in table.shares}
    most = max(len(v) for cells in table.accuracies.values() for v in cells.values())
    lines = []
    for arm in sorted(table.accuracies, key=order):
        line = [label(arm)]
        for share in table.shares:
            values = table.accuracies[arm].get(share)
            text = cell(estimate(values.values()) if values else None, most=most)
            if values and arm == best[share]:
                text = f"**{text}**"
            elif values and (gap := table.against(arm, share, best[share])) and gap.below_zero:
                text += " ▽"
            line.append(text)
        # Of a path the last row has the time of all of it.
        cost = max if family == "no-retraining" else statistics.fmean
        line.append(f"{cost(table.seconds[arm]):.1f}")
        if family != "no-retraining":
            line.append(f"{table.rates[arm]:g}" if arm in table.rates else "")
        lines.append(line)
    head = ["arm", *map(percent, table.shares), "seconds"]
    return markdown(head if family == "no-retraining" else [*head, "rate"], lines)


def difference_table(table: Table, other: str) -> str:
    """Return the paired differences of all arms to one of them, or to the dense network."""
    lines = []
    for arm in sorted(table.accuracies, key=order):
        found = [table.against(arm, share, other) for share in table.shares]
        if arm != other and any(found):
            cells = [cell(e, sign=True) + mark(e) for e in found]
            lines.append([label(arm), *cells])
    return markdown(["arm", *map(percent, table.shares)], lines)


def folded(title: str, text: str) -> str:
    """Return a part of the page that opens on a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def off_target(table: Table) -> str:
    """Return a line on arms that did not reach the sparsity of their column."""
    found = []
    for arm, cells in table.reached.items():
        gap = max(abs(v - share) for share, values in cells.items() for v in values.values())
        if gap > 1e-3:
            found.append(f"{label(arm)} (by up to {100 * gap:.2f} points)")
    return f"Sparsity missed: {', '.join(found)}.\n" if found else ""


def unmeasured(table: Table, network: str, family: str) -> str:
    """Return a line on arms without any row."""
    planned = {unit.arm for unit in units([network], 1, [family], ["*"])}
    gaps = sorted(planned - set(table.accuracies), key=order)
    return f"Not measured: {', '.join(map(label, gaps))}.\n" if gaps else ""


def sizes(table: Table, network: str) -> str:
    """Return a line on what the structured arms leave; the same number for all, or all numbers."""
    full = sum(parameter.numel() for parameter in SUBJECTS[network].build().parameters())
    parts = []
    for share, left in sorted(table.parameters.items()):
        cells = [arm[share] for arm in table.reached.values() if share in arm]
        gone = sorted({round(100 * value, 1) for values in cells for value in values.values()})
        numbers = " or ".join(f"{number:,}" for number in sorted(left))
        shares = " or ".join(f"{value:g}" for value in gone)
        parts.append(f"{percent(share)}: {shares} % of the hidden units gone, {numbers} left")
    return f"Parameters, {full:,} in the dense network: {'; '.join(parts)}.\n"


def section(tables: dict[str, Table], network: str, images: Path) -> str:
    """Return a network's part of the page, and draw its curves."""
    picture = images / f"quality-{network}.png"
    text = [f"## {network}\n"]
    if any(tables[family].accuracies for family in SHOWN):
        draw(tables, network, picture)
        text.append(f"![Accuracy against weights kept, {network}](images/{picture.name})\n")
    for family, title in TITLES.items():
        table = tables[family]
        if not table.accuracies:
            if next(units([network], 1, [family], ["*"]), None):
                text.append(f"### {network}: {title.lower()}\n\nNot measured.\n")
            continue
        seeds = len(table.dense_values())
        dense = cell(estimate(table.dense_values().values()))
        text += [f"### {network}: {title.lower()}\n", f"Dense: {dense}, {seeds} seeds.\n"]
        note = sizes(table, network) if table.parameters else off_target(table)
        text += [accuracy_table(table, family) + "\n", note, unmeasured(table, network, family)]
        for other in REFERENCES[family]:
            if other == "dense" or other in table.accuracies:
                name = "the dense network" if other == "dense" else label(other).replace("\\", "")
                heading = f"Paired differences to {name}"
                text.append(folded(heading, difference_table(table, other)) + "\n")
    return "\n".join(part for part in text if part)


def targets(table_of: Callable[[str, str], Table]) -> str:
    """Return what was to be reached beside what was."""
    lines = []
    for family, network, arm, other, share, goal in TARGETS:
        table = table_of(family, network)
        if other is None:
            values = table.accuracies.get(arm, {}).get(share)
            found = estimate(values.values()) if values else None
        else:
            found = table.against(arm, share, other)
        what = f"points to {'dense' if other == 'dense' else label(other)}" if other else "accuracy"
        verdict = "not measured"
        if found:
            verdict = "reached" if found.mean >= goal else "**not reached**"
        named = [f"{network}, {label(arm)}, {TITLES[family].lower()}: {what}", percent(share)]
        shown = f"{goal:+g}" if other else f"{goal:g}"
        lines.append([*named, shown, cell(found, sign=bool(other)), verdict])
    return "## What was to be reached\n\n" + markdown(
        ["", "sparsity", "at least", "found", ""], lines
    )


def parts_of_the_recipe(tables: dict[str, Table]) -> str:
    """Return what changes when a part of the recipe is other than by default, network by network.

    Args:
        tables: Those of the fine-tuned arms, by network.
    """
    lines = []
    for network, table in tables.items():
        for arm in sorted((a for a in table.accuracies if a.startswith("recipe-")), key=order):
            found = [table.against(arm, share, "recipe") for share in arms.TARGETS]
            cells = [cell(e, sign=True) + mark(e) for e in found]
            lines.append([f"{network}: {label(arm)}", *cells])
    return markdown(["", *map(percent, arms.TARGETS)], lines)


def above_the_recipe(tables: dict[str, Table]) -> str:
    """Return the arms that are better than the recipe by an interval that excludes 0."""
    lines = []
    for network, table in tables.items():
        line = [network]
        for share in arms.TARGETS:
            found = {arm: table.against(arm, share, "recipe") for arm in table.accuracies}
            sure = {arm: gap for arm, gap in found.items() if gap and gap.above_zero}
            ordered = sorted(sure, key=lambda arm: -sure[arm].mean)
            line.append("; ".join(f"{label(arm)} {cell(sure[arm], sign=True)}" for arm in ordered))
        lines.append(line)
    return markdown(["", *map(percent, arms.TARGETS)], lines)


def write(rows: Iterable[Row], page: Path) -> None:
    """Write the page and, beside it, its pictures."""
    rows = list(rows)
    tables = {n: {f: Table.of(rows, f, n) for f in TITLES} for n in SUBJECTS}
    measured = [n for n in SUBJECTS if any(t.accuracies for t in tables[n].values())]
    tuned = {n: tables[n]["fine-tuned"] for n in measured if tables[n]["fine-tuned"].accuracies}
    parts = {
        "count": f"{len(rows):,}",
        "recipe_parts": parts_of_the_recipe(tuned),
        "recipe_losses": above_the_recipe(tuned),
        "targets": targets(lambda family, network: tables[network][family]),
        "networks": "\n".join(section(tables[n], n, page.parent / "images") for n in measured),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(Template(PAGE.read_text()).substitute(parts).rstrip() + "\n")


def main() -> None:
    """Read the options and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    options = parser.parse_args()
    rows = read_rows(options.rows).values()
    write(rows, options.page)
    print(f"{options.page}: {len(rows)} rows")


if __name__ == "__main__":
    main()
