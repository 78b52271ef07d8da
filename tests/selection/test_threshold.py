"""The published form: a weight stays when its score is strictly above T."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_prune._targets import Threshold
from lightning_prune.selection import keep_above


def test_strictly_above() -> None:
    scores = {"a": torch.tensor([0.0, 1e-6, 2e-6]), "b": torch.tensor([[1.0]])}
    masks = keep_above(scores, Threshold(torch.tensor(1e-6).item()))
    assert masks["a"].tolist() == [False, False, True]
    assert masks["b"].tolist() == [[True]]
    assert keep_above(scores, Threshold(0))["a"].tolist() == [False, True, True]


def test_removed_weights_stay_removed() -> None:
    masks = {"a": torch.tensor([False, True])}
    scores = {"a": torch.ones(2), "b": torch.ones(1)}
    found = keep_above(scores, Threshold(0.5), masks=masks)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "a": [False, True],
        "b": [True],
    }
    assert masks["a"].tolist() == [False, True]


def test_a_layer_may_lose_everything() -> None:
    assert not keep_above({"a": torch.ones(3)}, Threshold(1.0))["a"].any()


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_unusable_thresholds_are_refused(value) -> None:
    with pytest.raises(ValueError, match="Threshold"):
        Threshold(value)


@pytest.mark.parametrize("value", ["1e-6", None, True])
def test_thresholds_are_numbers(value) -> None:
    with pytest.raises(TypeError, match="Threshold"):
        Threshold(value)


def test_thresholds_compare_by_value_and_cannot_be_changed() -> None:
    assert Threshold(1) == Threshold(1.0) != Threshold(2.0)
    with pytest.raises(AttributeError):
        Threshold(1.0).value = 2.0
