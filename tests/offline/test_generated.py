"""How many generated inputs join: what the trial says, and that it leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune
from lightning_prune.offline.generated import (
    NUMBERS,
    chosen_batches,
    fewest_that_help,
    group_divergences,
)
from lightning_prune.passes.batches import batch_size, default_forward
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import Calibration, hold_out


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(x).float().div(16)[order], torch.from_numpy(y).long()[order]


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = digits[0][:1000], digits[1][:1000]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(20):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model


class Source:
    """A generator that gives what a function makes of unseen real digits."""

    def __init__(self, x: Tensor, change: Any = None) -> None:
        self.x, self.change, self.asked = x, change, 0

    def sample(self, n: int) -> Tensor:
        self.asked += n
        x = self.x[torch.randint(len(self.x), (n,))]
        return x if self.change is None else self.change(x)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


OPTIONS: dict[str, Any] = {"sparsity": 0.8, "stages": 3, "criterion": "obs", "refit": "layers"}


def test_few_real_samples_take_generated_ones_that_are_as_good(trained, digits) -> None:
    few = [digits[0][1000:1040]]
    net, alone = copy.deepcopy(trained), copy.deepcopy(trained)
    prune(net, few, generator=Source(digits[0][:900]), generated="auto", **OPTIONS)
    prune(alone, few, **OPTIONS)
    right = [
        float((m(digits[0][1100:]).argmax(1) == digits[1][1100:]).float().mean())
        for m in (net, alone)
    ]
    assert right[0] > right[1] + 0.02


def test_what_does_harm_is_left_out_and_the_trials_leave_no_trace(trained, digits) -> None:
    # 30 times the range: inputs like none of the real ones, and 2,000 of them.
    harm = Source(digits[0][:900], lambda x: torch.rand_like(x) * 30)
    real = [digits[0][:600], digits[0][600:1000]]
    net, alone = copy.deepcopy(trained), copy.deepcopy(trained)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    masks = prune(net, real, generator=harm, generated="auto", **OPTIONS)
    assert torch.equal(before, torch.get_rng_state())
    assert harm.asked == NUMBERS[-1]
    expected = prune(alone, real, **OPTIONS)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert equal(net, alone)


def test_a_trial_that_fails_leaves_the_model_as_it_was(trained, digits) -> None:
    net = copy.deepcopy(trained)
    nan = Source(digits[0], lambda x: x * float("nan"))
    with pytest.raises(Exception, match=r"(?i)finite|nan"):
        prune(net, [digits[0][:200]], generator=nan, generated="auto", **OPTIONS)
    assert equal(net, trained)


def test_auto_is_the_only_word(trained, digits) -> None:
    with pytest.raises(ValueError, match="generated"):
        prune(
            trained,
            [digits[0][:20]],
            sparsity=0.5,
            generator=Source(digits[0]),
            generated="many",
        )


@pytest.mark.parametrize(("count", "trials"), [(9, 0), (10, 2), (99, 2), (100, 1)])
def test_every_trial_sees_the_rest_and_is_judged_by_what_it_left_out(count, trials) -> None:
    asked: list[Any] = []

    def trial(real: list[Tensor], extra: list[Tensor], unseen: list[Tensor]) -> Tensor:
        asked.append((torch.cat(real), sum(map(batch_size, extra)), torch.cat(unseen)))
        return torch.full((3,), abs(asked[-1][1] - 1000.0), dtype=torch.float64)

    def draw(number: int | None) -> list[Tensor]:
        return list(torch.arange(2500 if number is None else number).split(300))

    real = list(torch.arange(count).split(7))
    found = chosen_batches(trial, real, draw)
    if not trials:
        assert not asked
        assert sum(map(len, found)) == 2500
        return
    assert sum(map(len, found)) == 1000
    assert [n for _, n, _ in asked] == [n for n in (0, *NUMBERS) for _ in range(trials)]
    for fit, _, unseen in asked:
        assert sorted([*fit.tolist(), *unseen.tolist()]) == list(range(count))
        assert len(unseen) in (count // 5, count // 5 + 1)
    judged = torch.cat([unseen for _, n, unseen in asked if n == 0])
    assert len(judged.unique()) == len(judged)


def test_the_choice_by_brute_force() -> None:
    random = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        found = {n: torch.rand(8, generator=random, dtype=torch.float64) for n in (0, *NUMBERS)}
        means = {n: sum(d.tolist()) / 8 for n, d in found.items()}
        best = min(means, key=lambda n: means[n])
        gains = [a - b for a, b in zip(found[0].tolist(), found[best].tolist(), strict=True)]
        mean = sum(gains) / 8
        error = (sum((g - mean) ** 2 for g in gains) / 7 / 8) ** 0.5
        expected = best if mean > error else 0
        assert fewest_that_help(found) == expected
        seen.add(expected)
    assert seen == {0, *NUMBERS}


def test_what_is_not_finite_is_not_chosen() -> None:
    bad, good = torch.tensor([0.0, float("nan")]), torch.tensor([1.0, 1.0])
    assert fewest_that_help({0: good, 250: bad}) == 0
    assert fewest_that_help({0: bad, 250: good, 1000: good}) == 250
    assert fewest_that_help({0: bad, 250: bad}) == 0


def test_group_divergences_against_a_loop(trained, digits) -> None:
    model = copy.deepcopy(trained)
    dense = Teacher.of(model)
    with torch.no_grad():
        model[0].weight.mul_(0.7)
    batches = [digits[0][:25], digits[0][25:47]]
    got = group_divergences(model, Calibration(dense, [], batches, default_forward))
    expected = []
    for batch in batches:
        for group in batch.split(3):  # 47 samples in at most 20 groups
            with torch.no_grad():
                p, q = (m(group).double().softmax(1) for m in (trained, model))
            expected.append(float((p * (p / q).log()).sum(1).mean()))
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-4)


def test_places_hold_out_different_samples() -> None:
    batches = [torch.arange(7), torch.arange(7, 19)]
    parts = [torch.cat(hold_out(batches, 5, place=k)[1]).tolist() for k in range(5)]
    assert [part[0] for part in parts] == [0, 1, 2, 3, 4]
    assert sorted(index for part in parts for index in part) == list(range(19))
    assert torch.equal(torch.cat(hold_out(batches)[1]), torch.cat(hold_out(batches, place=9)[1]))
