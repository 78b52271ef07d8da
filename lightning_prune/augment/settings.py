"""The arguments of a VAE as plain values: suggested by a batch, checked before use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor

from lightning_prune.augment.input_range import Units, find_units
from lightning_prune.augment.likelihoods import LikelihoodName


def settings_for(x: Tensor) -> dict[str, Any]:
    """Return the arguments of a VAE that suits inputs like the batch (N, *shape).

    Bernoulli for pictures and for vectors with a background, i.e. a tenth of the values or more on
    an end of the range, as in a flattened picture; Gaussian for other vectors.

    Example:
        >>> import torch
        >>> settings_for(torch.rand(8, 28, 28))["likelihood"]
        'bernoulli'
        >>> settings_for(torch.randn(8, 5))["likelihood"]
        'gaussian'
    """
    x = x.detach().float()
    units = find_units(x)
    # Each end is taken once in any batch: of a few small vectors that would be a background.
    ends = [int((x == end).sum()) - 1 for end in (x.min(), x.max())]
    background = max(ends) / x.numel()
    if x.ndim == 2 and len(x) < 3 and background < 0.1:
        units = "feature"  # too few rows to compare columns by
    picture = x.ndim > 2 or (units == "all" and background >= 0.1)
    return {
        "shape": list(x.shape[1:]),
        "likelihood": "bernoulli" if picture else "gaussian",
        "units": units,
    }


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shape": (
        lambda shape: len(shape) > 0 and all(width >= 1 for width in shape),
        "positive sizes, at least one (one number a sample has shape (1,))",
    ),
    "hidden": (
        lambda hidden: hidden is None or (len(hidden) == 2 and min(hidden) >= 1),
        "two positive widths, or None",
    ),
    "width": (lambda width: width >= 1, "a positive number of channels"),
    "dimensions": (
        lambda dimensions: dimensions in (None, 1, 2, 3),
        "1 for signals, 2 for pictures, 3 for volumes, or None",
    ),
    "latent": (lambda latent: latent is None or latent >= 1, "positive, or None"),
    "likelihood": (
        lambda likelihood: likelihood in get_args(LikelihoodName),
        f"one of {get_args(LikelihoodName)}",
    ),
    "variance": (lambda variance: variance is None or variance > 0, "above 0, or None"),
    "units": (lambda units: units in get_args(Units), f"one of {get_args(Units)}"),
    "kl_weight": (lambda weight: weight >= 0, "0 or more"),
    "warmup": (lambda warmup: warmup >= 0, "a number of steps, 0 or more"),
    "levels": (lambda levels: levels >= 2, "at least 2 grey levels"),
    "free_bits": (lambda nats: 0 <= nats < float("inf"), "nats, 0 or more"),
    "classes": (lambda classes: classes is None or classes >= 1, "positive, or None"),
}
"""What each argument of a VAE has to be, as a test and in words."""


def argument_faults(settings: dict[str, Any]) -> list[str]:
    """Return one line for each argument that is out of range.

    Example:
        >>> argument_faults({"latent": 0, "levels": 256})
        ['`latent`: expected it to be positive, or None, but got 0']
    """
    return [
        f"`{name}`: expected it to be {CHECKS[name][1]}, but got {value!r}"
        for name, value in settings.items()
        if not CHECKS[name][0](value)
    ]


def raise_faults(kind: str, faults: list[str]) -> None:
    """Raise one ValueError that names all faults, if there are any."""
    if faults:
        raise ValueError("\n- ".join([f"{kind} cannot use its arguments:", *faults]))
