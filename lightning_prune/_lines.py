"""Reasons as lines of a report."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = 4
"""No more names than this are shown for a reason."""


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Return one line a reason: a deep network has hundreds of names, and few reasons.

    Args:
        reasons: Name -> reason.

    Example:
        >>> by_reason({"0.bias": "a bias", "1.weight": "part of a norm", "1.bias": "a bias"})
        ['a bias: 0.bias, 1.bias', 'part of a norm: 1.weight']
        >>> by_reason({f"layers.{i}.bias": "a bias" for i in range(7)})
        ['a bias: layers.0.bias, layers.1.bias, layers.2.bias, layers.3.bias and 3 more']
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [
        f"{reason}: {', '.join(some[:SHOWN])}"
        + (f" and {len(some) - SHOWN} more" if len(some) > SHOWN else "")
        for reason, some in names.items()
    ]
