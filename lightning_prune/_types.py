"""The few types that the rooms of the house hand to one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

Scores: TypeAlias = dict[str, Tensor]
"""One score tensor a parameter, shaped like it, keyed by its full ``named_parameters()`` name."""

Masks: TypeAlias = dict[str, Tensor]
"""One bool tensor a parameter, keyed like :data:`Scores`; ``True`` marks a weight that is kept."""

Likelihood: TypeAlias = Literal["categorical", "bernoulli", "gaussian"]
"""How a model's output is read: logits over classes, logits of independent bits, a regression."""

Forward: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""``forward(module, batch) -> logits``: how a batch of any form becomes the model's output."""
