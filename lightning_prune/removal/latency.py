"""How long do calls take, compared fairly?

Enters: callables. Leaves: seconds for one call of each, as medians and quartiles. All are measured
in the same rounds, one after the other and in turned order, so that a machine that slows down or
is busy for a moment slows all of them.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LEAST_SECONDS = 1e-3
"""A measurement repeats the call until it lasts at least this long: a clock reads in steps of some
tens of nanoseconds, and a call of a small layer lasts a few microseconds."""


@dataclass(frozen=True)
class Latency:
    """Seconds for one call, one entry a round.

    Attributes:
        seconds: The rounds' measurements in their order, so that those of two callables that were
            measured together can be compared round by round.

    Example:
        >>> latency = Latency((3.0, 1.0, 2.0, 5.0, 4.0))
        >>> latency.median, latency.quartiles
        (3.0, (2.0, 4.0))
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile over the rounds, in seconds."""
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def ratio(self, reference: Latency) -> float:
        """Return how many times as long as ``reference`` this takes: the median of rounds' ratios.

        Example:
            >>> Latency((1.0, 2.0, 9.0)).ratio(Latency((2.0, 4.0, 4.0)))
            0.5
        """
        pairs = zip(self.seconds, reference.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 21, warm_up: int = 3
) -> dict[str, Latency]:
    """Measure callables in the same rounds and return the latency of each.

    Every other round runs in the opposite order, since what runs second finds other caches than
    what runs first. The garbage collector is off meanwhile. On an accelerator a measurement ends
    when the device has done the work.

    Args:
        calls: What to measure, by name. They run as they are: gradients and mode are the caller's.
        rounds: Measurements of each.
        warm_up: Calls of each that are not counted.

    Raises:
        ValueError: ``rounds`` or ``warm_up`` below 1.

    Example:
        >>> x = torch.ones(50, 50)
        >>> found = interleaved({"one": lambda: x + x, "two": lambda: x @ x}, rounds=3)
        >>> list(found), len(found["one"].seconds)
        (['one', 'two'], 3)
    """
    if rounds < 1 or warm_up < 1:
        raise ValueError(
            "Expected arguments `rounds` and `warm_up` to be at least 1, but got "
            f"{rounds=}, {warm_up=}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with _without_garbage_collection():
        repeats = {name: _repeats(call, warm_up) for name, call in calls.items()}
        for _ in range(rounds):
            for name in order:
                seconds[name].append(_measure(calls[name], repeats[name]))
            order.reverse()
    return {name: Latency(tuple(found)) for name, found in seconds.items()}


def _repeats(call: Callable[[], Any], warm_up: int) -> int:
    shortest = min(_measure(call, 1) for _ in range(warm_up))
    return max(1, math.ceil(LEAST_SECONDS / max(shortest, 1e-9)))


def _measure(call: Callable[[], Any], repeats: int) -> float:
    _wait_for_device()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait_for_device()
    return (time.perf_counter() - start) / repeats


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
