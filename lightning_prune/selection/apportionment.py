"""How many weights each parameter gives when every one is asked for the same share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def apportion(
    sizes: Sequence[int], share: float, lower: Sequence[int], upper: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Round ``share`` of each size so that the sum is ``round(share * total)`` exactly.

    Each gets ``floor(share * size)``, and those with the largest remainders one more. Where that is
    outside the bounds of one, all others move to another common share that makes up for it.

    Args:
        sizes: The number of weights of each parameter.
        share: The share that is asked for, in [0, 1).
        lower: What is gone already, of each.
        upper: What may be gone at most, of each; ``lower <= upper <= sizes``.

    Returns:
        The number of weights to be gone of each; the places of those that would have to give more
        but for their upper bound. The sum is as near to exact as the bounds allow.

    Source: Hamilton's method (largest remainder) of apportioning seats.

    Example:
        >>> apportion([3, 3, 4], 0.5, lower=[0, 0, 0], upper=[2, 2, 3])
        ([2, 1, 2], [])
        >>> apportion([1, 9], 0.8, lower=[0, 0], upper=[0, 8])
        ([0, 8], [0])
    """
    wanted = max(round(share * sum(sizes)), sum(lower))
    if wanted == sum(lower):
        return list(lower), []

    def parts(level: float) -> list[float]:
        bounds = zip(sizes, lower, upper, strict=True)
        return [min(max(level * size, least), most) for size, least, most in bounds]

    level = share
    if parts(share) != [share * size for size in sizes]:
        level = _lowest(lambda level: sum(parts(level)) >= wanted)
    exact = parts(level)
    quotas = [math.floor(part) for part in exact]
    left = min(wanted, sum(upper)) - sum(quotas)
    by_remainder = sorted(range(len(sizes)), key=lambda i: quotas[i] - exact[i])
    while left > 0:  # one pass is enough unless bounds leave no room
        for i in by_remainder:
            if left > 0 and quotas[i] < upper[i]:
                quotas[i] += 1
                left -= 1
    return quotas, [i for i, size in enumerate(sizes) if upper[i] < round(level * size)]


def _lowest(reached: Callable[[float], bool]) -> float:
    """Return the lowest number in [0, 1] from which on ``reached`` is true; 1 if it never is."""
    low, high = 0.0, 1.0
    for _ in range(60):  # as fine as a float64 in [0.5, 1] gets
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
