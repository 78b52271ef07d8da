"""Where a user's loss comes back to the logits: the distance from the dense network joins there.

Enters: a module whose calls return logits, and when to listen to them. Leaves: on the way back of a
loss, the mixture of its gradient at the logits with that of the distance. The gradients of all
parameters follow from it, by the one backward pass that there is anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune._types import Likelihood
from lightning_prune.augment.mixing import distillation_loss
from lightning_prune.callbacks.dense_weights import DenseWeights
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import change_tensors, unwrap_logits
from lightning_prune.passes.isolation import own_randomness, unlogged
from lightning_prune.passes.outputs import ignored_positions
from lightning_prune.passes.teacher import Teacher


class LogitTerm:
    """The distillation term of a module's calls.

    For logits z whose gradient by the user's loss is g, what is passed on is
    ``(1 - weight) * g + weight * factor * d distillation_loss(z) / dz``.

    Args:
        weight: The share of the term, in [0, 1].
        temperature: As for :func:`distillation_loss`.
        likelihood: How the output is read.
        dense: Has the dense network; until there is one calls are only looked at.

    Attributes:
        listening: Whether a call belongs to a loss to come.
        factor: What the user's loss is multiplied by, while it is backpropagated; ``None`` at all
            other times, where gradients are the user's own affair.
        called: Whether there was a call since :meth:`attach`.
    """

    def __init__(
        self, weight: float, temperature: float, likelihood: Likelihood, dense: DenseWeights
    ) -> None:
        self.weight, self.temperature, self.likelihood = weight, temperature, likelihood
        self.dense = dense
        self.factor: float | None = None
        self.listening = self.called = False
        self._rehearsed = False
        self._handles: list[RemovableHandle] = []
        self._depth = self._level = 0
        self._answer: Tensor | None = None
        self._labels: Tensor | None = None
        self._name = ""
        self._took_part: Callable[[Tensor], None] | None = None
        self._loggers: list[nn.Module] = []

    def attach(
        self,
        module: nn.Module,
        name: str,
        took_part: Callable[[Tensor], None],
        owner: LightningModule,
        level: int = 0,
    ) -> None:
        """Hang hooks on a module.

        Args:
            module: Whose calls return logits.
            name: What to call it in messages.
            took_part: Told of each term that has joined a backward pass: its loss, detached.
            owner: The model that it is part of: what the dense network would log there is not.
            level: How many calls of the module's are around those that count.
        """
        self._name, self._took_part, self._level = name, took_part, level
        # Looked for once: a walk over a deep network's modules takes milliseconds in every step.
        self._loggers = [part for part in owner.modules() if hasattr(part, "log_dict")]
        self._handles = [
            module.register_forward_pre_hook(self._before_call, with_kwargs=True),
            module.register_forward_hook(self._after_call, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Leave nothing behind on the module."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._loggers, self._took_part = [], [], None
        self.end_step()
        self.called = False

    def listen(self, labels: Tensor | None) -> None:
        """Begin a training step on samples with these labels, if they have any."""
        self.listening, self._depth, self._labels = True, 0, labels

    def end_step(self) -> None:
        """Listen to nothing until the next one."""
        self.listening, self.factor, self._labels = False, None, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy hangs on no module.
        return {
            **self.__dict__,
            "_handles": [],
            "_took_part": None,
            "_loggers": [],
            "_labels": None,
            "listening": False,
        }

    # ------------------------------------------------------------------ forward

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # The dense network first: what a call leaves behind on the module (activations for another
        # loss, say) has to be the student's, and it may change its arguments in place.
        if self._counts():
            self._answer = self._dense_answer(module, args, kwargs)
        self._depth += 1

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1
        if not self._counts():
            return
        self.called = True
        logits, transposed = self._read(output)
        dense, self._answer = self._answer, None
        if not logits.requires_grad or dense is None:
            return
        # Now, and not on the way back: the step may go on to change its tensors in place.
        precise = torch.promote_types(logits.dtype, torch.float32)
        leaf = logits.detach().to(precise).requires_grad_()
        student = leaf.transpose(1, 2) if transposed else leaf
        # Where the call is checkpointed, torch counts what is saved for its backward pass and would
        # miss this when it repeats the call: kept out of its sight.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            student, dense = self._predictions(student, dense)
            if student.numel():
                loss = distillation_loss(student, dense, self.likelihood, self.temperature)
            else:  # all labels are ignored
                loss = student.sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        if self.dense.teacher is not None:
            hook = self._mixture(loss.detach(), gradient)
            logits.register_hook(hook)  # type: ignore[no-untyped-call]

    def _predictions(self, student: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Return both without the positions that the labels leave out: what is left is (M, C)."""
        if self.likelihood != "categorical":
            return student, dense
        ignored = ignored_positions(student, self._labels)
        if ignored is None:
            return student, dense
        return student.movedim(1, -1)[~ignored], dense.movedim(1, -1)[~ignored]

    def _counts(self) -> bool:
        """Whether the call that begins or has ended is one of the student's in a training step."""
        return self.listening and self._depth == self._level and torch.is_grad_enabled()

    def _dense_answer(self, module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """Return what the dense network says, or in the first step the model in its place."""
        teacher = self.dense.teacher
        if teacher is None and self._rehearsed:
            return None
        # Where it has to work hours later, it is tried in the first step with the model itself.
        teacher = Teacher.of(module) if teacher is None else teacher
        self._rehearsed = True
        call = change_tensors((args, kwargs), Tensor.clone)
        device = next(iter(teacher.weights.values())).device
        with own_randomness(device, "model"), unlogged(module, self._loggers):
            return teacher.logits(module, call, self._read_call)

    def _read_call(self, module: nn.Module, call: Any) -> Tensor:
        args, kwargs = call
        output = module(*args, **kwargs)
        self._read(output)
        return unwrap_logits(output)

    def _read(self, output: Any) -> tuple[Tensor, bool]:
        """Return the tensor with the logits, and whether its classes are on the last of 3 axes."""
        try:
            unwrapped = unwrap_logits(output)
        except BatchFormatError:
            raise PruningSetupError(
                f"DistillationCallback: expected {self._name} to return logits, or an object with "
                f"an attribute `logits`, but got a {type(output).__name__}. Name the submodule "
                "that returns the logits: `module=`."
            ) from None
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits, unwrapped is not logits

    # ------------------------------------------------------------------ backward

    def _mixture(self, loss: Tensor, term: Tensor) -> Callable[[Tensor], Tensor | None]:
        """Return a hook that mixes the gradient of the user's loss with the term's."""
        left = [term]  # joins once, however many backward passes come through

        def mix(gradient: Tensor) -> Tensor | None:
            if self.factor is None:  # not the loss's backward pass: the user's own autograd.grad
                return None
            mixed = (1 - self.weight) * gradient.to(term.dtype)
            if left:
                mixed = mixed + self.weight * self.factor * left.pop()
                if self._took_part is not None:
                    self._took_part(loss)
            return mixed.to(gradient.dtype)

        return mix


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
