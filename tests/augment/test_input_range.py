"""The learnt range: there and back, for whatever the user's transforms make of an input."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.augment.input_range import InputRange, find_units


@pytest.mark.parametrize("units", ["all", "channel", "feature"])
def test_mapping_there_and_back_is_the_identity(units):
    x = torch.randn(20, 3, 4, 4).double() * 50 - 7
    mapping = InputRange((3, 4, 4), units, batches=5).double()
    mapping.observe(x)
    unit = mapping(x)
    assert unit.min() == 0
    assert unit.max() == 1
    torch.testing.assert_close(mapping.inverse(unit), x)


def test_a_normalisation_is_undone():
    pictures = torch.rand(50, 3, 8, 8)
    pictures[0, :, 0, 0], pictures[1, :, 0, 0] = 0.0, 1.0
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    normalised = (pictures - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    mapping = InputRange((3, 8, 8), "channel", batches=5)
    mapping.observe(normalised)
    torch.testing.assert_close(mapping(normalised), pictures, atol=1e-5, rtol=0)


@pytest.mark.parametrize("units", ["all", "feature"])
def test_constant_elements_divide_by_nothing(units):
    x = torch.full((4, 3), 2.5)
    mapping = InputRange((3,), units, batches=5)
    mapping.observe(x)
    assert torch.equal(mapping(x), torch.zeros(4, 3))
    assert torch.equal(mapping.inverse(torch.zeros(4, 3)), x)


def test_nothing_seen_is_the_identity():
    mapping = InputRange((3,), "all", batches=5)
    x = torch.randn(4, 3)
    assert torch.equal(mapping(x), x)
    assert torch.equal(mapping.inverse(x), x)


def test_later_batches_widen_only_while_learning():
    mapping = InputRange((1,), "all", batches=2)
    for value in (1.0, 2.0, 1000.0):
        mapping.observe(torch.tensor([[0.0], [value]]))
    assert mapping.high.item() == 2.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_does_not_spoil_the_range(bad):
    mapping = InputRange((2,), "all", batches=9)
    mapping.observe(torch.tensor([[0.0, 4.0]]))
    mapping.observe(torch.tensor([[bad, 2.0]]))
    torch.testing.assert_close(mapping(torch.tensor([[0.0, 4.0]])), torch.tensor([[0.0, 1.0]]))


def test_units_of_pictures_and_of_tables(digits):
    assert find_units(digits.flatten(1)[:16]) == "all"
    assert find_units(torch.ones(4, 6)) == "all"
    assert find_units(torch.rand(2, 3, 2, 4, 4)) == "channel"
    assert find_units(torch.randn(32, 4) * torch.tensor([1e-3, 1.0, 30.0, 1e4])) == "feature"
