"""Table look-ups: ``F.embedding``.

A sample's gradient of row v is the sum of g over the places where the sample holds v, so repeated
indices are summed before they are squared. The table itself is never written out per sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.saliency.registry import Rule, rule_for


@rule_for(F.embedding)
class Embedding(Rule):
    """``embedding(input, weight, padding_idx, ...)``: input (N, ...) indices, weight (V, D)."""

    signature = (
        "input",
        "weight",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    roles = ("weight",)

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Leave out the options that change the table or its gradient."""
        return (
            arguments.get("max_norm") is None
            and not arguments.get("scale_grad_by_freq")
            and not arguments.get("sparse")
        )

    def _summed(self, gradient: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return each distinct pair in ``rows``, and its summed gradient.

        That is sample (U,), index (U,) and gradient (U, D).
        """
        index = self.layout.split(self.arguments["input"], self.samples)
        index = index.movedim(self.layout.axis, 0).reshape(self.samples, -1)[rows]
        width = gradient.shape[-1]
        g = self.by_sample(gradient)
        g = g.reshape(self.samples, -1, width)[rows].reshape(-1, width)
        vocabulary = self.arguments["weight"].shape[0]
        key = index + torch.arange(len(index), device=index.device)[:, None] * vocabulary
        distinct, where = key.flatten().unique(return_inverse=True)
        summed = g.new_zeros(len(distinct), width).index_add_(0, where, g)
        sample, entry = distinct // vocabulary, distinct % vocabulary
        padding = self.arguments.get("padding_idx")
        if padding is not None:
            summed[entry == padding % vocabulary] = 0.0
        return sample, entry, summed

    def add(self, gradient: Tensor, totals: Mapping[str, Tensor]) -> None:  # noqa: D102
        _, entry, summed = self._summed(gradient, slice(None))
        totals["weight"].index_add_(0, entry, summed.square_())

    def per_sample(self, role: str, gradient: Tensor, rows: slice) -> Tensor:  # noqa: D102
        sample, entry, summed = self._summed(gradient, rows)
        start, stop, _ = rows.indices(self.samples)
        out = summed.new_zeros(stop - start, *self.arguments["weight"].shape)
        out[sample, entry] = summed
        return out
