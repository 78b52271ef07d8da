"""What was removed, what was kept whole, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_prune._lines import by_reason


@dataclass
class RemovalReport:
    """What :func:`~lightning_prune.removal.shrink` did to a model.

    Args:
        parameters_before: How many numbers the model's parameters were.
        parameters_after: How many they are.
        widths: By layer, its units before and after, for the layers that lost some.
        heads: By attention, its heads before and after, for those that lost some.
        whole: By layer, why none of its units could be cut, whatever its weights.
        notes: By layer, what stays although it is dead, and why.
        new_biases: Parameters that the model did not have: biases that took constants in.
        origins: By name of a parameter or buffer that was cut, where each of its entries lay in the
            dense tensor: a flat index, in the new shape. What is kept beside a parameter (an
            optimizer's momentum, a moving average) is cut along by :meth:`take`.
        rounds: How often something fell.
        exact: Whether the proof ran in float64; a model that can't is compared in its own dtype.
    """

    parameters_before: int
    parameters_after: int = 0
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    heads: dict[str, tuple[int, int]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    new_biases: tuple[str, ...] = ()
    origins: dict[str, Tensor] = field(default_factory=dict)
    rounds: int = 0
    exact: bool = True

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a tensor shaped like the dense parameter ``name`` as that parameter was cut."""
        origin = self.origins.get(name)
        if origin is None:
            return tensor
        return tensor.flatten()[origin.to(tensor.device)]

    def __str__(self) -> str:
        share = self.parameters_after / max(self.parameters_before, 1)
        lines = [
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"({share:.1%}) in {self.rounds} rounds"
        ]
        lines += [f"  {name}: {a} -> {b} units" for name, (a, b) in self.widths.items()]
        lines += [f"  {name}: {a} -> {b} heads" for name, (a, b) in self.heads.items()]
        lines += [f"  {name}: {note}" for name, notes in self.notes.items() for note in notes]
        lines += [f"  {name} has a bias now" for name in self.new_biases]
        lines += [f"  kept whole, {line}" for line in by_reason(self.whole)]
        return "\n".join(lines)
