"""What a refit has done, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RefitReport:
    """Which parameters were corrected and which were left as they were.

    Args:
        refitted: Full names of the pruned parameters whose survivors have new values.
        left: Name -> why its survivors have kept their values.
        error_before: Mean divergence from the dense network over the samples checked on, nats a
            sample (squared error for the Gaussian likelihood), before a refit to the outputs; NaN
            for one by layers.
        error_after: The same after it; never larger.
    """

    refitted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    error_before: float = float("nan")
    error_after: float = float("nan")
