"""Convolutions in one, two and three dimensions, and transposed ones.

Unfolded to columns, a convolution is a matrix product with the output's places as positions: a
sample's gradient of the weight is g (D_out, T) times columns^T (T, D_in * kernel). A transposed
convolution swaps the roles: its output gradient is what gets unfolded and its input multiplies it.
Padding modes other than zeros are a pad call of their own before the convolution, so nothing about
them is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from lightning_prune.saliency.registry import Layout, Rule, in_score_precision, rule_for

COLUMN_BYTES = 8 * 2**20
"""Unfolded inputs are held in chunks of about this size."""


@rule_for(F.conv1d, F.conv2d, F.conv3d)
class Conv(Rule):
    """``convNd(input, weight, bias, stride, padding, dilation, groups)``.

    The weight is (D_out, D_in / groups, *kernel).
    """

    signature: ClassVar[tuple[str, ...]] = (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "dilation",
        "groups",
    )
    layouts = (Layout.FIRST,)

    def __init__(
        self, arguments: Mapping[str, Any], samples: int, layout: Layout, workspace: int
    ) -> None:
        super().__init__(arguments, samples, layout, workspace)
        self.kernel = tuple(arguments["weight"].shape[2:])
        dims = len(self.kernel)
        self.stride = _each(arguments.get("stride", 1), dims)
        self.dilation = _each(arguments.get("dilation", 1), dims)
        self.groups: int = arguments.get("groups", 1)
        self.padding = _padding(arguments.get("padding", 0), self.kernel, self.dilation)
        self.folded = arguments["input"].shape[0] // samples
        self._columns: Tensor | None = None

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Cover batched inputs."""
        same_rank: bool = arguments["input"].ndim == arguments["weight"].ndim
        return same_rank

    def chunk(self, parameter: Tensor) -> int:
        """Keep the columns in the cache as well as the gradients."""
        places = math.prod(self.image().shape[2:]) * self.folded
        columns: int = places * self.image().shape[1] * math.prod(self.kernel)
        columns *= parameter.element_size()
        room = min(COLUMN_BYTES, self.workspace)
        return max(1, min(super().chunk(parameter), room // max(1, columns)))

    def image(self) -> Tensor:
        """Return what is unfolded when it does not depend on the direction."""
        image: Tensor = self.arguments["input"]
        return image

    def per_sample(self, role: str, gradient: Tensor, rows: slice) -> Tensor:  # noqa: D102
        if role == "bias":
            return self.by_sample(gradient)[rows].sum([1, *range(3, gradient.ndim + 1)])
        g = self._rows(gradient, rows)
        return self._products(self._cached_columns(rows, tuple(g.shape[2:])), g)

    def _rows(self, value: Tensor, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.samples)
        return in_score_precision(value[start * self.folded : stop * self.folded])

    def _cached_columns(self, rows: slice, places: tuple[int, ...]) -> Tensor:
        """Unfold the input once for all directions where that fits the workspace."""
        image = self.arguments["input"]
        size = len(image) * image.shape[1] * math.prod(self.kernel) * math.prod(places) * 4
        if not self.reused or size > self.workspace // 2:
            return self._unfold(self._rows(image, rows), places)
        if self._columns is None:
            self._columns = self._unfold(in_score_precision(image), places)
        return self._rows(self._columns, rows)

    def _unfold(self, image: Tensor, places: tuple[int, ...]) -> Tensor:
        """Return columns (M, groups, D_in / groups * kernel, T)."""
        image = F.pad(image, self.padding).contiguous()
        batch, channels, *steps = image.stride()
        columns = image.as_strided(
            (*image.shape[:2], *self.kernel, *places),
            (
                batch,
                channels,
                *map(math.prod, zip(steps, self.dilation, strict=True)),
                *map(math.prod, zip(steps, self.stride, strict=True)),
            ),
        )
        return columns.reshape(len(image), self.groups, -1, math.prod(places))

    def _products(self, columns: Tensor, g: Tensor) -> Tensor:
        """Return (m, *weight.shape) from columns (M, groups, D, T) and g (M, D_out, *places).

        M = m * folded.
        """
        g = g.reshape(len(g), self.groups, -1, columns.shape[-1])
        products = g @ columns.transpose(2, 3)
        if self.folded > 1:
            products = products.reshape(-1, self.folded, *products.shape[1:]).sum(1)
        return products.reshape(len(products), *self.arguments["weight"].shape)


@rule_for(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
class ConvTranspose(Conv):
    """``conv_transposeNd(input, weight, ...)``: weight (D_in, D_out / groups, *kernel)."""

    signature = (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    )

    def per_sample(self, role: str, gradient: Tensor, rows: slice) -> Tensor:  # noqa: D102
        if role == "bias":
            return super().per_sample(role, gradient, rows)
        image = self._rows(self.arguments["input"], rows)
        columns = self._unfold(self._rows(gradient, rows), tuple(image.shape[2:]))
        return self._products(columns, image)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)


def _padding(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Return F.pad's list: last dimension first, before and after."""
    if isinstance(padding, str):
        total = [
            d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
        ]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in _each(padding, len(kernel))]
    return [amount for pair in reversed(pairs) for amount in pair]
