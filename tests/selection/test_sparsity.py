"""keep_largest: the number removed is exact, ties have an order, what is gone stays gone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune._targets import Threshold
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.selection import keep_above, keep_largest


def slow_keep_largest(scores, sparsity, masks=None):
    """The same by sorting: removed ones last, then by score, then by place."""
    flat = torch.cat([score.reshape(-1) for score in scores.values()]).tolist()
    kept = [True] * len(flat)
    if masks is not None:
        kept = torch.cat([masks[name].reshape(-1) for name in scores]).tolist()
    order = sorted(range(len(flat)), key=lambda i: (not kept[i], -flat[i], i))
    left = min(len(flat) - round(sparsity * len(flat)), sum(kept))
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[order[:left]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}


def assert_equal(masks, expected) -> None:
    assert masks.keys() == expected.keys()
    for name in masks:
        assert torch.equal(masks[name], expected[name]), name


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    levels=st.integers(1, 6),
    sparsity=st.floats(0, 0.999),
    earlier=st.none() | st.floats(0, 0.999),
    seed=st.integers(0, 10**6),
)
def test_it_equals_its_slow_twin(sizes, levels, sparsity, earlier, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"w{i}": torch.randint(levels, (size, 2), generator=generator).float()
        for i, size in enumerate(sizes)
    }
    masks = None
    if earlier is not None:
        noise = {n: torch.rand(s.shape, generator=generator) for n, s in scores.items()}
        masks = slow_keep_largest(noise, earlier)
    found = keep_largest(scores, sparsity, masks=masks)
    assert_equal(found, slow_keep_largest(scores, sparsity, masks))
    assert_equal(keep_largest(scores, sparsity, masks=found), found)  # idempotent


@pytest.mark.parametrize("sparsity", [0.0, 1 / 3, 0.5, 0.9, 0.98, 0.9999])
def test_the_number_removed_is_exact(sparsity) -> None:
    scores = {"a": torch.rand(128, 784), "b": torch.rand(10, 128), "c": torch.rand(3, 1, 5, 5)}
    total = sum(score.numel() for score in scores.values())
    masks = keep_largest(scores, sparsity)
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)
    kept = torch.cat([scores[n][masks[n]] for n in scores])
    gone = torch.cat([scores[n][~masks[n]] for n in scores])
    assert not gone.numel() or kept.min() > gone.max()


def test_of_equal_scores_the_earlier_is_kept() -> None:
    scores = {"b": torch.zeros(2, 2), "a": torch.zeros(3)}
    expected = {"b": torch.tensor([[True, True], [True, False]]), "a": torch.zeros(3).bool()}
    assert_equal(keep_largest(scores, 4 / 7), expected)


def test_targets_are_shares_of_all_weights_not_of_those_left() -> None:
    scores = {"w": torch.rand(1000)}
    half = keep_largest(scores, 0.5)
    again = keep_largest({"w": torch.rand(1000)}, 0.5, masks=half)
    assert_equal(again, half)
    more = keep_largest({"w": torch.rand(1000)}, 0.75, masks=half)
    assert int(more["w"].sum()) == 250
    assert not (more["w"] & ~half["w"]).any()


def test_removed_weights_stay_removed_whatever_their_score() -> None:
    masks = {"w": torch.tensor([False, True, True, True])}
    found = keep_largest({"w": torch.tensor([9.0, 3.0, 2.0, 1.0])}, 0.5, masks=masks)
    assert found["w"].tolist() == [False, True, True, False]
    assert_equal(keep_largest({"w": torch.ones(4)}, 0.0, masks=masks), masks)


def test_scores_are_left_alone_and_negative_ones_are_fine() -> None:
    scores = {"w": torch.tensor([-3.0, -1.0, -2.0, 0.0], requires_grad=True)}
    before = scores["w"].detach().clone()
    assert keep_largest(scores, 0.5)["w"].tolist() == [False, True, False, True]
    assert torch.equal(scores["w"], before)


def test_whole_numbers_are_scores_too() -> None:
    scores = {"w": torch.tensor([3, 1, 2])}
    masks = keep_largest(scores, 1 / 3)
    assert masks["w"].tolist() == [True, False, True]
    assert keep_largest(scores, 2 / 3, masks=masks)["w"].tolist() == [True, False, False]


def test_mixed_precision_of_scores_is_compared_by_value() -> None:
    scores = {"a": torch.tensor([1.0, 3.0], dtype=torch.float64), "b": torch.tensor([2.0]).half()}
    masks = keep_largest(scores, 1 / 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, True],
        "b": [True],
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_scores_are_refused_by_name(bad) -> None:
    scores = {"fine": torch.ones(3), "layer.weight": torch.tensor([1.0, bad])}
    with pytest.raises(NonFiniteScoresError, match=r"layer\.weight.*1 of 2"):
        keep_largest(scores, 0.5)
    with pytest.raises(NonFiniteScoresError, match=r"layer\.weight"):
        keep_above(scores, Threshold(0.1))


@pytest.mark.parametrize(
    "sparsity", [1.0, -0.1, True, 50, float("nan"), "0.5", None, Threshold(1.0)]
)
def test_shares_outside_their_range_are_refused(sparsity) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        keep_largest({"w": torch.ones(3)}, sparsity)


def test_masks_of_something_else_are_refused() -> None:
    scores = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="'v'"):
        keep_largest(scores, 0.5, masks={"v": torch.ones(3).bool()})
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        keep_largest(scores, 0.5, masks={"w": torch.ones(2).bool()})
    with pytest.raises(TypeError, match="bool"):
        keep_largest(scores, 0.5, masks={"w": torch.ones(3)})
    with pytest.raises(ValueError, match="got none"):
        keep_largest({}, 0.5)


def test_ten_million_weights_take_a_moment() -> None:
    scores = {"a": torch.rand(9_000_000), "b": torch.zeros(1_000_000)}
    masks = keep_largest(scores, 0.95)
    assert sum(int(mask.sum()) for mask in masks.values()) == 500_000
    assert not masks["b"].any()
