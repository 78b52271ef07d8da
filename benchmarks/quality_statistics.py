"""Rows of the quality benchmark -> means, intervals, and differences within pairs of a seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from scipy.stats import t as student

Row = dict[str, Any]
Start = tuple[int, str]
"""A seed, and the fingerprint of its dense network: what makes two rows a pair."""
Values = dict[Start, float]
"""Start -> accuracy in percent, or whatever else a row says."""
NO_PRUNING = "no-pruning"
"""The arm that trains as long as the others and removes nothing."""


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
    """Return ``a - b`` over the dense networks that both started from; None if there are none.

    What a seed's network is worth cancels.
    """
    shared = sorted(a.keys() & b.keys())
    return estimate(a[start] - b[start] for start in shared) if shared else None


@dataclass(frozen=True)
class Table:
    """All rows of one family on one network."""

    accuracies: dict[str, dict[float, Values]]
    dense: dict[str, dict[float, Values]]
    trained_on: Values
    """The dense networks after as much training as the arms had, nothing removed."""
    seconds: dict[str, dict[float, Values]]
    reached: dict[str, dict[float, Values]]
    rates: dict[str, float]
    parameters: dict[float, set[int]]
    """Sparsity -> how many parameters are left; of the structured arms only."""

    @classmethod
    def of(cls, rows: Iterable[Row], family: str, network: str) -> Table:
        """Gather the rows by arm and sparsity."""
        table = cls({}, {}, {}, {}, {}, {}, {})
        for row in rows:
            if (row["family"], row["network"]) != (family, network):
                continue
            arm, share = row["arm"], row["sparsity"]
            start = row["seed"], row.get("start", "")
            if arm == NO_PRUNING:
                table.trained_on[start] = row["accuracy"]
                table.rates[arm] = row["lr"]
                continue
            for part, kind in (
                (table.accuracies, "accuracy"),
                (table.dense, "dense"),
                (table.reached, "reached"),
                (table.seconds, "seconds"),
            ):
                part.setdefault(arm, {}).setdefault(share, {})[start] = row[kind]
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
        """Return the dense networks' accuracies."""
        cells = (cell for by_share in self.dense.values() for cell in by_share.values())
        return {start: value for cell in cells for start, value in cell.items()}

    def against(self, arm: str, share: float, other: str) -> Estimate | None:
        """Return the paired difference of an arm to another one.

        The other may be ``"dense"``, or ``"no-pruning"``, the dense network trained on.
        """
        mine = self.accuracies.get(arm, {}).get(share, {})
        if other == "dense":
            return difference(mine, self.dense_values())
        if other == NO_PRUNING:
            return difference(mine, self.trained_on)
        return difference(mine, self.accuracies.get(other, {}).get(share, {}))

    def cost(self, arm: str, *, path: bool) -> float:
        """Return the median seconds of one run: of a path those at its last share."""
        cells = self.seconds[arm]
        return statistics.median(cells[max(cells)].values() if path else self.all_seconds(arm))

    def all_seconds(self, arm: str) -> list[float]:
        """Return the seconds of all runs of an arm."""
        return [value for cell in self.seconds[arm].values() for value in cell.values()]
