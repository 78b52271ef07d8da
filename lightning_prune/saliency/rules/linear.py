"""Matrix products: ``F.linear``, ``x @ W``, ``torch.addmm``.

With a the input and g the gradient at the output, a sample's gradient of the weight is
sum_t g_t a_t^T over its positions t. With one position the sum of squares over samples and
directions k splits into one matrix product, (sum_k g_k^2)^T (a^2), and no per-sample gradient is
formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.saliency.registry import Layout, Rule, rule_for


@rule_for(F.linear)
class Linear(Rule):
    """``linear(input, weight, bias)``: weight (D_out, D_in)."""

    signature: ClassVar[tuple[str, ...]] = ("input", "weight", "bias")

    def __init__(
        self, arguments: Mapping[str, Any], samples: int, layout: Layout, workspace: int
    ) -> None:
        super().__init__(arguments, samples, layout, workspace)
        self.activation = self._positions(arguments["input"])
        self.one_position = self.activation.shape[1] == 1
        self._squares: Tensor | None = None

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Cover batched inputs with a matrix as weight."""
        return bool(arguments["input"].ndim >= 2 and arguments["weight"].ndim == 2)

    def _positions(self, value: Tensor) -> Tensor:
        value = self.by_sample(value)
        return value.reshape(self.samples, -1, value.shape[-1])

    def add(self, gradient: Tensor, totals: Mapping[str, Tensor]) -> None:  # noqa: D102
        if not self.one_position:
            super().add(gradient, totals)
            return
        gradient = self._positions(gradient).squeeze(1)
        if self._squares is None:
            self._squares = gradient.square()
        else:
            self._squares.addcmul_(gradient, gradient)

    def finish(self, totals: Mapping[str, Tensor]) -> None:  # noqa: D102
        if self._squares is not None:
            self.add_squares(self._squares, self.activation.squeeze(1), totals)
            self._squares = None

    @classmethod
    def add_squares(cls, squares: Tensor, a: Tensor, totals: Mapping[str, Tensor]) -> None:
        """Add the scores of a layer with one position a sample.

        Args:
            squares: (N, D_out) squared gradients at the output, summed over directions.
            a: (N, D_in) the input.
            totals: Role -> running sum.
        """
        if "weight" in totals:
            cls.add_outer(totals["weight"], squares, a.square())
        if "bias" in totals:
            totals["bias"].add_(squares.sum(0))

    def per_sample(self, role: str, gradient: Tensor, rows: slice) -> Tensor:  # noqa: D102
        g = self._positions(gradient)[rows]
        return g.sum(1) if role == "bias" else self.outer(g, self.activation[rows])

    @staticmethod
    def outer(g: Tensor, a: Tensor) -> Tensor:
        """Return g^T a: (..., T, D_out) and (..., T, D_in) to (..., D_out, D_in)."""
        return g.transpose(-2, -1) @ a

    @staticmethod
    def add_outer(total: Tensor, g: Tensor, a: Tensor) -> None:
        """Add g^T a to ``total``."""
        total.addmm_(g.t(), a)


@rule_for(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
class MatMul(Linear):
    """``input @ weight`` with the parameter on the right: weight (D_in, D_out)."""

    signature: ClassVar[tuple[str, ...]] = ("input", "weight")

    @staticmethod
    def outer(g: Tensor, a: Tensor) -> Tensor:  # noqa: D102
        return a.transpose(-2, -1) @ g

    @staticmethod
    def add_outer(total: Tensor, g: Tensor, a: Tensor) -> None:  # noqa: D102
        total.addmm_(a.t(), g)


@rule_for(torch.addmm, torch.Tensor.addmm)
class AddMM(MatMul):
    """``addmm(bias, input, weight)``: bias (D_out,), weight (D_in, D_out)."""

    signature = ("bias", "input", "weight")

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Cover the call without scaling and with a vector as bias."""
        return arguments["bias"].ndim == 1 and not {"beta", "alpha"} & set(arguments)
