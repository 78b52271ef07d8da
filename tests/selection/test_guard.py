"""Single weights under the guard: no parameter is emptied, and the number removed stays exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune._targets import Threshold
from lightning_prune.selection import Selection, keep_above, keep_largest
from tests.selection.examples import (
    Earlier,
    Levels,
    Seeds,
    Shapes,
    Shares,
    assert_equal,
    complete,
    digits_scores,
    make_masks,
    make_scores,
    removed,
    total,
)

MinDensity = st.sampled_from([0.0, 0.1, 0.5, 0.9])


def minimum(score, mask, min_density):
    return min(int(mask.sum()), max(1, math.ceil(min_density * score.numel())))


def slow_guarded(scores, share, masks, min_density):
    """One weight after the other, the weakest first, unless its parameter is at its minimum."""
    kept = {name: mask.clone() for name, mask in complete(scores, masks).items()}
    least = {name: minimum(scores[name], kept[name], min_density) for name in scores}
    walk = [(name, i) for name in scores for i in range(scores[name].numel())]
    walk.reverse()  # of equal scores the later goes first
    walk.sort(key=lambda w: scores[w[0]].view(-1)[w[1]].item())
    goal = round(share * total(kept))
    guarded, passed = set(), set()
    for name, i in walk:
        if removed(kept) >= goal:
            break
        if not kept[name].view(-1)[i]:
            continue
        if int(kept[name].sum()) > least[name]:
            kept[name].view(-1)[i] = False
            guarded |= passed
        else:
            passed.add(name)
    if removed(kept) < goal:
        guarded |= passed
    return kept, [name for name in scores if name in guarded]


@given(Shapes, Levels, Shares, Earlier, MinDensity, Seeds)
def test_it_equals_its_slow_twin(shapes, levels, share, earlier, min_density, seed) -> None:
    scores = make_scores(shapes, levels, seed)
    masks = make_masks(scores, earlier, seed)
    selected = Selection(min_density=min_density)(scores, share, masks=masks)
    expected, guarded = slow_guarded(scores, share, masks, min_density)
    assert_equal(selected.masks, expected)
    assert selected.guarded == guarded


@given(Shapes, Levels, Shares, Earlier, MinDensity, st.sampled_from(["global", "layer"]), Seeds)
def test_what_always_holds(shapes, levels, share, earlier, min_density, scope, seed) -> None:
    scores = make_scores(shapes, levels, seed)
    masks = make_masks(scores, earlier, seed)
    before = complete(scores, masks)
    choose = Selection(scope=scope, min_density=min_density)
    selected = choose(scores, share, masks=masks)
    least = {name: minimum(scores[name], before[name], min_density) for name in scores}
    for name, mask in selected.masks.items():
        assert not (mask & ~before[name]).any()
        assert int(mask.sum()) >= least[name]
        alive, gone = scores[name][mask], scores[name][before[name] & ~mask]
        assert not gone.numel() or alive.min() >= gone.max()
    asked = max(round(share * total(before)), removed(before))
    assert removed(selected.masks) == min(asked, total(before) - sum(least.values()))
    if removed(selected.masks) < round(share * total(before)):
        assert selected.guarded
    for name in selected.guarded:
        assert int(selected.masks[name].sum()) == least[name]
    again = choose(scores, share, masks=selected.masks)
    assert_equal(again.masks, selected.masks)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99])
def test_without_need_it_is_the_plain_ranking(share) -> None:
    scores = digits_scores()
    selected = Selection()(scores, share)
    if share < 0.9:
        assert selected.guarded == []
    if not selected.guarded:
        assert_equal(selected.masks, keep_largest(scores, share))
    assert removed(selected.masks) == round(share * total(selected.masks))


def test_a_weak_layer_is_named_and_the_others_make_up_for_it() -> None:
    scores = digits_scores()
    scores["2.weight"] = scores["2.weight"] * 1e-12
    assert not keep_largest(scores, 0.9)["2.weight"].any()
    selected = Selection(min_density=0.05)(scores, 0.9)
    assert selected.guarded == ["2.weight"]
    assert int(selected.masks["2.weight"].sum()) == math.ceil(0.05 * 6 * 8 * 9)
    assert removed(selected.masks) == round(0.9 * total(selected.masks))


def test_a_target_beyond_the_guard_keeps_the_minimum() -> None:
    scores = {"a": torch.arange(10.0), "b": torch.arange(4.0)}
    selected = Selection(min_density=0.5)(scores, 0.9)
    assert {name: int(mask.sum()) for name, mask in selected.masks.items()} == {"a": 5, "b": 2}
    assert selected.guarded == ["a", "b"]


def test_a_parameter_emptied_earlier_is_left_as_it_is() -> None:
    scores = {"a": torch.rand(4), "b": torch.rand(4)}
    masks = {"a": torch.zeros(4).bool()}
    for scope in ("global", "layer"):
        selected = Selection(scope=scope, min_density=0.25)(scores, 0.75, masks=masks)
        assert not selected.masks["a"].any()
        assert int(selected.masks["b"].sum()) == 2
    assert not Selection()(scores, Threshold(9.0), masks=masks).masks["a"].any()


@given(Shapes, Levels, Earlier, MinDensity, st.floats(0, 7), Seeds)
def test_a_threshold_is_only_topped_up(shapes, levels, earlier, min_density, value, seed) -> None:
    scores = make_scores(shapes, levels, seed)
    masks = make_masks(scores, earlier, seed)
    selected = Selection(min_density=min_density)(scores, Threshold(value), masks=masks)
    plain = keep_above(scores, Threshold(value), masks=masks)
    for name, score in scores.items():
        before = complete(scores, masks)[name]
        least = minimum(score, before, min_density)
        if int(plain[name].sum()) >= least:
            assert name not in selected.guarded
            assert torch.equal(selected.masks[name], plain[name])
        else:
            assert name in selected.guarded
            flat, alive = score.view(-1).tolist(), before.view(-1).tolist()
            best = sorted((i for i in range(len(flat)) if alive[i]), key=lambda i: (-flat[i], i))
            assert torch.nonzero(selected.masks[name].view(-1)).view(-1).tolist() == sorted(
                best[:least]
            )


def test_nothing_that_enters_is_changed_or_handed_on() -> None:
    scores = {"a": torch.rand(3, 4), "b": torch.zeros(2, 4)}
    masks = {"a": torch.ones(3, 4).bool()}
    copies = {name: score.clone() for name, score in scores.items()}
    for choose in (Selection(), Selection(scope="layer"), Selection("unit"), Selection("2:4")):
        selected = choose(scores, 0.5, masks=masks)
        for mask in selected.masks.values():
            mask.fill_(False)
        assert masks["a"].all()
        assert all(torch.equal(scores[name], copies[name]) for name in scores)


def test_a_million_weights_with_the_guard_take_a_moment() -> None:
    scores = {"a": torch.rand(1_000_000), "b": torch.rand(1000) * 1e-9}
    selected = Selection()(scores, 0.95)
    assert removed(selected.masks) == round(0.95 * 1_001_000)
    assert selected.guarded == ["b"]
