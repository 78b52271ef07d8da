"""Whole units, channels and heads: which weights go together, and how many groups go."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune._targets import Threshold
from lightning_prune.selection import Selection
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


def groups_of(name, shape, granularity):
    """The groups as lists of index tuples, by a loop over every weight."""
    axis = 1 if granularity == "channel" else 0
    found = {}
    for index in torch.ones(shape).nonzero().tolist():
        found.setdefault((name, index[axis]), []).append(tuple(index))
    return found


def pooled(values, pool):
    return {"sum": math.fsum, "max": max, "mean": lambda v: math.fsum(v) / len(v)}[pool](values)


def slow_select(scores, share, masks, granularity, pool, min_density):
    """Walk the groups, the weakest first, up to the first that does not fit."""
    kept = {name: mask.clone() for name, mask in complete(scores, masks).items()}
    groups = {}
    for name, score in scores.items():
        groups |= groups_of(name, score.shape, granularity)
    alive = {g: [i for i in at if kept[g[0]][i]] for g, at in groups.items()}
    alive = {g: at for g, at in alive.items() if at}
    worth = {g: pooled([scores[g[0]][i].item() for i in at], pool) for g, at in alive.items()}
    protected = set()
    for name, score in scores.items():
        held = 0
        for g in sorted((g for g in alive if g[0] == name), key=lambda g: (-worth[g], g[1])):
            if held < max(1, math.ceil(min_density * score.numel())):
                protected.add(g)
                held += len(alive[g])
    budget = round(share * total(kept)) - removed(kept)
    passed, guarded = set(), set()
    later_first = list(alive)[::-1]
    for g in sorted(later_first, key=worth.get):
        if g in protected:
            passed.add(g)
            continue
        if len(alive[g]) > budget:
            break
        budget -= len(alive[g])
        guarded |= passed
        for i in alive[g]:
            kept[g[0]][i] = False
    guarded |= {g for g in passed if len(alive[g]) <= budget}
    return kept, [name for name in scores if any(g[0] == name for g in guarded)]


@given(
    Shapes,
    Levels,
    Shares,
    Earlier,
    st.sampled_from(["unit", "channel"]),
    st.sampled_from(["sum", "mean", "max"]),
    st.sampled_from([0.0, 0.5]),
    Seeds,
)
def test_it_equals_its_slow_twin(
    shapes, levels, share, earlier, granularity, pool, min_density, seed
) -> None:
    scores = make_scores(shapes, levels, seed)
    masks = make_masks(scores, earlier, seed)
    choose = Selection(granularity, pool=pool, min_density=min_density)
    selected = choose(scores, share, masks=masks)
    expected, guarded = slow_select(scores, share, masks, granularity, pool, min_density)
    assert_equal(selected.masks, expected)
    assert selected.guarded == guarded
    assert_equal(choose(scores, share, masks=masks).masks, selected.masks)
    before = complete(scores, masks)
    asked = max(round(share * total(before)), removed(before))
    assert removed(selected.masks) <= asked
    for name, mask in selected.masks.items():
        assert not before[name].any() or mask.any()


@given(Shapes, Levels, Shares, Earlier, st.sampled_from(["unit", "channel"]), Seeds)
def test_by_layer_each_gives_whole_groups_and_no_more_than_its_share(
    shapes, levels, share, earlier, granularity, seed
) -> None:
    scores = make_scores(shapes, levels, seed)
    masks = make_masks(scores, earlier, seed)
    before = complete(scores, masks)
    selected = Selection(granularity, scope="layer")(scores, share, masks=masks)
    asked = max(round(share * total(before)), removed(before))
    assert removed(selected.masks) <= asked
    for name, mask in selected.masks.items():
        assert not before[name].any() or mask.any()
        for at in groups_of(name, mask.shape, granularity).values():
            states = {bool(mask[i]) for i in at if before[name][i]}
            assert len(states) <= 1


def test_by_layer_the_share_is_reached_where_groups_allow() -> None:
    scores = {"a": torch.rand(8, 5), "b": torch.rand(4, 3) * 1e-6}
    selected = Selection("unit", scope="layer")(scores, 0.5)
    assert int(selected.masks["a"].any(1).sum()) == 4
    assert int(selected.masks["b"].any(1).sum()) == 2
    assert selected.guarded == []


def test_kernels_lose_whole_channels() -> None:
    scores = digits_scores()
    units = Selection("unit")(scores, 0.6)
    kernel = units.masks["2.weight"]
    assert all(bool(kernel[o].all()) or not bool(kernel[o].any()) for o in range(8))
    channels = Selection("channel")({"2.weight": scores["2.weight"]}, 0.5)
    kernel = channels.masks["2.weight"]
    sums = scores["2.weight"].double().sum((0, 2, 3))
    weakest = sums.argsort()[:3].tolist()
    assert [c for c in range(6) if not kernel[:, c].any()] == sorted(weakest)
    assert int(kernel.sum()) == 3 * 8 * 9


def test_the_guard_keeps_the_best_group_and_says_so() -> None:
    scores = {"a": torch.rand(6, 4) + 1, "b": torch.rand(6, 4) * 1e-6}
    selected = Selection("unit")(scores, 0.75)
    assert selected.guarded == ["b"]
    assert selected.masks["b"].any(1).tolist() == [
        row == int(scores["b"].sum(1).argmax()) for row in range(6)
    ]
    assert removed(selected.masks) == 36


def test_a_threshold_is_compared_with_the_pooled_score() -> None:
    scores = {"a": torch.tensor([[1.0, 1.0], [0.0, 3.0], [0.5, 0.5]]), "b": torch.zeros(2, 2)}
    kept = {
        pool: Selection("unit", pool=pool)(scores, Threshold(1.2))
        for pool in ("sum", "mean", "max")
    }
    rows = {pool: found.masks["a"].any(1).tolist() for pool, found in kept.items()}
    assert rows == {
        "sum": [True, True, False],
        "mean": [False, True, False],
        "max": [False, True, False],
    }
    assert kept["sum"].guarded == ["b"]
    assert kept["sum"].masks["b"].any(1).tolist() == [True, False]


def test_a_head_is_its_rows_of_query_key_and_value() -> None:
    attention = nn.MultiheadAttention(12, 3, bias=False)
    weight = attention.in_proj_weight.detach()
    query, key, value = weight.square().split(12)
    worth = [
        sum(float(part[h * 4 : (h + 1) * 4].double().sum()) for part in (query, key, value))
        for h in range(3)
    ]
    choose = Selection("head", heads={"*in_proj_weight": 3, "*q_proj.weight": 4})
    scores = {"attn.in_proj_weight": weight.square(), "q_proj.weight": torch.rand(8, 5) + 1e3}
    mask = choose(scores, 144 / 472).masks["attn.in_proj_weight"]
    weakest = worth.index(min(worth))
    expected = torch.ones(3, 3, 4, 12, dtype=torch.bool)
    expected[:, weakest] = False
    assert torch.equal(mask, expected.view(36, 12))
    rows = choose(scores, 0.75).masks["q_proj.weight"].any(1).view(4, 2)
    assert torch.equal(rows[:, 0], rows[:, 1])


def test_a_name_written_out_goes_before_a_pattern() -> None:
    scores = {"a.weight": torch.arange(8.0).view(8, 1), "b.weight": torch.ones(8, 1) * 9}
    choose = Selection("head", heads={"*": 2, "a.weight": 4})
    assert choose(scores, 2 / 16).masks["a.weight"].view(-1).tolist() == [False] * 2 + [True] * 6


def test_parameters_that_have_no_such_groups_are_named_together() -> None:
    scores = {"bias": torch.ones(4), "in_proj_weight": torch.ones(8, 2), "odd": torch.ones(7, 2)}
    with pytest.raises(ValueError, match="does not fit") as error:
        Selection("head", heads={"in_proj_weight": 2, "odd": 3, "typo*": 2})(scores, 0.5)
    for part in ("'bias': expected a number of heads", "q, k and v of 2 heads", "'odd'", "typo"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"'bias'.*two or more axes.*'channel'.*\(4,\)"):
        Selection("channel")(scores, 0.5)
    assert Selection("unit").faults(scores, [0.5]) == []
    assert len(Selection("unit").faults({"w": torch.ones(0, 2)})) == 1
