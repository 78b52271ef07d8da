"""What is wrong with masks, for whoever takes some."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune._types import Masks


def mask_faults(masks: Masks, parameters: Mapping[str, Tensor]) -> list[str]:
    """List the masks that fit no parameter; empty if all is fine.

    Example:
        >>> mask_faults({"w": torch.ones(2, dtype=torch.bool)}, {"weight": torch.ones(2)})
        ["masks['w']: there is no parameter of this name to mask"]
    """
    faults = []
    for name, mask in masks.items():
        if name not in parameters:
            faults.append(f"masks[{name!r}]: there is no parameter of this name to mask")
        elif mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            faults.append(
                f"masks[{name!r}]: expected a bool tensor of shape "
                f"{tuple(parameters[name].shape)}, but got {mask.dtype} {tuple(mask.shape)}"
            )
    return faults
