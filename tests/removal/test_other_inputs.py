"""A smaller model is right for inputs unlike the example: other masks, sizes and lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.removal import load_shrunk, save_shrunk, shrink_with_report
from lightning_prune.removal.probes import variants
from lightning_prune.removal.running import runner


class Between(nn.Module):
    """Two layers and something between them; three of the eight hidden units are constants."""

    def __init__(self, between: Callable[..., Tensor], first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.between, self.first, self.last = between, first, last
        with torch.no_grad():
            first.weight[:3] = 0
            first.bias[:3] = torch.tensor([0.5, 1.0, 1.5])

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.last(self.between(F.relu(self.first(x)), *more))


def linear(between: Callable[..., Tensor]) -> Between:
    torch.manual_seed(0)
    return Between(between, nn.Linear(6, 8), nn.Linear(8, 4)).double().eval()


def convolution(between: Callable[..., Tensor]) -> Between:
    torch.manual_seed(0)
    return Between(between, nn.Conv2d(3, 8, 1), nn.Linear(8, 4)).double().eval()


def masks() -> tuple[Tensor, Tensor]:
    nothing = torch.ones(4, 5, dtype=torch.bool)
    some = nothing.clone()
    some[1:, 3:] = False
    return nothing, some


MASKED = {
    "multiplied": lambda h, mask: h * mask.unsqueeze(-1),
    "filled": lambda h, mask: h.masked_fill(~mask.bool().unsqueeze(-1), 0.0),
    "chosen": lambda h, mask: torch.where(mask.bool().unsqueeze(-1), h, torch.zeros_like(h[:1])),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
@pytest.mark.parametrize("how", MASKED)
def test_an_example_without_padding(how: str, dtype: torch.dtype) -> None:
    model, x = linear(MASKED[how]), torch.randn(4, 5, 6, dtype=torch.float64)
    nothing, some = (mask.to(dtype) for mask in masks())
    small, _ = shrink_with_report(model, example_inputs=(x, nothing))
    for mask in (nothing, some):
        torch.testing.assert_close(small(x, mask), model(x, mask), rtol=1e-9, atol=1e-12)


def test_a_mask_of_zeros_that_means_no_padding() -> None:
    model = linear(lambda h, pad: h * (1 - pad).unsqueeze(-1))
    x, pad = torch.randn(4, 5, 6, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.long)
    small, _ = shrink_with_report(model, example_inputs=(x, pad))
    pad[2, 3:] = 1
    torch.testing.assert_close(small(x, pad), model(x, pad), rtol=1e-9, atol=1e-12)


def depthwise_mean() -> nn.Module:
    convolution = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


SIZED: dict[str, tuple[Between, list[tuple[int, ...]]]] = {
    "sum over positions": (linear(lambda h: h.sum(1)), [(4, 5, 6), (2, 9, 6), (2, 3, 6)]),
    "sum over places": (
        convolution(lambda h: h.sum((2, 3))),
        [(4, 3, 6, 6), (2, 3, 9, 9), (2, 3, 4, 6)],
    ),
    "mean behind padding": (
        convolution(depthwise_mean()),
        [(4, 3, 8, 8), (2, 3, 16, 16), (2, 3, 5, 7)],
    ),
    "padded average pool": (
        convolution(lambda h: F.avg_pool2d(h, 3, 2, 1).mean((2, 3))),
        [(4, 3, 10, 10), (2, 3, 20, 20), (2, 3, 8, 12)],
    ),
}


@pytest.mark.parametrize("name", SIZED)
def test_other_sizes_than_the_examples(name: str) -> None:
    model, shapes = SIZED[name]
    example = torch.randn(shapes[0], dtype=torch.float64)
    small, _ = shrink_with_report(model, example_inputs=example)
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)


ODD: dict[str, tuple[Between, tuple[Any, ...], tuple[Any, ...]]] = {
    "a mask with an axis of one": (
        linear(lambda h, mask: h * mask),
        (torch.randn(4, 5, 6).double(), torch.ones(4, 5, 1, dtype=torch.bool)),
        (torch.randn(4, 5, 6).double(), torch.ones(4, 5, 1).cumsum(1) < 3),
    ),
    "a flag a sample": (
        linear(lambda h, flag: h * flag),
        (torch.randn(4, 6).double(), torch.ones(4, 1, dtype=torch.long)),
        (torch.randn(4, 6).double(), torch.zeros(4, 1, dtype=torch.long)),
    ),
    "as many positions as features": (
        linear(lambda h: h.sum(1)),
        (torch.randn(4, 6, 6).double(),),
        (torch.randn(4, 9, 6).double(),),
    ),
    "one position": (
        linear(lambda h: h.sum(1)),
        (torch.randn(4, 1, 6).double(),),
        (torch.randn(4, 9, 6).double(),),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_forms_of_inputs(name: str) -> None:
    model, example, other = ODD[name]
    small, _ = shrink_with_report(model, example_inputs=example)
    for inputs in (example, other):
        torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-9, atol=1e-12)


def test_infinity_at_masked_places_hides_nothing() -> None:
    class Scored(Between):
        def forward(self, x: Tensor, *more: Tensor) -> Any:
            scores = x.sum(-1).masked_fill(~more[0], -torch.inf)
            return super().forward(x, *more), scores

    torch.manual_seed(0)
    model = Scored(lambda h, mask: h * mask[..., None], nn.Linear(6, 8), nn.Linear(8, 4)).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    nothing, some = masks()
    small, _ = shrink_with_report(model.eval(), example_inputs=(x, nothing))
    torch.testing.assert_close(small(x, some)[0], model(x, some)[0], rtol=1e-9, atol=1e-12)


class Growing(nn.Module):
    """Keeps a table of positions, which it lengthens when it has to, and scales by its length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.longest = nn.Linear(6, 8), nn.Linear(8, 4), 0
        self.register_buffer("table", torch.linspace(0, 1, 5)[:, None])
        with torch.no_grad():
            self.first.weight[:3] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, x.shape[1])
        if x.shape[1] > len(self.table):
            self.table = torch.linspace(0, 1, x.shape[1])[:, None]
        h = F.relu(self.first(x)) + 0 * self.table[: x.shape[1]]
        return self.last(h) * self.longest


def test_what_a_model_remembers_of_other_sizes_is_not_handed_on(tmp_path: Path) -> None:
    model, x = Growing(), torch.randn(4, 5, 6)
    small, report = shrink_with_report(model, example_inputs=x)
    assert report.parameters_after < report.parameters_before
    assert (len(small.table), small.longest, model.longest) == (5, 5, 0)
    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(tmp_path / "small.pt", Growing())
    torch.testing.assert_close(loaded.eval()(x), small.eval()(x))


@pytest.mark.parametrize(
    "x", [torch.randn(4, 6, dtype=torch.cfloat), torch.tensor([[2**63 - 1, 3], [5, 7]])]
)
def test_numbers_that_cannot_be_drawn_are_no_obstacle(x: Tensor) -> None:
    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(x.shape[1], 8), nn.Linear(8, 3)
            nn.init.zeros_(self.last.weight[:, :3])

        def forward(self, x: Tensor) -> Tensor:
            x = x.abs() if x.is_complex() else x % 10
            return self.last(F.relu(self.first(x.to(self.first.weight.dtype))))

    small, _ = shrink_with_report(Taking(), example_inputs=x)
    assert small.first.weight.shape[0] == 5


def test_what_is_constant_for_every_size_still_falls() -> None:
    model = convolution(lambda h: h.mean((2, 3)))
    small, _ = shrink_with_report(model, example_inputs=torch.randn(4, 3, 6, 6).double())
    assert small.first.weight.shape[0] == 5
    one_size = convolution(lambda h: h.flatten(1))
    one_size.last = nn.Linear(8 * 36, 4).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    small, _ = shrink_with_report(one_size, example_inputs=x)
    assert small.first.weight.shape[0] == 5
    torch.testing.assert_close(small(x), one_size(x), rtol=1e-9, atol=1e-12)


def taken(model: nn.Module, inputs: Any) -> list[Any]:
    return variants(inputs, model, runner(None))


def test_what_the_model_does_not_take_is_left_out() -> None:
    assert taken(nn.Linear(6, 2), torch.randn(4, 6)) == []
    shapes = [tuple(x.shape) for x in taken(nn.Conv1d(3, 2, 3), torch.randn(4, 3, 8))]
    assert shapes == [(2, 3, 16), (2, 3, 4)]

    class Divided(nn.Module):
        def forward(self, x: Tensor, count: Tensor) -> Tensor:
            return x / count

    found = taken(Divided(), (torch.zeros(50, 1), torch.ones(50, 3, dtype=torch.long)))
    assert found  # of other sizes
    assert all(bool(count.all()) for _, count in found)  # 0 / 0 is left out


def test_every_axis_of_a_size_changes_at_once() -> None:
    class Biased(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return (x @ x.mT + bias).softmax(-1)

    found = taken(Biased(), (torch.randn(4, 5, 6), torch.randn(5, 5)))
    assert [tuple(map(tuple, (x.shape, b.shape))) for x, b in found] == [
        ((2, 10, 6), (10, 10)),
        ((2, 2, 6), (2, 2)),
        ((2, 5, 12), (5, 5)),
        ((2, 5, 3), (5, 5)),
    ]
