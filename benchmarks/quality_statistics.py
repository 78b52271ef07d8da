"""Rows of the quality benchmark -> means, intervals, and differences within pairs of a seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from scipy.stats import t as student

Row = dict[str, Any]
Values = dict[int, float]
"""Seed -> accuracy in percent, or whatever else a row says."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float
    seeds: int

    @property
    def below_zero(self) -> bool:
        """Whether the interval lies below 0; one seed shows nothing."""
        return self.mean + self.half < 0

    @property
    def above_zero(self) -> bool:
        """Whether the interval lies above 0."""
        return self.mean - self.half > 0


@cache
def _factor(seeds: int) -> float:
    return float(student.ppf(0.975, seeds - 1))


def estimate(values: Iterable[float]) -> Estimate:
    """Return mean and interval; of one value the interval is unknown and counts as unlimited.

    Example:
        >>> found = estimate([90.0, 92.0])
        >>> found.mean, round(found.half, 1)
        (91.0, 12.7)
    """
    numbers = list(values)
    if len(numbers) < 2:
        return Estimate(numbers[0], math.inf, 1)
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return Estimate(statistics.fmean(numbers), _factor(len(numbers)) * error, len(numbers))


def difference(a: Values, b: Values) -> Estimate | None:
    """Return ``a - b`` over the seeds that both have; None if there are none.

    Both started from the same dense network, so what that seed's network is worth cancels.
    """
    shared = sorted(a.keys() & b.keys())
    return estimate(a[seed] - b[seed] for seed in shared) if shared else None


@dataclass(frozen=True)
class Table:
    """All rows of one family on one network."""

    accuracies: dict[str, dict[float, Values]]
    dense: dict[str, dict[float, Values]]
    seconds: dict[str, list[float]]
    reached: dict[str, dict[float, Values]]
    rates: dict[str, float]
    parameters: dict[float, set[int]]
    """Sparsity -> how many parameters are left; of the structured arms only."""

    @classmethod
    def of(cls, rows: Iterable[Row], family: str, network: str) -> Table:
        """Gather the rows by arm and sparsity."""
        table = cls({}, {}, {}, {}, {}, {})
        for row in rows:
            if (row["family"], row["network"]) != (family, network):
                continue
            arm, share, seed = row["arm"], row["sparsity"], row["seed"]
            for part, kind in (
                (table.accuracies, "accuracy"),
                (table.dense, "dense"),
                (table.reached, "reached"),
            ):
                part.setdefault(arm, {}).setdefault(share, {})[seed] = row[kind]
            table.seconds.setdefault(arm, []).append(row["seconds"])
            if "lr" in row:
                table.rates[arm] = row["lr"]
            if "parameters" in row:
                table.parameters.setdefault(share, set()).add(row["parameters"])
        return table

    @property
    def shares(self) -> list[float]:
        """The sparsities that any arm has."""
        return sorted({share for cells in self.accuracies.values() for share in cells})

    def best(self, share: float) -> str:
        """Return the arm with the largest mean, of those with the most seeds at ``share``."""
        cells = {arm: c[share] for arm, c in self.accuracies.items() if share in c}
        most = max(len(values) for values in cells.values())
        complete = {arm: v for arm, v in cells.items() if len(v) == most}
        return max(complete, key=lambda arm: statistics.fmean(complete[arm].values()))

    def dense_values(self) -> Values:
        """Return the dense networks' accuracies by seed."""
        cells = (cell for by_share in self.dense.values() for cell in by_share.values())
        return {seed: value for cell in cells for seed, value in cell.items()}

    def against(self, arm: str, share: float, other: str) -> Estimate | None:
        """Return the paired difference of an arm to another, or to ``"dense"``."""
        mine = self.accuracies.get(arm, {}).get(share, {})
        theirs: Mapping[float, Values] = (
            self.dense.get(arm, {}) if other == "dense" else self.accuracies.get(other, {})
        )
        return difference(mine, theirs.get(share, {}))
