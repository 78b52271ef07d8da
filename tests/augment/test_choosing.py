"""Choosing what to inject, against loops and on real digits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_prune.augment.choosing import (
    Starved,
    above_floor,
    farthest_points,
    in_turns,
    interpolations,
    reconstructions,
    starvation,
)
from lightning_prune.augment.vae import DenseVAE


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return 3 * torch.randn(60, 5, generator=random(0), dtype=torch.float64)


@pytest.fixture
def pool(digits: Tensor) -> Tensor:
    return digits[:60]


def norm_of_jacobian(z: Tensor) -> float:
    p = z.softmax(0)
    return float((torch.diag(p) - torch.outer(p, p)).square().sum())


def test_starvation_is_the_squared_norm_of_the_softmax_derivative(logits) -> None:
    for z, got in zip(logits, starvation(logits), strict=True):
        assert float(got) == pytest.approx(norm_of_jacobian(z), rel=1e-9)
        by_autograd = torch.autograd.functional.jacobian(lambda v: v.softmax(0), z)
        assert float(got) == pytest.approx(float(by_autograd.square().sum()), rel=1e-9)


def test_starvation_is_the_mean_over_positions(logits) -> None:
    positions = logits.reshape(10, 6, 5).transpose(1, 2)  # (N, C, T)
    expected = [sum(norm_of_jacobian(z) for z in sample.T) / 6 for sample in positions]
    assert starvation(positions).tolist() == pytest.approx(expected, rel=1e-9)


def test_starvation_of_bits_and_of_a_regression(logits) -> None:
    p = logits.sigmoid()
    expected = [sum(float(q * (1 - q)) ** 2 for q in row) for row in p]
    assert starvation(logits, "bernoulli").tolist() == pytest.approx(expected, rel=1e-9)
    assert starvation(logits, "gaussian").tolist() == [1.0] * 60
    assert starvation(logits[:, 0], "gaussian").shape == (60,)
    assert torch.equal(
        starvation(logits[:, 0], "bernoulli"), starvation(logits[:, :1], "bernoulli")
    )


def test_a_confident_model_starves_nothing() -> None:
    sure = torch.tensor([[1000.0, 0.0], [0.0, -1000.0], [80.0, 0.0]])
    assert bool((starvation(sure) >= 0).all())
    assert float(starvation(sure).max()) < 1e-12


def greedy(points: Tensor, n: int) -> list[int]:
    chosen = [0]
    while len(chosen) < n:
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(
            max(rest, key=lambda i: min(float((points[i] - points[j]).norm()) for j in chosen))
        )
    return chosen


def test_farthest_points_by_brute_force(pool) -> None:
    assert farthest_points(pool, 12).tolist() == greedy(pool.double(), 12)


def test_farthest_points_never_repeat_even_when_all_are_equal() -> None:
    assert sorted(farthest_points(torch.ones(5, 2), 9).tolist()) == [0, 1, 2, 3, 4]
    assert farthest_points(torch.ones(0, 2), 3).tolist() == []
    assert farthest_points(torch.ones(4, 2), 0).tolist() == []


def test_farthest_points_cover_at_most_twice_as_badly_as_the_best_choice(pool) -> None:
    few = pool[:9].reshape(9, -1).double()
    far = torch.cdist(few, few)

    def radius(chosen: tuple[int, ...]) -> float:
        return float(far[:, list(chosen)].amin(1).max())

    best = min(map(radius, itertools.combinations(range(9), 3)))
    assert radius(tuple(farthest_points(few, 3).tolist())) <= 2 * best + 1e-9


def test_classes_take_turns_by_brute_force() -> None:
    for seed in range(20):
        classes = torch.randint(4, (17,), generator=random(seed))
        queues: dict[int, list[int]] = {}
        for place, label in enumerate(classes.tolist()):
            queues.setdefault(label, []).append(place)
        expected = []
        for turn in range(17):
            round_ = [queue[turn] for queue in queues.values() if turn < len(queue)]
            expected += sorted(round_)
        assert in_turns(classes).tolist() == expected


def test_the_floor_leaves_out_the_lowest() -> None:
    elbo = torch.randn(50, generator=random(0))
    near = above_floor(elbo, 0.3)
    assert int((~near).sum()) == 15
    assert float(elbo[~near].max()) < float(elbo[near].min())
    elbo[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert not bool(above_floor(elbo, 0.0)[:3].any())
    assert int(above_floor(elbo, 0.0).sum()) == 47


def test_starved_by_brute_force(pool, logits) -> None:
    elbo = torch.randn(60, generator=random(1))
    far = set(sorted(range(60), key=lambda i: float(elbo[i]))[: int(0.2 * 60)])
    queues: dict[int, list[int]] = {}
    order = sorted(range(60), key=lambda i: -norm_of_jacobian(logits[i]))
    for i in order:
        if i not in far:
            queues.setdefault(int(logits[i].argmax()), []).append(i)
    expected: list[int] = []
    turn = 0
    while len(expected) < 20:
        round_ = [queue[turn] for queue in queues.values() if turn < len(queue)]
        expected += sorted(round_, key=order.index)
        turn += 1
    got = Starved(floor=0.2)(pool, logits, 20, elbo=elbo)
    assert got.tolist() == expected[:20]


def test_starved_and_far_from_one_another(pool, logits) -> None:
    order = sorted(range(60), key=lambda i: -norm_of_jacobian(logits[i]))[:30]
    expected = [order[k] for k in greedy(pool[order].double(), 10)]
    got = Starved("distance", oversample=3)(pool, logits, 10)
    assert got.tolist() == expected


@pytest.mark.parametrize("spread", ["classes", "distance"])
def test_all_can_be_chosen_the_far_ones_last(pool, logits, spread) -> None:
    elbo = torch.arange(60.0)
    got = Starved(spread, floor=0.5)(pool, logits, 60, elbo=elbo).tolist()
    assert sorted(got) == list(range(60))
    assert set(got[:30]) == set(range(30, 60))
    worst_first = sorted(range(30), key=lambda i: -norm_of_jacobian(logits[i]))
    assert got[30:] == worst_first


def test_predicted_classes_are_balanced_where_the_most_starved_are_not(pool) -> None:
    # Class 0 wavers always, the others hardly ever.
    z = torch.zeros(60, 3, dtype=torch.float64)
    z[:40, 0] = torch.linspace(0.1, 1.0, 40, dtype=torch.float64)
    z[40:50, 1], z[50:, 2] = 6.0, 7.0
    chosen = z.argmax(1)[Starved()(pool, z, 30)]
    assert torch.bincount(chosen, minlength=3).tolist() == [10, 10, 10]


def test_what_cannot_be_chosen_is_said_in_one_message(pool, logits) -> None:
    with pytest.raises(ValueError, match=r"(?s)spread.*floor.*oversample"):
        Starved("all", floor=1.0, oversample=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"(?s)61 candidates.*logits of 60.*ELBO of shape"):
        Starved()(pool, logits[:5], 61, elbo=torch.zeros(4))


class Line:
    """An interpolator whose latent space is the inputs'."""

    def interpolate(self, x: Tensor, other: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *(1 for _ in x.shape[1:]))
        return x + t * (other - x)


def test_reconstructions_use_every_real_input_alike(digits) -> None:
    real = digits[:7]
    made, labels = reconstructions(Line(), real, 17, random(0))
    assert labels is None
    used = [int((real == x).flatten(1).all(1).nonzero()[0, 0]) for x in made]
    assert sorted(torch.bincount(torch.tensor(used), minlength=7).tolist()) == [2, 2, 2, 2, 3, 3, 3]
    assert sorted(used[:7]) == list(range(7))


def test_interpolations_lie_between_two_real_inputs() -> None:
    real = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    made, _ = interpolations(Line(), real, 200, random(0))
    assert bool((made >= 0).all())
    assert bool((made.sum(1) <= 1 + 1e-6).all())
    on_an_edge = (made[:, 0] == 0) | (made[:, 1] == 0) | ((made.sum(1) - 1).abs() < 1e-6)
    assert bool(on_an_edge.all())
    inner = made[(made[:, 1] == 0) & (made[:, 0] > 0) & (made[:, 0] < 1), 0]
    assert float(inner.min()) < 0.2
    assert float(inner.max()) > 0.8


def test_our_vae_is_such_an_interpolator(digits) -> None:
    vae = DenseVAE((8, 8)).eval()
    real = digits[:3]
    made, _ = reconstructions(vae, real, 6, random(0))
    expected = {tuple(x.flatten().tolist()) for x in vae.reconstruct(real)}
    assert len(expected) == 3
    for x in made:
        assert min(float((x.flatten() - torch.tensor(e)).abs().max()) for e in expected) < 1e-5
    assert interpolations(vae, real, 5, random(0))[0].shape == (5, 8, 8)


@pytest.mark.parametrize("make", [reconstructions, interpolations])
def test_made_inputs_follow_from_the_seed_alone(make, digits) -> None:
    before = torch.get_rng_state()
    first, again, other = (make(Line(), digits[:20], 30, random(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert make(Line(), digits[:20], 0, random(0))[0].shape == (0, 8, 8)
    with pytest.raises(ValueError, match="at least one real input"):
        make(Line(), digits[:0], 3, random(0))


class ByClass(Line):
    """Refuses pairs of different classes: the first pixel of an input is its class."""

    def interpolate(self, x: Tensor, other: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(x[:, 0], y.float())
        assert torch.equal(other[:, 0], y.float())
        return super().interpolate(x, other, t)


@pytest.mark.parametrize("make", [reconstructions, interpolations])
def test_a_conditional_vae_gets_pairs_of_one_class_and_says_which(make) -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    real = torch.stack([labels.float(), torch.arange(7.0)], 1)
    made, classes = make(ByClass(), real, 70, random(0), labels)
    assert torch.equal(made[:, 0], classes.float())
    assert torch.bincount(classes).tolist() == [10, 20, 40]  # as often as in the real ones
    if make is interpolations:
        of_two = made[classes == 2, 1]
        assert float(of_two.min()) < 4 < 5 < float(of_two.max())
        assert len(of_two.unique()) > 30
