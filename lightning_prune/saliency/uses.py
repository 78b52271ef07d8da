"""Captured calls -> squared gradients of the parameters they take, direction by direction.

Enters: the calls of one forward pass, where each keeps its samples, and one output gradient a call
and direction. Leaves: the sum over samples and directions of squared per-sample gradients. A
parameter with one use is left to its call's rule; where it has several (tied weights, a module
called twice) the uses' per-sample gradients are summed before they are squared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_prune.saliency.capture import Call
from lightning_prune.saliency.registry import Layout, square_sum


class Uses:
    """The uses of some parameters in one forward pass.

    Args:
        calls: All captured calls.
        layouts: For each call, where it keeps the samples, or None if that is unknown.
        names: The parameters wanted; those with a call of unknown layout are left out.
        samples: N.
        workspace: Bytes of work space, shared out among the rules.
        directions: How many directions are to come.

    Attributes:
        names: The parameters covered.
        indices: The calls whose output gradients are needed.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        layouts: Sequence[Layout | None],
        names: Collection[str],
        samples: int,
        workspace: int,
        directions: int = 1,
    ) -> None:
        unknown = {
            name
            for call, layout in zip(calls, layouts, strict=True)
            if layout is None
            for name in call.names.values()
        }
        parts: dict[str, list[tuple[int, str]]] = {}
        for i, call in enumerate(calls):
            for role, name in call.names.items():
                if name in names and name not in unknown:
                    parts.setdefault(name, []).append((i, role))
        self.names = set(parts)
        self.indices = sorted({i for uses in parts.values() for i, _ in uses})
        self._edges = [calls[i].edge for i in self.indices]
        share = workspace // max(1, len(self.indices))
        self._rules = {
            i: calls[i].rule(calls[i].arguments, samples, layout, share)
            for i in self.indices
            if (layout := layouts[i]) is not None
        }
        for rule in self._rules.values():
            rule.reused = directions > 1
        self._several = {name: uses for name, uses in parts.items() if len(uses) > 1}
        self._single: dict[int, dict[str, str]] = {}
        for name, uses in parts.items():
            if len(uses) == 1:
                self._single.setdefault(uses[0][0], {})[uses[0][1]] = name

    @property
    def edges(self) -> list[GradientEdge]:
        """Where autograd delivers the gradients that :meth:`add` takes."""
        return self._edges

    def add(self, gradients: Sequence[Tensor | None], totals: Mapping[str, Tensor]) -> None:
        """Add one direction, given the output gradient of each call in :attr:`indices`."""
        found = dict(zip(self.indices, gradients, strict=True))
        for i, roles in self._single.items():
            if (gradient := found[i]) is not None:
                sums = {role: totals[name] for role, name in roles.items()}
                self._rules[i].add(gradient, sums)
        for name, uses in self._several.items():
            self._add_several(
                [(i, role, g) for i, role in uses if (g := found[i]) is not None], totals[name]
            )

    def finish(self, totals: Mapping[str, Tensor]) -> None:
        """Let the rules add what they have put off until all directions were seen."""
        for i, roles in self._single.items():
            self._rules[i].finish({role: totals[name] for role, name in roles.items()})

    def _add_several(self, uses: Sequence[tuple[int, str, Tensor]], total: Tensor) -> None:
        rules = [self._rules[i] for i, _, _ in uses]
        step = min((rule.chunk(total) for rule in rules), default=1)
        for start in range(0, rules[0].samples if rules else 0, step):
            rows = slice(start, start + step)
            parts = [self._rules[i].per_sample(role, gradient, rows) for i, role, gradient in uses]
            for part in parts[1:]:
                parts[0] = parts[0] + part
            square_sum(parts[0], total)
