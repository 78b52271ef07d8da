"""All that least squares asks of a layer's inputs and targets: sums of products, batch by batch.

Enters: calls of a layer. Leaves: Gram and cross moments in float64, by group. Their size is that of
the weight's rows squared, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.passes.precision import precise_device
from lightning_prune.refit.columns import Linear, as_rows, chunks
from lightning_prune.refit.layers import Layer

BLOCKED_FROM = 128
"""Smaller Gram matrices are summed whole: their products take less time than several calls."""


@dataclass
class Moments:
    """Sums over samples and positions, for columns a (K) and targets z (D_out / G) of each group.

    With ``bias``, a column of ones is appended to a: K is then one more than a row of the weight.

    Args:
        bias: Whether the columns end with one of ones.
        gram: (G, K, K) the sum of a a^T, float64.
        cross: (G, K, D_out / G) the sum of a z^T; empty without targets.
        squared: The sum of z^2 over all outputs, a scalar on the device of the others.
        positions: How many positions were summed over.
    """

    bias: bool
    gram: Tensor
    cross: Tensor
    squared: Tensor
    positions: int = 0

    @classmethod
    def empty(cls, layer: Layer, *, bias: bool) -> Moments:
        """Return sums over nothing for a layer."""
        rows = as_rows(layer.module, layer.weight)
        size = rows.shape[2] + bias
        device = precise_device(rows.device)
        zeros = torch.zeros(
            rows.shape[0], size, size + rows.shape[1], dtype=torch.float64, device=device
        )
        gram, cross = zeros[..., :size].contiguous(), zeros[..., size:].contiguous()
        return cls(bias, gram, cross, zeros.new_zeros(()))

    @property
    def squares(self) -> float:
        """The sum of z^2 over all outputs."""
        return float(self.squared)

    def add(self, module: Linear, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add one call of the layer.

        Args:
            module: The layer.
            inputs: What it was called with.
            targets: What it should have returned, shaped like its output.
        """
        for columns, z in chunks(module, inputs, targets, bias=self.bias):
            for block, rest in _upper_blocks(self.gram):
                self.gram[:, block, rest].baddbmm_(columns[..., block].mT, columns[..., rest])
            self.positions += columns.shape[1]
            if z is not None:
                self.cross.baddbmm_(columns.mT, z)
                self.squared += z.square().sum()  # no float: that would wait for the device
        for block, _ in _upper_blocks(self.gram):
            right = slice(block.stop, None)
            self.gram[:, right, block] = self.gram[:, block, right].mT

    def error(self, rows: Tensor) -> float:
        """Return the squared error ``sum |a W^T - z|^2`` of rows W (G, D_out / G, K)."""
        quadratic = ((rows @ self.gram) * rows).sum()
        return float(quadratic - 2 * (rows * self.cross.mT).sum()) + self.squares


def _upper_blocks(gram: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of the blocks on and above the diagonal: the others mirror them.

    Four blocks of rows leave out three eighths of the products, and more of them gain no time.
    """
    size = gram.shape[-1]
    step = size if size < BLOCKED_FROM else -(-size // 4)
    for start in range(0, size, step):
        yield slice(start, start + step), slice(start, None)
