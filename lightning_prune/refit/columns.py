"""A layer's call as a matrix product: inputs -> columns, outputs -> rows of pre-activations.

Enters: one call of a linear layer or a convolution. Leaves: columns a and outputs z with
``z = a W^T + b``, by group, for any stride, padding, dilation and number of groups; in float64 and
in chunks, never for all samples at once. A convolution's places are the positions of its samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.passes.precision import precise

Linear: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""The layers whose output is columns times a matrix."""

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

CHUNK_BYTES = 8 * 2**20
"""Columns are held in chunks of about this size: they stay in a processor's cache until used."""


def groups(module: Linear) -> int:
    """Return into how many parts the layer's inputs and outputs fall (1 for a linear layer)."""
    return 1 if isinstance(module, nn.Linear) else module.groups


def as_rows(module: Linear, weight: Tensor) -> Tensor:
    """Reshape something of the weight's shape to (G, D_out / G, K), one row an output.

    Example:
        >>> conv = nn.Conv2d(4, 6, 3, groups=2)
        >>> as_rows(conv, conv.weight).shape
        torch.Size([2, 3, 18])
    """
    return weight.reshape(groups(module), weight.shape[0] // groups(module), -1)


def chunks(
    module: Linear, inputs: Tensor, outputs: Tensor | None = None, *, bias: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield columns and outputs of one call, some positions at a time.

    Args:
        module: The layer; its weight is not read.
        inputs: What it was called with, of any shape that it takes.
        outputs: What came out, or ``None``.
        bias: Append a column of ones, which is what a bias multiplies.

    Yields:
        Columns (G, M, K) and outputs (G, M, D_out / G), or ``None``, in float64; K is the length of
        a row of the weight (see :func:`as_rows`), with ``bias`` one more, and M counts samples and
        positions.

    Example:
        >>> import torch
        >>> conv = nn.Conv1d(2, 4, 3, padding=1, bias=False)
        >>> x = torch.randn(5, 2, 7)
        >>> (a, z), = chunks(conv, x, conv(x).detach())
        >>> a.shape, z.shape
        (torch.Size([1, 35, 6]), torch.Size([1, 35, 4]))
        >>> bool(torch.allclose(a @ as_rows(conv, conv.weight).double().mT, z, atol=1e-5))
        True
    """
    if isinstance(module, nn.Linear):
        inputs = inputs.reshape(-1, inputs.shape[-1])
        outputs = None if outputs is None else outputs.reshape(-1, outputs.shape[-1])
        size = inputs.shape[-1]
    else:
        dims = len(module.kernel_size)
        if inputs.ndim == dims + 1:  # without a batch axis
            inputs = inputs[None]
            outputs = None if outputs is None else outputs[None]
        size = math.prod(inputs.shape[1:]) * math.prod(module.kernel_size)
        size = size // math.prod(module.stride)
    step = max(1, CHUNK_BYTES // (8 * max(1, size)))
    for start in range(0, len(inputs), step):
        a = _columns(module, precise(inputs[start : start + step].detach()), bias=bias)
        if outputs is None:
            yield a, None
        else:
            yield a, _positions(module, precise(outputs[start : start + step].detach()))


def _columns(module: Linear, inputs: Tensor, *, bias: bool) -> Tensor:
    """Unfold inputs (M, K) or (N, C, ...) to (G, M, K), with ``bias`` (G, M, K + 1).

    The columns of a convolution lie one after the other in memory, each a picture moved by so many
    pixels: they are written in long runs, and their products take a quarter less time.
    """
    if isinstance(module, nn.Linear):
        return F.pad(inputs[None], (0, int(bias)), value=1.0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(inputs, list(module._reversed_padding_repeated_twice), mode=mode)
    dims = len(module.kernel_size)
    for axis in range(dims):
        kernel, dilation = module.kernel_size[axis], module.dilation[axis]
        windows = windows.unfold(axis + 2, dilation * (kernel - 1) + 1, module.stride[axis])
        windows = windows[..., ::dilation]
    shape = (len(windows), module.groups, windows.shape[1] // module.groups, *windows.shape[2:])
    windows = windows.reshape(shape)  # (N, G, C / G, *places, *kernel)
    places = [3 + axis for axis in range(dims)]
    kernel_axes = [3 + dims + axis for axis in range(dims)]
    windows = windows.permute(1, 2, *kernel_axes, 0, *places)
    size = math.prod(windows.shape[1 : 2 + dims])
    columns = inputs.new_empty(module.groups, size + bias, math.prod(windows.shape[2 + dims :]))
    columns[:, :size].view(windows.shape).copy_(windows)
    columns[:, size:] = 1
    return columns.mT


def _positions(module: Linear, outputs: Tensor) -> Tensor:
    """Reshape outputs (M, D) or (N, D, ...) to (G, M, D / G)."""
    if isinstance(module, nn.Linear):
        return outputs[None]
    rows = outputs.movedim(1, -1).reshape(-1, module.groups, outputs.shape[1] // module.groups)
    return rows.movedim(1, 0)
