"""Write docs/quality.md and its curves from the rows of the quality benchmark.

    python benchmarks/quality_report.py

Nothing on the page comes from anywhere else. Run it at any time: it shows what there is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import quality_arms as arms
from benchmarks import quality_structured as units_removed
from benchmarks.quality import ROWS, read_rows, units
from benchmarks.quality_curves import SHOWN, TITLES, draw
from benchmarks.quality_networks import SUBJECTS
from benchmarks.quality_statistics import NO_PRUNING, Estimate, Row, Table, difference, estimate
from benchmarks.quality_wording import cell, label, mark, markdown, name_of, order, percent

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).parent / "quality_page.md"
REFERENCES = {
    "no-retraining": ("dense", "magnitude-global", "taylor"),
    "fine-tuned": ("dense", NO_PRUNING, "ModelPruning", "ModelPruning-same", "taylor"),
    "structured": ("dense", "torch-pruning-magnitude", "torch-pruning-taylor"),
}
TARGETS = (
    # family, network, arm, compared with, sparsity, at least
    *(("no-retraining", "784-40-20-10", arm, None, s, goal)
      for arm in ("obs+outputs", "obs+outputs+shifts")
      for s, goal in ((0.9, 94.0), (0.95, 93.0), (0.98, 91.0))),
    *(("fine-tuned", "784-128-10", "recipe", other, s, goal)
      for other in ("dense", NO_PRUNING)
      for s, goal in ((0.95, -0.3), (0.98, -1.0), (0.99, -2.5))),
    *(("fine-tuned", "784-128-10", "recipe", other, s, goal)
      for other in ("ModelPruning", "ModelPruning-same")
      for s, goal in ((0.95, 0.5), (0.98, 3.0), (0.99, 8.0))),
    *(("fine-tuned", "LeNet-300-100", "recipe", other, s, goal)
      for other in ("dense", NO_PRUNING)
      for s, goal in ((0.95, -0.3), (0.985, -1.0))),
)  # fmt: skip
"""What was to be reached. The goals are of before all runs; the arms that are held to them without
retraining, and the comparisons with the dense network trained on and with ModelPruning by our
schedule, were added later."""


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
        line.append(f"{table.cost(arm, path=family == 'no-retraining'):.1f}")
        if family != "no-retraining":
            line.append(f"{table.rates[arm]:g}" if arm in table.rates else "")
        lines.append(line)
    head = ["arm", *map(percent, table.shares), "seconds"]
    return markdown(head if family == "no-retraining" else [*head, "rate"], lines)


def difference_table(table: Table, other: str) -> str:
    """Return the paired differences of all arms to one of them, or to the dense networks."""
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
    """Return a line on arms without any row, and on those with fewer seeds than others."""
    planned = {unit.arm for unit in units([network], 1, [family], ["*"])} - {NO_PRUNING}
    gaps = sorted(planned - set(table.accuracies), key=order)
    text = f"Not measured: {', '.join(map(label, gaps))}." if gaps else ""
    seeds = {arm: min(map(len, cells.values())) for arm, cells in table.accuracies.items()}
    fewer = sorted((arm for arm in seeds if seeds[arm] < max(seeds.values())), key=order)
    if fewer:
        named = ", ".join(f"{label(arm)} ({seeds[arm]})" for arm in fewer)
        text += f" Fewer than {max(seeds.values())} seeds: {named}."
    return text + "\n" if text else ""


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


def dense_line(table: Table) -> str:
    """Return a line on the dense networks."""
    dense = table.dense_values()
    text = f"Dense: {cell(estimate(dense.values()))}, {len({seed for seed, _ in dense})} seeds"
    if table.trained_on:
        rate = table.rates[NO_PRUNING]
        on = cell(estimate(table.trained_on.values()))
        text += f"; after 12 more epochs with nothing removed {on} (rate {rate:g})"
    return f"{text}.\n"


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
        text += [f"### {network}: {title.lower()}\n", dense_line(table)]
        note = sizes(table, network) if table.parameters else off_target(table)
        text += [accuracy_table(table, family) + "\n", note, unmeasured(table, network, family)]
        for other in REFERENCES[family]:
            differences = difference_table(table, other)
            if differences.count("\n") > 1:
                heading = f"Paired differences to {name_of(other)}".replace("\\", "")
                text.append(folded(heading, differences) + "\n")
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
        what = f"points to {name_of(other)}" if other else "accuracy"
        verdict = "not measured"
        if found:
            sure = found.above_zero if str(other).startswith("ModelPruning") else True
            verdict = "reached" if found.mean >= goal and sure else "**not reached**"
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
        measured = {arm: arm for arm in table.accuracies if arm.startswith("recipe-")}
        if not SUBJECTS[network].batch_norm:
            same = {a: plain for a, plain in arms.RECIPE_BY.items() if plain in table.accuracies}
            measured = same | measured
        for arm in sorted(measured, key=order):
            by = measured[arm]
            found = [table.against(by, share, "recipe") for share in arms.TARGETS]
            cells = [cell(e, sign=True) + mark(e) for e in found]
            rates = [f"{table.rates[a]:g}" if a in table.rates else "" for a in (by, "recipe")]
            lines.append([f"{network}: {label(arm)}", *cells, " / ".join(rates)])
    return markdown(["", *map(percent, arms.TARGETS), "rate / recipe's"], lines)


def above_the_recipe(tables: dict[str, dict[str, Table]]) -> tuple[str, int]:
    """Return the arms that are better than the recipe by an interval that excludes 0.

    Args:
        tables: Network -> family -> table.

    Returns:
        The table, and of how many comparisons these are the outcome.
    """
    lines, count = [], 0
    for network, families in tables.items():
        recipe = families["fine-tuned"].accuracies.get("recipe", {})
        line = [network]
        for share in arms.TARGETS:
            found: dict[str, Estimate] = {}
            for family in ("fine-tuned", "no-retraining"):
                after = "" if family == "fine-tuned" else ", no retraining"
                for arm, cells in families[family].accuracies.items():
                    gap = difference(cells.get(share, {}), recipe.get(share, {}))
                    if gap and arm != "recipe":
                        found[label(arm) + after] = gap
            count += len(found)
            sure = {arm: gap for arm, gap in found.items() if gap.above_zero}
            ordered = sorted(sure, key=lambda arm: -sure[arm].mean)
            line.append("; ".join(f"{arm} {cell(sure[arm], sign=True)}" for arm in ordered))
        lines.append(line)
    return markdown(["", *map(percent, arms.TARGETS)], lines), count


def units_lost(tables: dict[str, Table]) -> str:
    """Return by how much each structured arm of ours differs from torch-pruning's better one.

    Args:
        tables: Those of the structured arms, by network.
    """
    lines = []
    for network, table in tables.items():
        for arm in (a for a in units_removed.CRITERIA if a in table.accuracies):
            line = [f"{network}: {label(arm)}"]
            for share in units_removed.SHARES:
                found = [table.against(arm, share, other) for other in units_removed.IMPORTANCES]
                worst = min((e for e in found if e), key=lambda e: e.mean, default=None)
                line.append(cell(worst, sign=True) + mark(worst))
            lines.append(line)
    return markdown(["", *map(percent, units_removed.SHARES)], lines)


def write(rows: Iterable[Row], page: Path) -> None:
    """Write the page and, beside it, its pictures.

    Args:
        rows: What was measured.
        page: The file.
    """
    rows = list(rows)
    tables = {n: {f: Table.of(rows, f, n) for f in TITLES} for n in SUBJECTS}
    measured = [n for n in SUBJECTS if any(t.accuracies for t in tables[n].values())]
    by_family = {f: {n: tables[n][f] for n in measured if tables[n][f].accuracies} for f in TITLES}
    tuned = by_family["fine-tuned"]
    losses, count = above_the_recipe({n: tables[n] for n in tuned})
    parts = {
        "count": f"{len(rows):,}",
        "recipe_parts": parts_of_the_recipe(tuned),
        "recipe_losses": losses,
        "comparisons": f"{count:,}",
        "by_chance": f"{count / 40:.0f}",
        "units_lost": units_lost(by_family["structured"]),
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
