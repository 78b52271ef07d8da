"""What makes a module a generator, and the checks on what one returns.

Enters: a module, what its ``loss`` and ``sample`` gave. Leaves: tensors to rely on, or an error
that names the method, what was expected and what came.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class GeneratorError(RuntimeError):
    """A generator's loss or samples are not what the protocol asks for; the message says which."""


@runtime_checkable
class Generator(Protocol):
    """What makes a module a generator: ``loss(x) -> scalar`` and ``sample(n) -> (n, *shape)``."""

    def loss(self, x: Tensor) -> Tensor:
        """Return what the generator's training minimises on a batch."""

    def sample(self, n: int) -> Tensor:
        """Return ``n`` new inputs."""


class Samples(NamedTuple):
    """What a generator made.

    Attributes:
        inputs: (n, *shape), in the user's range and dtype.
        labels: The classes (n,) that they were made for; None unless the generator is a
            conditional VAE of ours.
    """

    inputs: Tensor
    labels: Tensor | None


def require_generator(vae: Any) -> None:
    """Raise a TypeError unless ``vae`` is a module that keeps the protocol :class:`Generator`."""
    if not (isinstance(vae, nn.Module) and isinstance(vae, Generator)):
        raise TypeError(
            "Expected argument `vae` to be a torch module with the methods `loss(x) -> scalar` and "
            f"`sample(n) -> Tensor`, but got {type(vae).__name__}."
        )


def checked_loss(loss: Any, name: str) -> Tensor:
    """Return a loss as a scalar () that can be differentiated.

    Args:
        loss: What ``loss(x)`` returned.
        name: The generator's class.

    Raises:
        GeneratorError: It is no scalar tensor, or carries no gradient.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
        raise GeneratorError(
            f"Expected {name}.loss(x) to return a scalar tensor, but got {found}. Reduce it over "
            "the batch, e.g. by its mean."
        )
    if not loss.requires_grad:
        raise GeneratorError(
            f"Expected {name}.loss(x) to depend on the generator's parameters, but it carries no "
            "gradient. To use a generator as it is, set requires_grad=False on its parameters."
        )
    return loss.reshape(())


def checked_sample(
    sample: Any,
    expected: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    call: str,
    trained: float,
) -> Tensor:
    """Return samples on a device and in a dtype, detached.

    Args:
        sample: What the generator returned.
        expected: (n, *shape).
        dtype: Of the user's inputs; samples of another precision are converted.
        device: Of the user's inputs.
        call: The call that returned it, for the message.
        trained: Training steps taken, for the message.

    Raises:
        GeneratorError: It is no tensor, of another shape or kind of dtype, or not finite.
    """
    problem = None
    if not isinstance(sample, Tensor):
        problem = f"a {type(sample).__name__}"
    elif sample.shape != expected:
        problem = f"shape {tuple(sample.shape)}"
    elif sample.is_floating_point() != dtype.is_floating_point:
        problem = f"dtype {sample.dtype}"
    elif not bool(sample.isfinite().all()):
        problem = "values that are NaN or infinite"
    if problem is not None:
        raise GeneratorError(
            f"Expected {call} to return finite values of shape {expected} and a dtype like "
            f"{dtype}, but got {problem}. It had been trained for {trained} steps."
        )
    checked: Tensor = sample.detach().to(device, dtype)
    return checked


def checked_labels(labels: Any, n: int, classes: int, device: torch.device, *, call: str) -> Tensor:
    """Return the classes of samples as int64 (n,) on a device.

    Args:
        labels: What the generator returned.
        n: How many samples it was asked for.
        classes: K.
        device: Of the user's inputs.
        call: The call that returned it, for the message.

    Raises:
        GeneratorError: They are no class indices, one a sample.
    """
    problem = None
    if not isinstance(labels, Tensor):
        problem = f"a {type(labels).__name__}"
    elif labels.shape != (n,):
        problem = f"shape {tuple(labels.shape)}"
    elif labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        problem = f"dtype {labels.dtype}"
    elif n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        problem = f"values from {int(labels.min())} to {int(labels.max())}"
    if problem is not None:
        raise GeneratorError(
            f"Expected {call} to return labels of shape ({n},), integers from 0 to {classes - 1}, "
            f"but got {problem}."
        )
    checked: Tensor = labels.detach().to(device, torch.int64)
    return checked
