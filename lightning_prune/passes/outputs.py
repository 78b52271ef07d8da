"""What a model's output has to look like to be read as it is said to be."""

from __future__ import annotations

from torch import Tensor


def check_classes(logits: Tensor) -> None:
    """Raise ValueError if logits (N, C) or (N, C, ...) are no distribution over several classes.

    A softmax over one class is 1 whatever the input, its argmax 0: everything would be known and
    nothing could be learnt, without a word.
    """
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            "Expected logits of shape (N, C) or (N, C, ...) with at least 2 classes for "
            f"likelihood='categorical', but got {tuple(logits.shape)}. For one logit an output use "
            "likelihood='bernoulli', for regression 'gaussian'."
        )
