"""Scale and shift: normalisation layers and bare parameters.

Bare parameters are those that are added, multiplied or expanded outside of any layer.

With x the normalised input, y = x * weight + bias. A sample's gradient of the weight is the sum of
g x over everything the weight is broadcast over within the sample, that of the bias the sum of g.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.saliency.registry import Rule, in_score_precision, rule_for


class ScaleShift(Rule):
    """What the normalisation layers share: how x is found, and where the parameter's axes are."""

    def normalized(self) -> Tensor:
        """Return x, shaped like the call's output."""
        raise NotImplementedError

    def per_sample(self, role: str, gradient: Tensor, rows: slice) -> Tensor:  # noqa: D102
        product = (
            gradient if role == "bias" else in_score_precision(gradient) * self.cached_normalized()
        )
        return self.reduce(self.by_sample(product)[rows], self.arguments[role])

    def cached_normalized(self) -> Tensor:
        """Return x, computed at its first use."""
        if not hasattr(self, "_normalized"):
            self._normalized = in_score_precision(self.normalized())
        return self._normalized

    def reduce(self, product: Tensor, parameter: Tensor) -> Tensor:
        """Sum (m, T, C, ...) to (m, *parameter.shape).

        Here the parameter lies along the channels.
        """
        return product.sum([1, *range(3, product.ndim)])


@rule_for(F.layer_norm, torch.layer_norm)
class LayerNorm(ScaleShift):
    """``layer_norm(input, normalized_shape, weight, bias, eps)``."""

    signature: ClassVar[tuple[str, ...]] = ("input", "normalized_shape", "weight", "bias", "eps")

    def normalized(self) -> Tensor:  # noqa: D102
        a = self.arguments
        return F.layer_norm(a["input"], a["normalized_shape"], eps=a.get("eps", 1e-5))

    def reduce(self, product: Tensor, parameter: Tensor) -> Tensor:  # noqa: D102
        return product.sum(list(range(1, product.ndim - parameter.ndim)))


@rule_for(F.rms_norm, torch.rms_norm)
class RMSNorm(LayerNorm):
    """``rms_norm(input, normalized_shape, weight, eps)``."""

    signature: ClassVar[tuple[str, ...]] = ("input", "normalized_shape", "weight", "eps")

    def normalized(self) -> Tensor:  # noqa: D102
        a = self.arguments
        return F.rms_norm(a["input"], a["normalized_shape"], eps=a.get("eps"))


@rule_for(F.group_norm)
class GroupNorm(ScaleShift):
    """``group_norm(input, num_groups, weight, bias, eps)``."""

    signature = ("input", "num_groups", "weight", "bias", "eps")

    def normalized(self) -> Tensor:  # noqa: D102
        a = self.arguments
        return F.group_norm(a["input"], a["num_groups"], eps=a.get("eps", 1e-5))


@rule_for(F.instance_norm)
class InstanceNorm(ScaleShift):
    """``instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, ...)``."""

    signature = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "use_input_stats",
        "momentum",
        "eps",
    )

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Leave out a call that would update running statistics."""
        return arguments.get("running_mean") is None or not arguments.get("use_input_stats", True)

    def normalized(self) -> Tensor:  # noqa: D102
        a = self.arguments
        statistics = (a.get("running_mean"), a.get("running_var"))
        return F.instance_norm(
            a["input"],
            *statistics,
            use_input_stats=a.get("use_input_stats", True),
            eps=a.get("eps", 1e-5),
        )


@rule_for(F.batch_norm)
class BatchNorm(ScaleShift):
    """``batch_norm(input, running_mean, running_var, weight, bias, training=False, ...)``.

    The statistics are fixed.
    """

    signature = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )

    def normalized(self) -> Tensor:  # noqa: D102
        a = self.arguments
        return F.batch_norm(a["input"], a["running_mean"], a["running_var"], eps=a.get("eps", 1e-5))


class Elementwise(Rule):
    """A bare parameter, broadcast: d output / d parameter is a factor of the output's shape."""

    signature = ("first", "second")
    roles: ClassVar[tuple[str, ...]] = ("first", "second")
    inputs: ClassVar[tuple[str, ...]] = ("first", "second")

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Leave out rarely used scaling arguments."""
        return set(arguments) <= {"first", "second"}

    def factor(self, role: str) -> Tensor | float:
        """Return d output / d parameter, broadcastable to the output."""
        return 1.0

    def per_sample(self, role: str, gradient: Tensor, rows: slice) -> Tensor:  # noqa: D102
        product = self.by_sample(in_score_precision(gradient) * self.factor(role))[rows]
        shape, output = self.arguments[role].shape, self.layout.split(gradient, self.samples).shape
        # product is (m, T, *rest); align the parameter with the output from the right, and leave
        # the sample axis out.
        aligned = [1] * (len(output) - len(shape)) + list(shape)
        rest = list(output)
        del aligned[self.layout.axis], rest[self.layout.axis]
        summed = [i + 2 for i, length in enumerate(aligned) if length == 1 != rest[i]]
        return product.sum([1, *summed], keepdim=True).reshape(len(product), *shape)


@rule_for(torch.add, torch.Tensor.add, torch.Tensor.__radd__)
class Add(Elementwise):
    """``first + second``."""


@rule_for(torch.sub, torch.Tensor.sub)
class Subtract(Elementwise):
    """``first - second``."""

    def factor(self, role: str) -> float:  # noqa: D102
        return 1.0 if role == "first" else -1.0


@rule_for(torch.mul, torch.Tensor.mul, torch.Tensor.__rmul__)
class Multiply(Elementwise):
    """``first * second``."""

    def factor(self, role: str) -> Tensor | float:  # noqa: D102
        other: Tensor | float = self.arguments["second" if role == "first" else "first"]
        return in_score_precision(other) if isinstance(other, Tensor) else other


@rule_for(torch.Tensor.expand)
class Expand(Elementwise):
    """``parameter.expand(N, ...)``, as class tokens are."""

    signature = ("first", "sizes")
    roles = ("first",)
    inputs = ("first",)

    @classmethod
    def accepts(cls, arguments: Mapping[str, Any]) -> bool:
        """Cover every call: the sizes matter only through the gradient's shape."""
        return True
