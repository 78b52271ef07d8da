"""What a pruning event may be asked for: a share of the weights, or a threshold on their scores.

A schedule names targets and the selection carries them out; the two rooms do not import one
another, so what they hand over lives here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Threshold:
    """Keep the weights whose score is strictly above ``value``, remove the others.

    The published form of saliency pruning: with ``criterion="saliency"`` a weight stays when
    ``R_i > T``. How many weights that leaves depends on the scores, which grow with the number of
    samples they are summed over.

    Args:
        value: The threshold ``T``, finite and >= 0, in the unit of the score (for ``R``:
            probability^2 per weight^2, summed over the samples scored).

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is negative, NaN or infinite.

    Example:
        >>> Threshold(1e-6)
        Threshold(value=1e-06)
    """

    value: float

    def __post_init__(self) -> None:
        """Refuse a threshold that no score can be compared with."""
        value: Any = self.value
        if not is_number(value):
            raise TypeError(
                f"Expected argument `value` of Threshold to be a number, but got {value!r}."
            )
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                "Expected argument `value` of Threshold to be finite and >= 0 (scores are sums of "
                f"squares), but got {value!r}."
            )
        object.__setattr__(self, "value", float(value))


Target: TypeAlias = float | Threshold
"""The share of all prunable weights that is removed by then, in [0, 1), or a :class:`Threshold`."""


def is_epoch(epoch: Any) -> bool:
    """Return whether ``epoch`` is a whole number >= 0 (``True`` and ``2.0`` are not)."""
    return not isinstance(epoch, bool) and isinstance(epoch, Integral) and int(epoch) >= 0


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a real number, of Python's or of NumPy's, and not a bool."""
    return not isinstance(value, bool) and isinstance(value, Real)


def target_fault(target: Any) -> str | None:
    """Say what is wrong with a target, or return ``None`` if it can be used.

    Example:
        >>> target_fault(0.9) is None
        True
        >>> target_fault(90)
        'expected a share in [0, 1) or a Threshold, but got 90 (90 % is written 0.9)'
    """
    if isinstance(target, Threshold):
        return None
    if not is_number(target):
        return f"expected a share in [0, 1) or a Threshold, but got {target!r}"
    if 0 <= target < 1:
        return None
    hint = f" ({target} % is written {float(target) / 100:g})" if 1 < target < 100 else ""
    return f"expected a share in [0, 1) or a Threshold, but got {target!r}{hint}"


def as_target(target: Any) -> Target:
    """Return a faultless target in plain types (a NumPy number, say, becomes a ``float``)."""
    return target if isinstance(target, Threshold) else float(target)


def describe_target(target: Target) -> str:
    """Return a target in few characters.

    Example:
        >>> describe_target(0.5), describe_target(Threshold(1e-6))
        ('50.0 %', '> 1e-06')
    """
    return f"> {target.value:.2g}" if isinstance(target, Threshold) else f"{100 * target:.1f} %"


def target_faults(targets: Mapping[Any, Any]) -> list[str]:
    """List what is wrong with targets that are in the order in which they fall due.

    Args:
        targets: Epoch, or the name of an argument, -> target.

    Example:
        >>> target_faults({2: 0.8, 4: 0.5})
        ['epoch 4: shares must not decrease (a removed weight stays removed), but 0.5 follows 0.8']
    """
    faults: list[str] = []
    highest: float | None = None
    for where, target in targets.items():
        label = f"epoch {where}" if isinstance(where, int) else str(where)
        if (fault := target_fault(target)) is not None:
            faults.append(f"{label}: {fault}")
        elif not isinstance(target, Threshold):
            if highest is not None and target < highest:
                faults.append(
                    f"{label}: shares must not decrease (a removed weight stays removed), but "
                    f"{target} follows {highest}"
                )
            highest = target if highest is None else max(highest, target)
    return faults


def epoch_faults(**epochs: Any) -> list[str]:
    """List the arguments that are no epoch: a whole number >= 0."""
    return [
        f"{name}: expected a whole number >= 0, but got {epoch!r}"
        for name, epoch in epochs.items()
        if not is_epoch(epoch)
    ]


def count_faults(**counts: Any) -> list[str]:
    """List the arguments that are no count: a whole number >= 1."""
    return [
        f"{name}: expected a whole number >= 1, but got {count!r}"
        for name, count in counts.items()
        if not is_epoch(count) or count == 0
    ]


def raise_faults(faults: list[str], of: str = "The schedule") -> None:
    """Raise one ``ValueError`` with all ``faults`` of something; do nothing without any."""
    if faults:
        raise ValueError("\n- ".join([f"{of} cannot be used:", *faults]))
