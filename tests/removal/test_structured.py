"""Whole units and channels masked: they fall across everything that they are coupled with."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.networks import resnet20
from lightning_prune.removal import shrink, shrink_with_report
from tests.removal.shrink_cases import (
    ARCHITECTURES,
    fresh,
    in_double,
    largest_difference,
    made,
    masked,
    whole_units,
)

SHARE_LEFT = {
    "mlp": 0.4,
    "mlp_batch_norm": 0.4,
    "lenet": 0.35,
    "resnet": 0.3,
    "preact": 0.35,
    "densenet": 0.4,
    "mobilenet": 0.45,
    "decoder": 0.5,
    "unet": 0.3,
    "conv1d": 0.4,
    "conv3d": 0.4,
    "padded_pools": 0.35,
    "reflecting": 0.4,
    "embedding": 0.7,
    "highway": 0.35,
    "squeeze_excite": 0.35,
    "two_inputs": 0.55,
    "attention": 0.5,
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_smaller_model_computes_the_same(name: str, biases: bool) -> None:
    model, inputs = made(name, 3)
    model, inputs = model.double(), in_double(inputs)
    masks = whole_units(model, biases=biases)
    small, report = shrink_with_report(model, example_inputs=inputs, masks=masks)
    for each in fresh(inputs, 4):
        assert largest_difference(masked(model, masks), small, each) < 1e-9
    if biases:
        limit = SHARE_LEFT.get(name, 1.0) * report.parameters_before
        assert report.parameters_after <= limit


def _widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_half_of_the_channels_of_a_residual_network_is_half_of_every_width() -> None:
    torch.manual_seed(0)
    model = resnet20()
    small = shrink(
        model, example_inputs=torch.randn(2, 1, 32, 32), masks=whole_units(model, biases=True)
    )
    assert _widths(small) == [width // 2 for width in _widths(model)]
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):  # its statistics follow
            assert module.running_mean.shape == module.running_var.shape == module.weight.shape


def test_a_channel_that_lives_in_one_branch_of_a_sum_stays() -> None:
    model, inputs = made("resnet", 0)
    masks = whole_units(model, biases=True)
    for name in [n for n in masks if n.startswith(("4.two", "4.bn2"))]:
        del masks[name]
    small = shrink(model, example_inputs=inputs, masks=masks)
    assert small[3].two.out_channels == 4
    assert small[4].two.out_channels == small[4].skip[0].out_channels == 12
    assert small[5].two.out_channels == 12
    assert small[5].one.out_channels == 6


def test_channels_inside_of_blocks_fall_alone() -> None:
    model, inputs = made("resnet", 0)
    masks = {
        n: m for n, m in whole_units(model, biases=True).items() if ".one." in n or ".bn1." in n
    }
    small = shrink(model, example_inputs=inputs, masks=masks)
    assert [b.one.out_channels for b in small[3:6]] == [4, 6, 6]
    assert [b.two.in_channels for b in small[3:6]] == [4, 6, 6]
    assert [b.two.out_channels for b in small[3:6]] == [8, 12, 12]


def test_constant_channels_behind_zero_padding_become_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 2, 3, padding=1)).double()
    x = torch.randn(3, 1, 6, 6).double()
    with torch.no_grad():
        model[0].weight[2:] = 0
    small, report = shrink_with_report(model, example_inputs=x)
    assert small[0].out_channels == 3  # two that live, one for the six constants
    assert "at the border" in report.notes["0"][0]
    for each in fresh(x, 0):
        assert largest_difference(model, small, each) < 1e-9


def test_without_padding_all_constant_channels_go_into_the_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 2, 3, bias=False)).double()
    x = torch.randn(3, 1, 6, 6).double()
    with torch.no_grad():
        model[0].weight[2:] = 0
    small, report = shrink_with_report(model, example_inputs=x)
    assert small[0].out_channels == 2
    assert report.new_biases == ("2.bias",)
    constants = torch.sigmoid(model[0].bias[2:])
    expected = (model[2].weight[:, 2:].sum((2, 3)) * constants).sum(1)
    torch.testing.assert_close(small[2].bias, expected)


def test_channels_that_are_zero_fall_behind_padding_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight[2:], model[0].bias[2:] = 0, -0.5
    assert shrink(model, example_inputs=torch.randn(3, 1, 6, 6))[0].out_channels == 2


def test_depthwise_convolutions_follow() -> None:
    model, inputs = made("mobilenet", 0)
    small = shrink(model, example_inputs=inputs, masks=whole_units(model, biases=True))
    depthwise = [m for m in small.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [(m.in_channels, m.out_channels, m.groups) for m in depthwise] == [
        (4, 4, 4),
        (6, 6, 6),
    ]


def test_a_convolution_with_groups_loses_equally_many_of_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=3)).double()
    dead = [0, 3, 4, 6, 7, 8]
    with torch.no_grad():
        model[0].weight[dead] = 0
        model[0].bias[dead] = -1
    x = torch.randn(3, 1, 6, 6).double()
    small, report = shrink_with_report(model, example_inputs=x)
    # Groups 0 to 3, 4 to 7, 8 to 11 have 2, 3 and 1 dead channels: one of each falls.
    assert (small[0].out_channels, small[2].in_channels, small[2].groups) == (9, 9, 3)
    assert "stay for the width" in report.notes["0"][0]
    for each in fresh(x, 0):
        assert largest_difference(model, small, each) < 1e-9


@pytest.mark.parametrize(("round_to", "width"), [(1, 5), (2, 6), (4, 8), (8, 8), (16, 12), (3, 6)])
def test_widths_are_rounded_up(round_to: int, width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2))
    with torch.no_grad():
        model[2].weight[:, 5:] = 0
    small, _ = shrink_with_report(model, example_inputs=torch.randn(4, 3), round_to=round_to)
    assert small[0].out_features == small[2].in_features == width


def test_a_batch_norm_scale_of_zero_is_a_constant_channel() -> None:
    model, inputs = made("resnet", 0)
    model, inputs = model.double(), in_double(inputs)
    with torch.no_grad():  # network slimming: only scales are zero
        model[4].bn1.weight[::2] = 0
    small, report = shrink_with_report(model, example_inputs=inputs)
    # Shifts below zero die in the ReLU; the others become one channel behind the zero padding.
    shifts = model[4].bn1.bias[::2]
    assert small[4].one.out_channels == 6 + int(bool((shifts > 0).any()))
    assert report.parameters_after < report.parameters_before
    for each in fresh(inputs, 0):
        assert largest_difference(model, small, each) < 1e-9


def test_halves_that_are_multiplied_fall_together() -> None:
    model, inputs = made("split_in_two", 0)
    with torch.no_grad():
        model.head.weight[:, 2:] = 0
    small, report = shrink_with_report(model, example_inputs=inputs)
    assert (small.into.out_features, small.head.in_features) == (4, 2)
    assert report.origins["into.bias"].tolist() == [0, 1, 8, 9]
    for each in fresh(inputs, 0):
        assert largest_difference(model.double(), small.double(), each) < 1e-6


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    return h[:, :4], h[:, 4:]


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (lambda h: h + torch.cat(halves(h)[::-1], 1), 8),
        (lambda h: h * torch.cat(halves(h)[::-1], 1), 8),
        (lambda h: h[:, 1:] - h[:, :-1], 7),
        (lambda h: torch.cat([halves(h)[0] + halves(h)[1], h], 1), 12),
        (lambda h: h * 0.8 + torch.cat([-halves(h)[1], halves(h)[0]], 1) * 0.6, 8),  # rotated
    ],
)
def test_slices_that_meet_the_whole_are_kept_and_come_to_an_end(
    between: Callable[[Tensor], Tensor], width: int
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(between(self.first(x).relu()))

    def stop(*_: Any) -> None:
        raise TimeoutError("shrink goes round in circles")

    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight[[1, 5]] = 0
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        small, report = shrink_with_report(model, example_inputs=x)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "coupled among themselves" in report.whole["first"]
    torch.testing.assert_close(small.eval()(x), model.eval()(x))
