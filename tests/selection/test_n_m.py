"""N:M: exactly N of each M along the rows, and a share below the limit prunes whole groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune._targets import Threshold
from lightning_prune.selection import Selection
from tests.selection.examples import (
    Earlier,
    Seeds,
    assert_equal,
    complete,
    digits_scores,
    make_masks,
    make_scores,
    removed,
    total,
)

Patterns = st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
WideShapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 11)), min_size=1, max_size=3)


def groups_of(tensor, m):
    """The groups of every row as index lists, by a loop."""
    rows, width = tensor.shape[0], tensor[0].numel()
    for row in range(rows):
        for start in range(0, width, m):
            yield [row * width + i for i in range(start, min(start + m, width))]


def slow_n_m(scores, share, masks, n, m):
    """Sort all groups by what pruning them costs; prune them one by one."""
    kept = {name: mask.clone() for name, mask in complete(scores, masks).items()}
    todo = []
    for name, score in scores.items():
        flat, alive = score.reshape(-1).tolist(), kept[name].view(-1)
        for group in groups_of(score, m):
            best = sorted((i for i in group if alive[i]), key=lambda i: (-flat[i], i))
            if best[n:]:
                todo.append((sum(flat[i] for i in best[n:]), name, best[n:]))
    goal = round(share * total(kept))
    todo.reverse()  # of equal costs the later goes first
    for _, name, lost in sorted(todo, key=lambda entry: entry[0]):
        after = removed(kept) + len(lost)
        if share < 1 - n / m and abs(after - goal) >= abs(removed(kept) - goal):
            break
        kept[name].view(-1)[lost] = False
    return kept


@given(WideShapes, st.integers(1, 7), Earlier, Patterns, st.integers(0, 20), Seeds)
def test_it_equals_its_slow_twin(shapes, levels, earlier, pattern, part, seed) -> None:
    n, m = pattern
    share = part / 20 * (1 - n / m)
    scores = {name: score.round() for name, score in make_scores(shapes, levels, seed).items()}
    masks = make_masks(scores, earlier, seed)
    if masks is not None and removed(masks) >= round(share * total(masks)) and part < 20:
        expected = masks
    else:
        expected = slow_n_m(scores, share, masks, n, m)
    selected = Selection(f"{n}:{m}")(scores, share, masks=masks)
    assert_equal(selected.masks, expected)
    assert_equal(Selection(f"{n}:{m}")(scores, share, masks=selected.masks).masks, selected.masks)
    assert selected.guarded == []


@given(WideShapes, Earlier, Patterns, st.sampled_from(["global", "layer"]), Seeds)
def test_at_the_limit_n_of_each_m_are_kept(shapes, earlier, pattern, scope, seed) -> None:
    n, m = pattern
    scores = make_scores(shapes, 5, seed)
    masks = make_masks(scores, earlier, seed)
    selected = Selection(f"{n}:{m}", scope=scope)(scores, 1 - n / m, masks=masks)
    for name, mask in selected.masks.items():
        before = complete(scores, masks)[name].view(-1)
        for group in groups_of(mask, m):
            alive = int(before[group].sum())
            assert int(mask.view(-1)[group].sum()) == min(alive, n)
        assert not (mask.view(-1) & ~before).any()


def test_kernels_are_read_along_their_rows() -> None:
    scores = {name: s for name, s in digits_scores().items() if name == "2.weight"}
    mask = Selection("2:4")(scores, 0.5).masks["2.weight"]
    assert mask.shape == (8, 6, 3, 3)
    groups = mask.reshape(8, 54)[:, :52].reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    assert mask.reshape(8, 54)[:, 52:].all()  # two are left at the end of a row: both stay
    worth = scores["2.weight"].reshape(8, 54)[:, :52].reshape(-1, 4)
    assert torch.equal(worth[groups].view(-1, 2).sort(1).values, worth.sort(1).values[:, 2:])


def test_real_scores_reach_every_share_on_the_way() -> None:
    scores = {n: s for n, s in digits_scores().items() if n in ("5.weight", "2.weight")}
    for scope in ("global", "layer"):
        masks = None
        for share in (0.1, 0.25, 0.4, 0.5):
            before = complete(scores, masks)
            masks = Selection("2:4", scope=scope)(scores, share, masks=masks).masks
            most = 0.5 - 8 / total(masks)  # the rests of the kernel's rows stay complete
            assert abs(removed(masks) - min(share, most) * total(masks)) <= 2
            assert not any((masks[name] & ~before[name]).any() for name in masks)
            if scope == "layer":
                each = {n: float((~m).float().mean()) for n, m in masks.items()}
                assert each["5.weight"] == pytest.approx(share, abs=5e-3)


@pytest.mark.parametrize(
    ("target", "words"),
    [(0.51, "target 0.51.*at most 0.5"), (Threshold(0.1), "Threshold.*share"), (1.5, "0, 1")],
)
def test_targets_beyond_the_pattern_are_refused(target, words) -> None:
    with pytest.raises(ValueError, match=words):
        Selection("2:4")({"w": torch.rand(4, 4)}, target)


def test_a_limit_that_is_no_exact_float_is_reached() -> None:
    for written in (2 / 3, 1 - 1 / 3, 0.6666666667):
        mask = Selection("1:3")({"w": torch.rand(5, 6)}, written).masks["w"]
        assert (mask.view(-1, 3).sum(1) == 1).all()


def test_a_parameter_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'bias'.*two or more axes.*'2:4'"):
        Selection("2:4")({"bias": torch.rand(8)}, 0.5)
