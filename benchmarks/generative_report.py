"""Write docs/generative.md from the rows of the generative benchmark.

    python benchmarks/generative.py --report

Nothing on the page comes from anywhere else. Run it at any time: it shows what there is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template

from benchmarks.generative import RATES, REAL, SEEDS, SPARSITIES, family
from benchmarks.generative_arms import ARMS, DISTILLATION, NETWORK
from benchmarks.quality import Row
from benchmarks.quality_report import cell, folded, mark, markdown, percent
from benchmarks.quality_statistics import Estimate, Table, estimate

PAGE = Path(__file__).resolve().parents[1] / "docs" / "generative.md"
TEMPLATE = Path(__file__).parent / "generative_page.md"
LABELS = {
    "real": "real",
    "real-equal": "real, equal steps",
    "real-distill": "distillation, real",
    "noise": "distillation, noise",
    "shifts": "distillation, shifts",
    "train": "distillation, generated",
    "train-batch": "batch, generated",
    "score": "score, generated",
    "both": "score + distillation, generated",
    "selected": "the same, selected",
    "adaptive": "the same, adaptive",
    "adaptive-equal": "the same, adaptive, as many batches",
}
"""In the order of the tables."""

ENOUGH = 3  # seeds; with fewer an interval says nothing, and "no loss" would be had for nothing
REGIMES = {"pretrained": "Pretrained", "scratch": "From scratch"}
GENERATED = tuple(arm for arm in LABELS if ARMS[arm].second == "vae")
TARGETS = (
    # regime, digits, arm, sparsities, points to its control, whether the interval has to exclude 0
    ("pretrained", 100, "adaptive", (0.98,), 2.0, True),
    ("pretrained", 200, "adaptive", (0.98,), 2.0, True),
    ("pretrained", 4000, "adaptive", SPARSITIES, -0.2, False),
    ("pretrained", 4000, "adaptive-equal", SPARSITIES, -0.2, False),
    *(("pretrained", n, "score", SPARSITIES, None, False) for n in REAL),
)
"""What was to be reached, written down before the runs. None: the interval is not below 0."""


def control(arm: str) -> str:
    """Return what an arm is compared with: as many steps, or as many batches."""
    return "real" if arm == "score" else "real-equal"


def cells(table: Table) -> Iterator[tuple[str, float, Estimate]]:
    """Yield (arm, sparsity, difference to its control) of all cells that have one."""
    for arm in LABELS:
        for share in SPARSITIES:
            found = table.against(arm, share, control(arm))
            if found is not None and arm != control(arm):
                yield arm, share, found


def differences(table: Table, against: dict[str, str]) -> str:
    """Return the paired differences of arms to others (arm -> other), in points."""
    lines = []
    for arm, other in against.items():
        found = [table.against(arm, share, other) for share in SPARSITIES]
        if arm != other and any(found):
            shown = [cell(e, sign=True, most=SEEDS) + mark(e) for e in found]
            lines.append([LABELS[arm], LABELS[other], *shown])
    return markdown(["arm", "minus", *map(percent, SPARSITIES)], lines)


def accuracies(table: Table) -> str:
    """Return the mean accuracy of all cells, and the seconds of a run."""
    lines = []
    for arm, name in LABELS.items():
        if arm not in table.accuracies:
            continue
        found = [table.accuracies[arm].get(share) for share in SPARSITIES]
        shown = [cell(estimate(v.values()), most=SEEDS) if v else "" for v in found]
        rate = f"{table.rates[arm]:g}"
        lines.append([name, *shown, f"{statistics.fmean(table.all_seconds(arm)):.1f}", rate])
    return markdown(["accuracy", *map(percent, SPARSITIES), "seconds", "rate"], lines)


def section(table: Table, title: str) -> str:
    """Return what there is of one regime and one number of digits."""
    dense = cell(estimate(table.dense_values().values()))
    return "\n\n".join(
        [
            f"### {title}",
            f"Dense: {dense}, {len(table.dense_values())} seeds. Points to the control:",
            differences(table, {arm: control(arm) for arm in LABELS}),
            # What do samples add to a distillation that real digits would do for as well?
            folded(
                "Generated, against copies of the real digits",
                differences(table, dict.fromkeys(GENERATED, "real-distill"))
                + "\n\n"
                + differences(table, dict.fromkeys(GENERATED, "shifts")),
            ),
            accuracies(table),
        ]
    )


def targets(tables: dict[tuple[str, int], Table]) -> str:
    """Return what was to be reached beside what was."""
    lines = []
    for regime, n, arm, shares, goal, sure in TARGETS:
        for share in shares:
            found = tables[regime, n].against(arm, share, control(arm))
            verdict = "not measured"
            if found and found.seeds < ENOUGH:
                verdict = "open"
            elif found:
                enough = not found.below_zero if goal is None else found.mean >= goal
                enough &= found.above_zero or not sure
                verdict = "reached" if enough else "**not reached**"
            named = [f"{n:,} digits, {LABELS[arm]}", percent(share)]
            asked = "no loss" if goal is None else f"{goal:+g}"
            lines.append([*named, asked, cell(found, sign=True, most=SEEDS), verdict])
    return "## What was to be reached\n\n" + markdown(
        ["points to the control", "sparsity", "at least", "found", ""], lines
    )


def losing(tables: dict[tuple[str, int], Table]) -> str:
    """Return every cell whose interval lies below 0."""
    lines = [
        [LABELS[arm], REGIMES[regime].lower(), f"{n:,}", percent(share), cell(found, sign=True)]
        for (regime, n), table in tables.items()
        for arm, share, found in cells(table)
        if found.below_zero
    ]
    head = ["arm", "dense network", "digits", "sparsity", "points to the control"]
    text = markdown(head, lines) if lines else "None so far."
    return f"## Where it surely loses\n\n{text}"


def write(rows: Iterable[Row], page: Path) -> None:
    """Write the page."""
    rows = list(rows)
    keys = [(regime, n) for regime in REGIMES for n in REAL]
    tables = {k: Table.of(rows, family(*k), NETWORK) for k in keys}
    sections = []
    for regime, title in REGIMES.items():
        shown = [(n, tables[regime, n]) for n in REAL if tables[regime, n].accuracies]
        if shown:
            sections.append(f"## {title}")
            sections += [section(table, f"{title}, {n:,} real digits") for n, table in shown]
    parts = {
        "count": f"{sum(row['family'] != 'tuning' for row in rows):,}",
        "rates": ", ".join(f"{rate:g}" for rate in RATES),
        "distillation": f"{DISTILLATION.weight:g} and {DISTILLATION.temperature:g}",
        "targets": targets(tables),
        "losing": losing(tables),
        "sections": "\n\n".join(sections),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(Template(TEMPLATE.read_text()).substitute(parts).rstrip() + "\n")
