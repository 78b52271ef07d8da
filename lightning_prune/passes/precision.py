"""What a device lacks is computed on the CPU: float64, sums that repeat to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no float64."""


def precise_device(device: torch.device) -> torch.device:
    """Return where float64 for tensors of a device is: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its :func:`precise_device`."""
    return tensor.to(precise_device(tensor.device)).double()


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating point type of a device, for what has to stay there."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def running_sum(values: Tensor) -> Tensor:
    """Return the running sum over axis 0.

    On the CPU where deterministic algorithms are asked for: CUDA has none for it, and raises.
    """
    if torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(0).to(values.device)
    return values.cumsum(0)
