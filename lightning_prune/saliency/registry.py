"""Torch function -> rule: how one call that takes a parameter yields per-sample gradients of it.

Rules hang on functions (``F.linear``), not on modules: a subclass with its own forward, a module
called twice, a tied or bare parameter and every padding mode all end in the same few functions. A
function without a rule sends its parameters down the generic route
(:mod:`lightning_prune.saliency.rules.generic`): slow and exact, never skipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

CACHE_BYTES = 4 * 2**20
"""Size of the chunks in which per-sample gradients are squared; it fits the processor's cache."""


class Layout(Enum):
    """Where a tensor of N samples keeps them."""

    FIRST = "first"
    """Axis 0 has length N, or N * T where the positions of a sample follow one another."""

    SECOND = "second"
    """Axis 1 has length N, as in sequence-first layers."""

    INTERLEAVED = "interleaved"
    """Axis 0 has length T * N, and the samples of a position follow one another."""

    @property
    def axis(self) -> int:
        """The sample axis after :meth:`split`."""
        return 0 if self is Layout.FIRST else 1

    def split(self, value: Tensor, samples: int) -> Tensor:
        """Return ``value`` with an axis of its own for samples, except for FIRST."""
        return value.reshape(-1, samples, *value.shape[1:]) if self is Layout.INTERLEAVED else value


class Rule(ABC):
    """One captured call: gradient at its output -> its parameters' per-sample gradients.

    Built once a call from its arguments; used for one or more directions, each a gradient of the
    call's output.

    Args:
        arguments: The call's arguments by name.
        samples: N, how many samples the batch holds.
        layout: Where inputs and output keep the samples.
        workspace: Bytes that the rule may use beside its inputs.

    Attributes:
        reused: Whether more than one direction is to come, so that keeping things pays.
    """

    signature: ClassVar[tuple[str, ...]]
    """Names of the function's positional arguments, in order."""

    roles: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """Arguments that may be parameters."""

    inputs: ClassVar[tuple[str, ...]] = ("input",)
    """Arguments that the rule keeps; they must not be changed in place before the backward pass."""

    layouts: ClassVar[tuple[Layout, ...]] = tuple(Layout)
    """Layouts that the rule can read, in the order in which they are tried."""

    def __init__(
        self, arguments: Mapping[str, Any], samples: int, layout: Layout, workspace: int
    ) -> None:
        self.arguments = arguments
        self.samples = samples
        self.layout = layout
        self.workspace = workspace
        self.reused = True

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Tell whether the closed form covers this call.

        If not, the generic route takes its parameters.
        """
        return True

    @abstractmethod
    def per_sample(self, role: str, gradient: Tensor, rows: slice) -> Tensor:
        """Return the gradients of the samples in ``rows``, (rows, *parameter.shape).

        This is for one direction: ``gradient`` is the gradient at the call's output as autograd
        returned it.
        """

    def add(self, gradient: Tensor, totals: Mapping[str, Tensor]) -> None:
        """Add the sum of squared per-sample gradients for one direction to ``totals``.

        The sum is over samples; ``totals`` is by role.
        """
        for role, total in totals.items():
            step = self.chunk(total)
            for start in range(0, self.samples, step):
                square_sum(self.per_sample(role, gradient, slice(start, start + step)), total)

    def finish(self, totals: Mapping[str, Tensor]) -> None:
        """Add what :meth:`add` has put off until all directions were seen."""
        return  # Most rules put nothing off.

    def chunk(self, parameter: Tensor) -> int:
        """Return how many samples' gradients of ``parameter`` to hold at a time."""
        return max(
            1,
            min(self.samples, CACHE_BYTES // max(1, parameter.numel() * parameter.element_size())),
        )

    def by_sample(self, value: Tensor) -> Tensor:
        """Return ``value`` with samples on axis 0 and positions on axis 1, (N, T, ...).

        The result is in the scores' precision.
        """
        value = self.layout.split(value, self.samples).movedim(self.layout.axis, 0)
        return in_score_precision(value.reshape(self.samples, -1, *value.shape[1:]))


def in_score_precision(value: Tensor) -> Tensor:
    """Return ``value`` in float64 if it is float64, in float32 otherwise."""
    return value if value.dtype == torch.float64 else value.float()


def square_sum(gradients: Tensor, total: Tensor) -> None:
    """Add the squares of ``gradients`` (M, *shape) over axis 0 to ``total`` (*shape).

    Overwrites ``gradients``.
    """
    flat = gradients.reshape(len(gradients), -1)
    total += flat.mul_(flat).sum(0).reshape(total.shape)


R = TypeVar("R", bound=type[Rule])

_RULES: dict[Callable[..., Any], type[Rule]] = {}


def rule_for(*functions: Callable[..., Any]) -> Callable[[R], R]:
    """Register a :class:`Rule` subclass for torch functions.

    Example:
        >>> lookup(torch.nn.functional.linear).__name__
        'Linear'
    """

    def register(rule: R) -> R:
        for function in functions:
            _RULES[function] = rule
        return rule

    return register


def lookup(function: Callable[..., Any]) -> type[Rule] | None:
    """Return the rule of exactly this function, or None."""
    return _RULES.get(function)
