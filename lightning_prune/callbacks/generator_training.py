"""When, how long and in which precision a generator learns beside a model: settings, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISIONS = {None: None, "bf16": torch.bfloat16}
"""Names of the precisions of a generator's step -> the dtype of its autocast."""


@dataclass(frozen=True)
class GeneratorTraining:
    """How a generator is trained beside a model.

    Attributes:
        every_n_steps: It takes a step on every n-th training batch, the first one included.
        epochs: ``(a, b)``: it is trained from epoch a, counted from 0, until before epoch b; None
            for all epochs. Outside of them it is kept as it is, and its samples are still used.
        max_steps: How many steps it takes in all, those of ``fit_before`` included; None for no
            limit.
        offload: Keep its parameters and its optimizer's state on the CPU while not in use. Saves
            their memory on the accelerator for two transfers a step.
        fit_before: For so many epochs over the training loader it is trained alone, before the
            first training step. Not in a run resumed from a checkpoint, nor with a generator that
            has been trained before.
        precision: ``"bf16"``: the forward pass of its training step under autocast. None: float32
            (float64 for inputs in float64), whatever the Trainer's precision.

    Raises:
        ValueError: Settings out of range; one message names them all.

    Example:
        >>> GeneratorTraining(every_n_steps=2, epochs=(0, 10)).includes(epoch=10, batch=4, steps=20)
        False
    """

    every_n_steps: int = 1
    epochs: tuple[int, int] | None = None
    max_steps: int | None = None
    offload: bool = False
    fit_before: int = 0
    precision: str | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no training."""
        epochs: object = self.epochs
        if isinstance(epochs, list):  # as a file of settings has it
            object.__setattr__(self, "epochs", tuple(epochs))
        faults = [
            f"`{name}`: expected {wanted}, but got {getattr(self, name)!r}"
            for name, fine, wanted in (
                ("every_n_steps", _at_least(1, self.every_n_steps), "a whole number, 1 or more"),
                (
                    "epochs",
                    self.epochs is None or _is_span(self.epochs),
                    "two epochs (first, end), whole numbers with 0 <= first < end, or None",
                ),
                (
                    "max_steps",
                    self.max_steps is None or _at_least(1, self.max_steps),
                    "a number of steps, 1 or more, or None",
                ),
                ("offload", isinstance(self.offload, bool), "True or False"),
                ("fit_before", _at_least(0, self.fit_before), "a number of epochs, 0 or more"),
                ("precision", self.precision in PRECISIONS, f"one of {tuple(PRECISIONS)}"),
            )
            if not fine
        ]
        if faults:
            raise ValueError("\n- ".join(["GeneratorTraining cannot use its settings:", *faults]))

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the step's autocast; None for none."""
        return PRECISIONS[self.precision]

    def includes(self, *, epoch: int, batch: int, steps: int) -> bool:
        """Whether the generator takes a step now.

        Args:
            epoch: The run's epoch, from 0.
            batch: Training batches the generator has seen pass before this one.
            steps: Steps it has taken.
        """
        first, end = (0, epoch + 1) if self.epochs is None else self.epochs
        return first <= epoch < end and batch % self.every_n_steps == 0 and self.affords(steps)

    def affords(self, steps: int) -> bool:
        """Whether the budget has another step after so many."""
        return self.max_steps is None or steps < self.max_steps


def _at_least(least: int, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_span(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(_at_least(0, epoch) for epoch in value)
        and value[0] < value[1]
    )
