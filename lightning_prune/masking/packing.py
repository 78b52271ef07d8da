"""Masks at one bit a weight, for checkpoints: plain tensors, lists and strings only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_prune._types import Masks


def pack_masks(masks: Masks) -> dict[str, Any]:
    """Return masks as one tensor of bytes, eight weights each, and the names and shapes to undo it.

    The result loads with ``torch.load(weights_only=True)``. All masks share one tensor because a
    checkpoint spends some hundred bytes on each tensor it holds.

    Example:
        >>> packed = pack_masks({"weight": torch.tensor([[True, False, True]])})
        >>> packed["bits"].numel(), unpack_masks(packed)
        (1, {'weight': tensor([[ True, False,  True]])})
    """
    flat = [mask.detach().reshape(-1).cpu() for mask in masks.values()]
    bits = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.bool)
    padded = torch.zeros(-(-bits.numel() // 8), 8, dtype=torch.bool)
    padded.view(-1)[: bits.numel()] = bits
    packed = (padded * _place_values()).sum(1, dtype=torch.uint8)
    return {
        "names": list(masks),
        "shapes": [list(mask.shape) for mask in masks.values()],
        "bits": packed,
    }


def unpack_masks(packed: dict[str, Any]) -> Masks:
    """Return the masks that :func:`pack_masks` has packed, on the CPU.

    Raises:
        ValueError: The bits are fewer or more than the shapes ask for.
    """
    shapes: list[list[int]] = packed["shapes"]
    sizes = [math.prod(shape) for shape in shapes]
    stored: Tensor = packed["bits"]
    if stored.numel() != -(-sum(sizes) // 8):
        raise ValueError(
            f"Expected {-(-sum(sizes) // 8)} bytes for masks of {sum(sizes)} weights, but got "
            f"{stored.numel()}. Is the checkpoint damaged?"
        )
    bits = (stored.cpu()[:, None] & _place_values()).bool().view(-1)[: sum(sizes)]
    return {
        name: part.view(shape).clone()
        for name, part, shape in zip(packed["names"], torch.split(bits, sizes), shapes, strict=True)
    }


def _place_values() -> Tensor:
    return torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)
