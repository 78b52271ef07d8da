"""Regrowth: removed weights with a larger R come back for the weakest kept ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune._targets import Threshold
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.selection import Selection
from tests.selection.examples import (
    Levels,
    Seeds,
    Shapes,
    Shares,
    assert_equal,
    complete,
    make_masks,
    make_scores,
    removed,
)


def slow_regrow(saliency, selected, earlier, share):
    """Swap one pair after the other, by lists."""
    kept = {name: mask.clone() for name, mask in selected.items()}
    value = {
        (name, i): r for name in saliency for i, r in enumerate(saliency[name].reshape(-1).tolist())
    }
    order = {place: i for i, place in enumerate(value)}
    alive = [p for p in value if selected[p[0]].view(-1)[p[1]]]
    best = {}
    for p in alive:  # the best of each parameter may not leave
        if p[0] not in best or value[p] > value[best[p[0]]]:
            best[p[0]] = p
    leaving = sorted((p for p in alive if best[p[0]] != p), key=lambda p: (value[p], -order[p]))
    returning = sorted(
        (p for p in value if not earlier[p[0]].view(-1)[p[1]]), key=lambda p: (-value[p], order[p])
    )
    count = 0
    for old, new in zip(leaving, returning, strict=False):
        if count == int(share * len(alive)) or value[new] <= value[old]:
            break
        kept[old[0]].view(-1)[old[1]] = False
        kept[new[0]].view(-1)[new[1]] = True
        count += 1
    return kept, count


@given(Shapes, Levels, Shares, Shares, st.sampled_from([0.1, 0.3, 0.99]), Seeds)
def test_it_equals_its_slow_twin(shapes, levels, share, earlier, swapped, seed) -> None:
    scores = make_scores(shapes, levels, seed)
    saliency = make_scores(shapes, levels, seed + 7)
    masks = make_masks(scores, earlier, seed)
    plain = Selection()(scores, share, masks=masks)
    selected = Selection(regrow=swapped)(scores, share, masks=masks, saliency=saliency)
    expected, count = slow_regrow(saliency, plain.masks, masks, swapped)
    assert_equal(selected.masks, expected)
    assert selected.regrown == count
    assert removed(selected.masks) == removed(plain.masks)


@given(Shapes, Levels, Shares, Shares, Seeds)
def test_by_layer_every_layer_keeps_its_number(shapes, levels, share, earlier, seed) -> None:
    scores = make_scores(shapes, levels, seed)
    saliency = make_scores(shapes, levels, seed + 7)
    masks = make_masks(scores, earlier, seed)
    choose = Selection(scope="layer", regrow=0.5, min_density=0.1)
    selected = choose(scores, share, masks=masks, saliency=saliency)
    plain = Selection(scope="layer", min_density=0.1)(scores, share, masks=masks)
    back = 0
    for name, mask in selected.masks.items():
        assert int(mask.sum()) == int(plain.masks[name].sum())
        new = mask & ~plain.masks[name]
        assert not (new & masks[name]).any()  # only what was removed before this event
        back += int(new.sum())
    assert back == selected.regrown


def test_it_brings_back_what_matters_and_only_if_better() -> None:
    masks = {"w": torch.tensor([True, True, True, False, False])}
    scores = {"w": torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0])}
    saliency = {"w": torch.tensor([1.0, 2.0, 3.0, 9.0, 1.0])}
    choose = Selection(regrow=0.9)
    selected = choose(scores, 0.4, masks=masks, saliency=saliency)
    assert selected.masks["w"].tolist() == [False, True, True, True, False]
    assert selected.regrown == 1
    same = choose(scores, 0.4, masks=masks, saliency={"w": torch.ones(5)})
    assert same.masks["w"].tolist() == masks["w"].tolist()
    few = Selection(regrow=0.3)(scores, 0.4, masks=masks, saliency=saliency)  # 0.3 of three: none
    assert few.regrown == 0


def test_what_this_event_removes_does_not_come_back_at_once() -> None:
    scores = {"w": torch.tensor([3.0, 2.0, 1.0])}
    saliency = {"w": torch.tensor([1.0, 1.0, 9.0])}
    selected = Selection(regrow=0.9)(scores, 1 / 3, saliency=saliency)
    assert selected.masks["w"].tolist() == [True, True, False]


def test_a_parameter_emptied_earlier_can_come_back() -> None:
    masks = {"a": torch.zeros(2).bool(), "b": torch.ones(4).bool()}
    scores = {"a": torch.zeros(2), "b": torch.ones(4)}
    saliency = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    for target in (2 / 6, Threshold(0.5)):
        selected = Selection(regrow=0.5)(scores, target, masks=masks, saliency=saliency)
        assert selected.masks["a"].tolist() == [True, False]
        assert selected.masks["b"].tolist() == [False, True, True, True]


def test_it_asks_for_r_of_every_weight() -> None:
    scores = {"a": torch.ones(2), "b": torch.ones(2)}
    choose = Selection(regrow=0.5)
    with pytest.raises(ValueError, match=r"`saliency`.*'a', 'b'"):
        choose(scores, 0.5)
    with pytest.raises(ValueError, match=r"`saliency`.*missing for 'b'"):
        choose(scores, 0.5, saliency={"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"\(2,\) for 'b'"):
        choose(scores, 0.5, saliency={"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(NonFiniteScoresError, match="'a'"):
        choose(scores, 0.5, saliency={"a": torch.ones(2) / 0, "b": torch.ones(2)})
    assert complete(scores, None).keys() == choose(scores, 0.5, saliency=scores).masks.keys()
