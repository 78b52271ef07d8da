"""What to do with the captured calls of a forward pass, and for which passes that holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_prune.saliency.capture import Call
from lightning_prune.saliency.registry import Layout

PROBE_SAMPLES = 2

LAUNCH_WORK = 1_500_000
"""What a call's fixed costs are worth in multiply-accumulates."""

TRIES = 4
"""On how many more batches a closed form is tried whose gradients were all zero so far."""

Signature: TypeAlias = tuple[Any, ...]
"""What identifies the sequence of captured calls."""


@dataclass
class Plan:
    """What to do with the calls of one signature.

    Attributes:
        layouts: For each call, where it keeps the samples, or None if its parameters take the
            generic route.
        closed: Names whose every use is covered.
        generic: Names that take the generic route.
        head: Whether all class rows can be taken at once (:mod:`lightning_prune.saliency.head`).
        tries: How many more batches to look for proof of the unproved ones on.
        unproved: Names in ``closed`` whose gradients were all zero on the samples tried so far.
        work: Multiply-accumulates a sample and row, beyond the first layer: what one more row
            costs.
        output: The shape of one sample's logits.
        shapes: For each call, the shape of its output on the two samples.
    """

    layouts: list[Layout | None]
    closed: set[str]
    generic: set[str]
    output: torch.Size
    shapes: list[torch.Size] = field(default_factory=list)
    unproved: set[str] = field(default_factory=set)
    work: int = 0
    head: bool = False
    tries: int = 0

    @property
    def width(self) -> int:
        """Bytes of the output gradients of all calls for one sample, in float32."""
        return 4 * sum(shape.numel() for shape in self.shapes) // PROBE_SAMPLES

    @property
    def launch(self) -> float:
        """What starting a pass costs, in forward passes of one sample."""
        return LAUNCH_WORK * len(self.layouts) / max(1, self.work)

    @property
    def alone(self) -> bool:
        """Whether some parameters need each sample run by itself as well."""
        return bool(self.generic)

    def fits(self, calls: Sequence[Call], samples: int) -> bool:
        """Tell whether every call holds as many positions a sample as when the plan was made.

        Where a model routes each sample its own way, a layer's batch is not the model's batch.
        """
        # A plan that trusts no closed form has no shapes.
        for call, layout, probe in zip(calls, self.layouts, self.shapes, strict=False):
            if layout is not None:
                axis = 1 if layout is Layout.SECOND else 0
                if call.shape[axis] % samples or (axis and call.shape[axis] != samples):
                    return False
                if (
                    call.shape[axis] // samples != probe[axis] // PROBE_SAMPLES
                    and call.shape[1:] == probe[1:]
                ):
                    return False
        return True

    def confirm(self, other: Plan) -> None:
        """Take over what another pair of samples has shown about parameters not yet proved."""
        self.closed -= other.generic
        self.generic |= other.generic
        self.unproved &= other.unproved

    @classmethod
    def all_generic(cls, calls: Sequence[Call], parameters: Iterable[str], logits: Tensor) -> Plan:
        """Return the plan that trusts no closed form."""
        return cls([None] * len(calls), set(), set(parameters), logits.shape[1:])


def signature(calls: Sequence[Call], opaque: set[str]) -> Signature:
    """Return what two batches have in common when one plan fits both."""
    return (*(call.signature for call in calls), frozenset(opaque))
