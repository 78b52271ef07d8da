"""A batch of any form: its model input, its labels, its size, a part of it.

Enters: whatever the user's loader yields. Leaves: tensors, or a smaller batch of the same form. The
one escape hatch for models that a batch does not reach by itself is
``forward=lambda module, batch: logits``; its samples have to be told apart all the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_prune.exceptions import BatchFormatError

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys of a dict batch that hold labels, in order of preference."""

WAY_OUT = "Pass `forward=lambda module, batch: logits` to say how your batches reach your model."

WAY_TO_SAMPLES = (
    "Samples are told apart also with `forward=`. Yield a tuple, a mapping or a dataclass whose "
    "tensors have the samples along axis 0 (beside them lists with an entry a sample), from your "
    "loader or, in a fit, from `scoring_loader=`, and let `forward=lambda module, batch: logits` "
    "make of it what your model takes."
)


def read_inputs(batch: Any) -> Tensor:
    """Return the tensor that the default forward hands to the model.

    Args:
        batch: A tensor, a sequence that starts with a tensor such as ``(x, y)``, or a mapping with
            one entry that is a tensor and no label (see :data:`LABEL_KEYS`).

    Raises:
        BatchFormatError: If the batch has none of these forms.

    Example:
        >>> read_inputs((torch.ones(2, 3), torch.zeros(2))).shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        candidates = [v for k, v in batch.items() if isinstance(v, Tensor) and k not in LABEL_KEYS]
        if len(candidates) == 1:
            return candidates[0]
        raise BatchFormatError(
            "Expected a dict batch with one input tensor beside its labels, but got the keys "
            f"{list(batch)}. {WAY_OUT}"
        )
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    raise BatchFormatError(
        "Expected a batch that is a tensor, a sequence starting with a tensor, or a dict, but got "
        f"{describe_batch(batch)}. {WAY_OUT}"
    )


def read_labels(batch: Any) -> Tensor | None:
    """Return the labels of a batch ``(x, y)`` or ``{"x": x, "y": y}``, None if there are none."""
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    return labels if isinstance(labels, Tensor) else None


def default_forward(module: nn.Module, batch: Any) -> Tensor:
    """Run ``module`` on a batch ``x``, ``(x, y)`` or a dict and return its logits.

    The call is that of :func:`default_call`. An output with an attribute ``logits`` (Hugging Face)
    is unwrapped; its three-dimensional logits are ``(N, T, C)`` by that library's convention and
    come back as ``(N, C, T)``, as torch's cross entropy has them.

    Raises:
        BatchFormatError: If the batch cannot be read or the model does not accept what was read.
    """
    return unwrap_logits(default_call(module, batch))


def default_call(module: nn.Module, batch: Any) -> Any:
    """Run ``module`` on a batch ``x``, ``(x, y)`` or a dict and return what it returns.

    A dict is passed by keyword as far as ``module.forward`` has parameters of these names (labels
    are left out), as one tensor otherwise.

    Raises:
        BatchFormatError: If the batch cannot be read or the model does not accept what was read.
    """
    inputs = call_inputs(module, batch)
    try:
        return module(inputs) if isinstance(inputs, Tensor) else module(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        called = (
            f"a tensor of shape {tuple(inputs.shape)}"
            if isinstance(inputs, Tensor)
            else ", ".join(inputs)
        )
        raise BatchFormatError(
            f"Expected {type(module).__name__} to accept {called}, read by the default forward "
            f"from {describe_batch(batch)}, but it raised {type(error).__name__}: {error}. "
            f"{WAY_OUT}"
        ) from error


def call_inputs(module: nn.Module, batch: Any) -> Tensor | dict[str, Any]:
    """Return what :func:`default_call` calls ``module`` with: a tensor, or keywords.

    Raises:
        BatchFormatError: If the batch cannot be read.
    """
    keywords = _keywords(module, batch) if isinstance(batch, Mapping) else {}
    return keywords or read_inputs(batch)


def unwrap_logits(output: Any) -> Tensor:
    """Return the logits in a model's output: the tensor itself, or its attribute ``logits``.

    Raises:
        BatchFormatError: If the output is neither.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits.transpose(1, 2) if logits.ndim == 3 else logits
    raise BatchFormatError(
        "Expected the model to return logits as a tensor, but got "
        f"{describe_batch(output)}. {WAY_OUT}"
    )


def batch_size(batch: Any) -> int:
    """Return the number of samples: the length of the first tensor in the batch.

    Raises:
        BatchFormatError: If the batch holds no tensor with a sample axis.
    """
    sizes: list[int] = []
    change_tensors(batch, lambda leaf: sizes.extend(leaf.shape[:1]))
    if sizes:
        return sizes[0]
    raise BatchFormatError(
        "Expected a batch with a tensor whose axis 0 counts samples, but got "
        f"{describe_batch(batch)}. {WAY_TO_SAMPLES}"
    )


def take_samples(batch: Any, index: Tensor) -> Any:
    """Return a batch of the same form with the samples in ``index`` (repeats allowed).

    Every tensor whose axis 0 has the length of the batch is indexed, and so is every list of that
    length without a tensor in it (texts, lengths, graphs), or such a tuple of anything but numbers:
    a tuple of these is one constant, such as the size of an image. Everything else is passed on as
    it is.

    Example:
        >>> take_samples((["a", "b", "c"], torch.arange(3)), torch.tensor([2, 0]))
        (['c', 'a'], tensor([2, 0]))
    """
    size = batch_size(batch)

    def take(part: Tensor | list[Any] | tuple[Any, ...]) -> Any:
        if not isinstance(part, Tensor):
            return type(part)(part[i] for i in index.tolist())
        if part.ndim and part.shape[0] == size:
            return part.index_select(0, index.to(part.device))
        return part

    return change_parts(batch, size, take)


def few_samples(batch: Any, count: int = 2) -> Any:
    """Return a batch of the same form with the first samples, or all where there are no more.

    Example:
        >>> few_samples((torch.arange(3), ["a", "b", "c"]))
        (tensor([0, 1]), ['a', 'b'])
    """
    return take_samples(batch, torch.arange(min(count, batch_size(batch))))


@contextmanager
def whole_or_part(run: Callable[[Any], Any], batch: Any) -> Iterator[None]:
    """Explain an error on some samples of a batch in a block, if all of them together make none.

    Args:
        run: Runs the model on a batch.
        batch: All samples.

    Raises:
        BatchFormatError: So it is, and more than one tensor was indexed: one of them may be no
            entry a sample, but a constant whose length happens to be the batch's.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        size, shapes = batch_size(batch), []
        change_tensors(batch, lambda leaf: shapes.append(tuple(leaf.shape)))
        indexed = [str(shape) for shape in shapes if shape[:1] == (size,)]
        if len(indexed) < 2 or not _runs(run, batch):
            raise
        raise BatchFormatError(
            f"Expected the model to run on some samples of a batch as on all {size} of them, but "
            f"it raised {type(error).__name__}: {error}. Samples were taken of all tensors of "
            f"length {size}, of the shapes {', '.join(indexed)}. If one of them is a constant that "
            "only happens to have this length, keep it on the model (a buffer), or yield it with "
            "an axis in front, (1, ...), and take that away in `forward=`."
        ) from error


def _runs(run: Callable[[Any], Any], batch: Any) -> bool:
    try:
        with torch.no_grad():
            run(batch)
    except Exception:  # noqa: BLE001  (it is the first error that counts)
        return False
    return True


def outside_inference_mode(batch: Any) -> Any:
    """Return the batch with inference tensors cloned, so that autograd may save them.

    Has to be called with inference mode off (``torch.inference_mode(False)``).
    """
    return change_tensors(batch, lambda leaf: leaf.clone() if leaf.is_inference() else leaf)


def change_tensors(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a batch of the same form with every tensor changed.

    Args:
        batch: Any nesting of sequences, mappings (also of other libraries' classes, such as Hugging
            Face's BatchEncoding) and dataclasses; it stays as it is.
        change: Called with each tensor, in order.
    """
    return apply_to_collection(batch, Tensor, change)


def change_parts(
    batch: Any, size: int, change: Callable[[Tensor | list[Any] | tuple[Any, ...]], Any]
) -> Any:
    """Return a batch of the same form with every tensor and every sequence of samples changed.

    Args:
        batch: As for :func:`change_tensors`.
        size: The number of its samples.
        change: Called with each tensor, of any shape, and each list or tuple that has an entry a
            sample in the sense of :func:`take_samples`, in order.

    Example:
        >>> change_parts((torch.ones(2), ["a", "b"], (8, 8)), 2, len)
        (2, 2, (8, 8))
    """

    def changed(part: Any) -> Any:
        if isinstance(part, Tensor) or (len(part) == size and _has_entry_a_sample(part)):
            return change(part)
        entries = [apply_to_collection(entry, (Tensor, list, tuple), changed) for entry in part]
        return type(part)(*entries) if hasattr(part, "_fields") else type(part)(entries)

    return apply_to_collection(batch, (Tensor, list, tuple), changed)


def _has_entry_a_sample(part: list[Any] | tuple[Any, ...]) -> bool:
    """Tell whether a sequence with as many entries as samples is one of samples, not of fields."""
    if type(part) not in (list, tuple):  # a named tuple, a torch.Size
        return False
    if type(part) is tuple and _are_numbers(part):
        return False
    nested = all(type(entry) in (list, tuple) and len(entry) == len(part) for entry in part)
    if nested and not all(map(_are_numbers, part)):  # such as (texts, lengths) of two samples
        return False
    tensors: list[Tensor] = []
    change_tensors(part, tensors.append)
    return not tensors


def _are_numbers(entries: list[Any] | tuple[Any, ...]) -> bool:
    return all(entry is None or isinstance(entry, (int, float)) for entry in entries)


def _keywords(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {
        k: v for k, v in batch.items() if k not in LABEL_KEYS and (takes_any or k in parameters)
    }


def describe_batch(value: Any) -> str:
    """Return the form of a batch, or of a part of it, in a few words for a message.

    Example:
        >>> describe_batch((torch.ones(2, 3), [1]))
        'a tuple of Tensor, list'
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of " + ", ".join(type(v).__name__ for v in value[:4])
    return f"a {type(value).__name__}"
