"""Generated inputs -> a batch in the user's form, its labels, and what may be learnt from it.

Enters: generated inputs, a batch of the user's as a pattern, logits. Leaves: batches and a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune._types import Likelihood
from lightning_prune.passes.batches import change_parts
from lightning_prune.passes.outputs import check_classes

Part: TypeAlias = Tensor | list[Any] | tuple[Any, ...]
"""Of a batch: a tensor, or a sequence with an entry a sample."""


@dataclass(frozen=True)
class Distillation:
    """The training term for generated inputs.

    Attributes:
        weight: Factor of the term beside the user's own loss, in [0, 1).
        temperature: Softens both distributions; above 1 the teacher's smaller probabilities count
            for more (Hinton et al. 2015). Without effect on a ``gaussian`` likelihood.
    """

    weight: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < 1.0:
            raise ValueError(f"Expected `weight` to be in [0, 1), but got {self.weight!r}.")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"Expected `temperature` to be above 0, but got {self.temperature!r}.")


@dataclass(frozen=True)
class BatchForm:
    """A batch of the user's, as a pattern for generated ones.

    Attributes:
        batch: A tensor, or any nesting of tuples, lists and dicts, of B samples.
        inputs: The tensor in ``batch`` (the very object) that holds its inputs, (B, *shape).
        labels: The tensor in ``batch`` that holds its labels; None if it has none.

    Example:
        >>> x, y = torch.zeros(3, 2), torch.tensor([7, 8, 9])
        >>> BatchForm((x, y), x, y).fill(torch.ones(1, 2), torch.tensor([5]))
        (tensor([[1., 1.]]), tensor([5]))
    """

    batch: Any
    inputs: Tensor
    labels: Tensor | None = None

    def fill(self, generated: Tensor, labels: Tensor | None = None) -> Any:
        """Return a batch of this form around generated inputs (n, *shape).

        Args:
            generated: What takes the place of the inputs; n may differ from B.
            labels: What takes the place of the labels; None treats them like all other parts:
                tensors with B rows and lists with an entry a sample give their first n, again from
                the start where n > B. What has no rows is passed on.
        """
        return change_parts(
            self.batch, len(self.inputs), lambda part: self._rows(part, generated, labels)
        )

    def join(self, generated: Tensor, labels: Tensor | None = None) -> Any:
        """Return the batch with generated inputs (n, *shape) behind its own: of B + n samples.

        Args:
            generated: What joins the inputs.
            labels: What joins the labels; needed if the batch has any.

        Raises:
            ValueError: The batch has labels, but none were given.

        Example:
            >>> x, y = torch.zeros(2, 1), torch.tensor([7, 8])
            >>> BatchForm((x, y), x, y).join(torch.ones(1, 1), torch.tensor([5]))[1]
            tensor([7, 8, 5])
        """
        if self.labels is not None and labels is None:
            raise ValueError(
                "Expected labels for the generated inputs, as the batch they join has some, but "
                "got None. Label them first."
            )

        def joined(part: Part) -> Any:
            if not self._has_rows(part):
                return part
            rows = self._rows(part, generated, labels)
            if not isinstance(part, Tensor):
                return part + rows
            return torch.cat([part, rows.to(part.device, part.dtype)])

        return change_parts(self.batch, len(self.inputs), joined)

    def possible_labels(self) -> list[str]:
        """Describe what else in the batch may be labels, since it has an entry a sample.

        That is every tensor beside the inputs and the labels, of any shape and dtype: a weight or a
        mask cannot be told from a second label. Lists (texts, lengths) are counted only if no
        tensor is known to be the labels.

        Example:
            >>> x, y = torch.zeros(3, 2), torch.tensor([7, 8, 9])
            >>> batch = (x, y, {"box": torch.zeros(3, 4)}, ["a", "b", "c"])
            >>> BatchForm(batch, x, y).possible_labels()
            ['a torch.float32 tensor of shape (3, 4)']
        """
        found = []

        def look(part: Part) -> None:
            if part is self.inputs or part is self.labels or not self._has_rows(part):
                return
            if isinstance(part, Tensor):
                found.append(f"a {part.dtype} tensor of shape {tuple(part.shape)}")
            elif self.labels is None:
                found.append(f"a {type(part).__name__} of {len(part)} entries")

        change_parts(self.batch, len(self.inputs), look)
        return found

    def _rows(self, part: Part, generated: Tensor, labels: Tensor | None) -> Any:
        """Return what stands at a part's place in a batch of generated inputs."""
        if part is self.inputs:
            return generated
        if labels is not None and part is self.labels:
            return labels
        if not self._has_rows(part):
            return part
        rows = torch.arange(len(generated)) % max(len(self.inputs), 1)
        if not isinstance(part, Tensor):
            return type(part)(part[i] for i in rows.tolist())
        return part.index_select(0, rows.to(part.device))

    def _has_rows(self, part: Part) -> bool:
        if isinstance(part, Tensor):
            return part.ndim > 0 and len(part) == len(self.inputs)
        return True  # no other sequences are asked about


def predicted_labels(logits: Tensor, like: Tensor, likelihood: Likelihood) -> Tensor:
    """Return a model's own prediction as labels of the user's kind.

    Args:
        logits: The model's output for n samples; classes on the last axis of (n, C), on axis 1 of
            (n, C, ...).
        like: The labels of a real batch: their dtype and shape (beyond axis 0) are copied.
        likelihood: How the output is read.

    Raises:
        ValueError: If no reading of the logits has the labels' shape, or if they are to be
            classes, but there are not two.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> predicted_labels(logits, torch.tensor([0, 0, 0]), "categorical")
        tensor([1, 0])
        >>> predicted_labels(logits, torch.zeros(3, 2), "bernoulli")
        tensor([[0.5000, 0.8808],
                [0.7311, 0.5000]])
    """
    soft = like.is_floating_point()
    if likelihood == "categorical":
        check_classes(logits)
    if likelihood == "gaussian":
        prediction = logits
    elif likelihood == "bernoulli":
        prediction = logits.sigmoid() if soft else logits > 0
    elif soft and like.shape[1:] == logits.shape[1:]:
        prediction = logits.softmax(1)
    else:
        prediction = logits.argmax(1)
    expected = (len(logits), *like.shape[1:])
    if prediction.numel() != torch.Size(expected).numel():
        raise ValueError(
            f"Expected the model's output, shape {tuple(logits.shape)}, to give labels of shape "
            f"{expected} under the {likelihood!r} likelihood, but it gives "
            f"{tuple(prediction.shape)}. Set `likelihood` to what your loss assumes, or leave "
            "'saliency' out of `inject`."
        )
    return prediction.reshape(expected).to(like.dtype)


def distillation_loss(
    student: Tensor, teacher: Tensor, likelihood: Likelihood, temperature: float
) -> Tensor:
    """Return T^2 KL(teacher || student) at temperature T, the mean over predictions, in nats.

    Args:
        student: Logits, with gradient.
        teacher: Logits of the same shape, without.
        likelihood: ``"categorical"``: one distribution over the classes a prediction;
            ``"bernoulli"``: one a logit; ``"gaussian"``: unit variance around the output, so half
            the squared difference, at any temperature.
        temperature: T. The factor T^2 keeps the size of the gradients when T changes.

    Returns:
        A scalar of at least float32, 0 exactly where student and teacher agree.

    Raises:
        ValueError: Categorical logits without at least 2 classes on axis 1.

    Source: Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network".

    Example:
        >>> z = torch.tensor([[1.0, 2.0, 3.0]])
        >>> distillation_loss(z, z + 5.0, "categorical", 2.0).abs() < 1e-6
        tensor(True)
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(precise), teacher.to(precise)
    if likelihood == "gaussian":
        return 0.5 * (student - teacher).square().mean()
    student, teacher = student / temperature, teacher / temperature
    if likelihood == "bernoulli":
        p = teacher.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(teacher, p)
        return temperature**2 * (F.binary_cross_entropy_with_logits(student, p) - entropy)
    check_classes(student)
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
