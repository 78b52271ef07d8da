"""A batch -> its inputs and labels told from the rest, the inputs in a space that can be learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_prune.augment.mixing import BatchForm
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import change_parts
from lightning_prune.passes.isolation import own_randomness
from lightning_prune.saliency import read_inputs, read_labels


def read_form(batch: Any, name: str) -> BatchForm:
    """Tell a batch's inputs and labels from the rest.

    Raises:
        BatchFormatError: It has no one input tensor.
    """
    try:
        x = read_inputs(batch)
    except BatchFormatError as error:
        got = f"a dict with the keys {list(batch)}" if isinstance(batch, Mapping) else type(batch)
        raise BatchFormatError(
            f"{name}: the generator learns one input tensor a batch: `x` in a batch `x` "
            "or `(x, ...)`, or the only entry beside the labels in a dict; but it got "
            f"{got}. Put what it should learn into one tensor, and take it apart again in the "
            "model; how batches reach the model (`forward=`) does not change that."
        ) from error
    y = read_labels(batch)
    # In a container of our own: a training step may put other tensors into the user's.
    own = change_parts(batch, len(x), lambda part: part)
    return BatchForm(own, x, y if y is not None and y.shape[:1] == x.shape[:1] else None)


def encoded(form: BatchForm, encode: Callable[[Tensor], Tensor], name: str) -> BatchForm:
    """Return a batch with encoded inputs in place of its own.

    Args:
        form: The user's batch.
        encode: Inputs (N, ...) -> a float tensor (N, ...). Runs without gradient, and on random
            numbers that are put back.
        name: What to call the callback in messages.

    Raises:
        MisconfigurationException: ``encode`` returned something else.
    """
    x = form.inputs
    with torch.inference_mode(False), torch.no_grad(), own_randomness(x.device, "encode"):
        inputs: Any = encode(x.clone() if x.is_inference() else x)
    if (
        not isinstance(inputs, Tensor)
        or not inputs.is_floating_point()
        or inputs.ndim < 2
        or inputs.shape[:1] != x.shape[:1]
    ):
        found = type(inputs).__name__
        if isinstance(inputs, Tensor):
            found = f"{inputs.dtype} of shape {tuple(inputs.shape)}"
        raise MisconfigurationException(
            f"{name}: expected `encode` to return a floating-point tensor ({len(x)}, ...) with a "
            f"row for each of the batch's {len(x)} inputs, but got {found}."
        )
    inputs = inputs.detach()
    return BatchForm(form.fill(inputs, form.labels), inputs, form.labels)
