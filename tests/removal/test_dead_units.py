"""Which units fall, against a search for paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.removal import shrink, shrink_with_report
from tests.removal.shrink_cases import fresh, largest_difference, masked, scattered

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus, nn.ELU)


def network(widths: list[int], seed: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        parts += [nn.Linear(a, b, bias=bias), ACTIVATIONS[(seed + i) % len(ACTIVATIONS)]()]
    return nn.Sequential(*parts[:-1]).double()


def on_a_path(weights: list[Tensor]) -> list[set[int]]:
    """Return the hidden units on a path of weights from an input to an output, by a slow search.

    A unit that no path from an input reaches is a constant; one from which no output is reached is
    not needed.
    """
    nodes = [(0, i) for i in range(weights[0].shape[1])]
    edges = {
        (layer, i, j)
        for layer, weight in enumerate(weights)
        for j in range(weight.shape[0])
        for i in range(weight.shape[1])
        if weight[j, i] != 0
    }
    reached, front = set(nodes), nodes
    while front:
        front = [
            (layer + 1, j)
            for layer, i, j in edges
            if (layer, i) in reached and (layer + 1, j) not in reached
        ]
        reached |= set(front)
    last = len(weights)
    needed = {(last, j) for j in range(weights[-1].shape[0])}
    front = list(needed)
    while front:
        front = [
            (layer, i)
            for layer, i, j in edges
            if (layer + 1, j) in needed and (layer, i) not in needed
        ]
        needed |= set(front)
    return [{i for at, i in reached & needed if at == layer} for layer in range(1, last)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_exactly_the_units_on_no_path_fall(seed: int, bias: bool) -> None:
    model = network([6, 14, 12, 10, 3], seed, bias=bias)
    masks = scattered(model, (0.75, 0.8, 0.85, 0.9)[seed % 4])
    dense = masked(model, masks)
    alive = on_a_path([layer.weight for layer in dense if isinstance(layer, nn.Linear)])
    x = torch.randn(5, 6).double()
    small, report = shrink_with_report(model, example_inputs=x, masks=masks)
    layers = [layer for layer in small if isinstance(layer, nn.Linear)]
    if not all(alive):  # no path at all; a layer without a unit would be none: one stays
        assert [layer.out_features for layer in layers[:-1]][-1] == 1
        return
    assert [layer.out_features for layer in layers[:-1]] == [len(a) for a in alive]
    for i, units in enumerate(alive):
        name = f"{2 * i}.bias"
        if bias and name in report.origins:
            assert set(report.origins[name].tolist()) == units
    widths = [6, *(len(a) for a in alive), 3]
    count = sum(a * b for a, b in itertools.pairwise(widths))
    biases = sum(layer.out_features for layer in layers if layer.bias is not None)
    assert report.parameters_after == count + biases
    for each in fresh(x, seed):
        assert largest_difference(dense, small, each) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_channels_fall_by_the_same_rule(seed: int) -> None:
    torch.manual_seed(seed)
    convs = [nn.Conv2d(2, 10, 3), nn.ReLU(), nn.Conv2d(10, 12, 3), nn.BatchNorm2d(12), nn.ELU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 9), nn.Tanh(), nn.Linear(9, 3)]
    model = nn.Sequential(*convs, *head).double().eval()
    masks = scattered(model, 0.97)
    dense = masked(model, masks)
    first, second = (dense[i].weight.abs().sum((2, 3)) for i in (0, 2))
    third = dense[7].weight.abs().view(9, 12, 4).sum(2)  # four positions a channel
    alive = on_a_path([first, second, third, dense[9].weight])
    x = torch.randn(3, 2, 8, 8).double()
    small = shrink(model, example_inputs=x, masks=masks)
    widths = [small[0].out_channels, small[2].out_channels, small[7].out_features]
    assert widths == [max(1, len(a)) for a in alive]
    for each in fresh(x, seed):
        assert largest_difference(dense, small, each) < 1e-9


def test_what_falls_makes_more_fall() -> None:
    model = network([2, 3, 3, 3, 1], 0)
    with torch.no_grad():
        for layer in (0, 2, 4):
            model[layer].weight.copy_(torch.eye(3, model[layer].in_features))
        model[6].weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    # Unit 1 of the last hidden layer is not taken, so unit 1 before it is not, and so on.
    small, report = shrink_with_report(model, example_inputs=torch.randn(4, 2).double())
    assert [small[i].out_features for i in (0, 2, 4)] == [1, 1, 1]
    assert report.rounds >= 3


def test_no_bias_of_a_removed_unit_is_left() -> None:
    model = network([3, 6, 2], 2)
    with torch.no_grad():
        model[2].weight[:, 1:] = 0
    small = shrink(model, example_inputs=torch.randn(4, 3).double())
    assert {name: tuple(p.shape) for name, p in small.named_parameters()} == {
        "0.weight": (1, 3),
        "0.bias": (1,),
        "2.weight": (2, 1),
        "2.bias": (2,),
    }


def test_a_network_that_takes_nothing_keeps_one_unit() -> None:
    model = network([3, 6, 2], 2)
    with torch.no_grad():
        model[0].weight.zero_()
    small, report = shrink_with_report(model, example_inputs=torch.randn(4, 3).double())
    assert small[0].out_features == 1
    assert "the last one" in report.notes["0"][0]
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(small(x), model(x))


def test_outputs_are_never_cut() -> None:
    model = network([3, 6, 4], 2)
    with torch.no_grad():
        model[2].weight[1:] = 0
        model[2].bias[1:] = 0
    with pytest.warns(UserWarning, match=r"Nothing was removed\.(.|\n)*outputs of the model"):
        assert shrink(model, example_inputs=torch.randn(4, 3).double())[2].out_features == 4
