"""Generated inputs -> what the model makes of them: labels, or gradients towards its dense self.

Enters: generated inputs and the form of the user's batches. Leaves: batches for a scoring pass, and
the gradients of a training term. The model's ``.grad``, modes and buffers and the global random
state stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_prune._types import Forward, Likelihood
from lightning_prune.augment.mixing import (
    BatchForm,
    Distillation,
    distillation_loss,
    predicted_labels,
)
from lightning_prune.passes.isolation import evaluating, own_randomness
from lightning_prune.passes.teacher import Teacher


@dataclass(frozen=True)
class Injection:
    """How generated inputs reach a model.

    Attributes:
        forward: ``forward(module, batch) -> logits``.
        likelihood: How the logits are read.
        distillation: Weight and temperature of the training term.
    """

    forward: Forward
    likelihood: Likelihood = "categorical"
    distillation: Distillation = Distillation()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.likelihood not in get_args(Likelihood):
            raise ValueError(
                f"Expected argument `likelihood` to be one of {get_args(Likelihood)}, but got "
                f"{self.likelihood!r}."
            )
        if not callable(self.forward):
            raise TypeError(
                "Expected argument `forward` to be a callable (module, batch) -> logits, but got "
                f"{self.forward!r}."
            )

    def logits(
        self, module: nn.Module, form: BatchForm, inputs: Tensor, teacher: Teacher | None = None
    ) -> Tensor:
        """Return what the model makes of inputs, in eval mode and without gradient.

        Args:
            module: The model.
            form: The form in which it takes its batches.
            inputs: (n, *shape).
            teacher: Weights to use in place of the model's own.
        """
        batch = form.fill(inputs)
        with _apart(inputs), torch.no_grad(), evaluating(module):
            if teacher is not None:
                return teacher.logits(module, batch, self.forward)
            return self.forward(module, batch)

    def labelled(self, module: nn.Module, form: BatchForm, inputs: Tensor) -> Any:
        """Return inputs in the form of the user's batch, with the model's own prediction as labels.

        Raises:
            ValueError: The prediction cannot be brought into the form of the labels.
        """
        if form.labels is None:
            return form.fill(inputs)
        logits = self.logits(module, form, inputs)
        with torch.inference_mode(False), torch.no_grad():
            return form.fill(inputs, predicted_labels(logits, form.labels, self.likelihood))

    def joined(
        self,
        module: nn.Module,
        form: BatchForm,
        inputs: Tensor,
        classes: Tensor | None,
        teacher: Teacher,
    ) -> Any:
        """Return the user's batch with generated inputs behind its own.

        Args:
            module: The model.
            form: The user's batch of B samples.
            inputs: Generated inputs (n, *shape).
            classes: What they were made for, (n,). They are the labels where the batch's labels are
                class indices, one a sample; all else is labelled by the teacher's prediction.
            teacher: The dense weights.

        Raises:
            ValueError: The prediction cannot be brought into the form of the labels.
        """
        like = form.labels
        if like is None:
            return form.join(inputs)
        if classes is not None and like.ndim == 1 and not like.is_floating_point():
            return form.join(inputs, classes)
        logits = self.logits(module, form, inputs, teacher)
        with torch.inference_mode(False), torch.no_grad():
            return form.join(inputs, predicted_labels(logits, like, self.likelihood))

    def rehearse(self, module: nn.Module, form: BatchForm, labels: bool) -> None:
        """Send two real inputs the way that generated ones will go.

        Args:
            module: The model.
            form: A real batch.
            labels: Whether labels will be needed.

        Raises:
            ValueError: The model's output does not have one row a sample, or is no prediction of
                such labels as the batch has.
        """
        inputs = form.inputs[:2]
        logits = self.logits(module, form, inputs)
        if logits.shape[:1] != inputs.shape[:1]:
            raise ValueError(
                f"Expected logits for {len(inputs)} inputs to have as many rows, but got shape "
                f"{tuple(logits.shape)}. Pass `forward=lambda module, batch: logits`."
            )
        if labels and form.labels is not None:
            predicted_labels(logits, form.labels, self.likelihood)

    def gradients(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        batch: Any,
        teacher: Teacher,
        *,
        scale: float = 1.0,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the training term of a generated batch, and its gradients.

        The student runs in eval mode, as it will when it is used: batch norm normalises by the
        running statistics of the real data and learns none from generated inputs, nothing is
        dropped out, and one sample is a batch.

        Args:
            module: The student.
            parameters: What to differentiate by.
            batch: Generated inputs in the user's form.
            teacher: The dense weights.
            scale: Factor of the backward pass, lest gradients underflow in half precision.

        Returns:
            The loss without its weight, detached; and ``scale * weight * d loss / d parameter``
            for each parameter, zeros where the term does not depend on it.
        """
        with _apart(parameters[0]):
            target = teacher.logits(module, batch, self.forward)
            with torch.enable_grad(), evaluating(module, differentiable=True):
                student = self.forward(module, batch)
                loss = distillation_loss(
                    student, target, self.likelihood, self.distillation.temperature
                )
                gradients: Sequence[Tensor | None] = torch.autograd.grad(
                    scale * self.distillation.weight * loss, parameters, allow_unused=True
                )
        return loss.detach(), [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]


@contextmanager
def _apart(tensor: Tensor) -> Iterator[None]:
    """Outside inference mode, and on random numbers that are the same each time.

    A model in eval mode that still draws some thereby gives student and teacher the same.
    """
    with torch.inference_mode(False), own_randomness(tensor.device, "model"):
        yield
