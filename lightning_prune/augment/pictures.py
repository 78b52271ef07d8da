"""Samples -> one picture of them, side by side, where they can be looked at at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COLOURS = (1, 3)
"""Channel counts that a picture can have; other inputs are shown as their channels' mean."""


def picture_grid(samples: Tensor, *, columns: int = 8) -> Tensor | None:
    """Return a grid of samples as one picture (C, height, width) with values in [0, 1], on the CPU.

    Args:
        samples: (n, H, W), (n, C, H, W), or (n, D) with D a square number; any range of values.
        columns: Pictures a row.

    Returns:
        The grid, black where the last row is not full, one element between pictures; None for
        inputs that are no pictures.

    Example:
        >>> picture_grid(torch.rand(10, 64), columns=4).shape
        torch.Size([1, 28, 37])
        >>> picture_grid(torch.rand(10, 13)) is None
        True
    """
    pictures = _as_pictures(samples.detach())
    if pictures is None or not len(pictures):
        return None
    pictures = pictures.to("cpu", torch.float32)
    low, high = pictures.min(), pictures.max()
    pictures = (pictures - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    n, channels, height, width = pictures.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    grid = torch.zeros(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for index, picture in enumerate(pictures):
        top = 1 + index // columns * (height + 1)
        left = 1 + index % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = picture
    return grid


def log_picture(
    loggers: Iterable[Any], name: str, samples: Callable[[], Tensor], step: int
) -> None:
    """Hand a grid of samples to every logger that takes pictures; others are passed over.

    Args:
        loggers: Those with ``log_image`` (Weights & Biases), or with an ``experiment`` that has
            ``add_image`` (TensorBoard).
        name: What to call the picture.
        samples: Called once if any logger takes pictures.
        step: Where in the run this is.
    """
    by_name = [logger for logger in loggers if callable(getattr(logger, "log_image", None))]
    experiments = [getattr(logger, "experiment", None) for logger in loggers]
    writers: list[Any] = [e for e in experiments if callable(getattr(e, "add_image", None))]
    if not by_name and not writers:
        return
    grid = picture_grid(samples())
    if grid is None:
        return
    for writer in writers:
        writer.add_image(name, grid, step)
    for logger in by_name:
        pixels = (255 * grid).to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
        logger.log_image(key=name, images=[pixels], step=step)


def _as_pictures(samples: Tensor) -> Tensor | None:
    if samples.ndim == 2:
        side = math.isqrt(samples.shape[1])
        square = side > 1 and side * side == samples.shape[1]
        return samples.reshape(-1, 1, side, side) if square else None
    if samples.ndim == 3:
        return samples.unsqueeze(1)
    if samples.ndim == 4:
        return samples if samples.shape[1] in COLOURS else samples.float().mean(1, keepdim=True)
    return None
