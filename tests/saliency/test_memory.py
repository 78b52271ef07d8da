"""How many copies of the scores it takes to score."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune import SaliencyAccumulator, squared_gradients

MIB = 2**20


class Held(TorchDispatchMode):
    """Count the bytes of all tensors that came out of an operation and are still there.

    Attributes:
        most: The largest count so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[weakref.ref[Any], int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in tree_leaves(args) if _plain(each)}
        for each in tree_leaves(found):
            if _plain(each) and id(each.untyped_storage()) not in given:
                storage = each.untyped_storage()
                self._sizes[weakref.ref(storage, self._sizes.pop)] = storage.nbytes()
        self.most = max(self.most, sum(self._sizes.values()))
        return found


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor)


def network(width: int, layers: int) -> nn.Module:
    """Return a network that is nearly all hidden layers."""
    hidden = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 3))


@pytest.mark.parametrize(("layers", "copies"), [(1, 3.2), (8, 1.4)])
def test_scores_take_little_more_than_themselves(layers: int, copies: float) -> None:
    """Beside the sums there are two copies of the parameter that is being proved."""
    model, x = network(512, layers), torch.randn(8, 512)
    scores = sum(p.nbytes for p in model.parameters())
    with Held() as held:
        squared_gradients(model, [x, x], workspace=8 * MIB)
    assert scores < held.most < copies * scores


def test_given_logits_take_one_more_copy() -> None:
    model, x = network(512, 8), torch.randn(8, 512)
    scores = sum(p.nbytes for p in model.parameters())
    logits = model(x).detach()
    with Held() as held:
        accumulator = SaliencyAccumulator(model, workspace=8 * MIB)
        accumulator.update(x, logits)
    assert held.most < 2.2 * scores


def test_a_metric_that_was_reset_counts_from_nothing_again() -> None:
    model, x = network(16, 1), torch.randn(8, 16)
    accumulator = SaliencyAccumulator(model)
    accumulator.update(x)
    first = accumulator.compute()
    for _ in range(2):
        accumulator.reset()
        assert not any(total.any() for total in accumulator.sums.values())
        accumulator.update(x)
        assert all(map(torch.equal, accumulator.compute().values(), first.values()))
    assert all(not score.eq(0).all() for score in first.values())
