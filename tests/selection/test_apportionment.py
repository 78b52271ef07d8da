"""The same share of every parameter, rounded so that the sum is exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.selection import Selection
from lightning_prune.selection.apportionment import apportion
from tests.selection.examples import digits_scores, removed, total


def slow_largest_remainder(sizes, share):
    """Hand out the seats one by one, each to whom most is owed."""
    quotas = [int(share * size) for size in sizes]
    for _ in range(round(share * sum(sizes)) - sum(quotas)):
        owed = [share * size - quota for size, quota in zip(sizes, quotas, strict=True)]
        quotas[owed.index(max(owed))] += 1
    return quotas


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.floats(0, 0.999))
def test_without_bounds_it_is_the_largest_remainder(sizes, share) -> None:
    quotas, bound = apportion(sizes, share, [0] * len(sizes), sizes)
    assert quotas == slow_largest_remainder(sizes, share)
    assert bound == []


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8
    ),
    st.floats(0, 0.999),
)
def test_within_bounds_the_sum_is_exact_and_the_share_common(parameters, share) -> None:
    sizes = [size for size, _, _ in parameters]
    lower = [int(size * min(a, b)) for size, a, b in parameters]
    upper = [int(size * max(a, b)) for size, a, b in parameters]
    quotas, bound = apportion(sizes, share, lower, upper)
    wanted = round(share * sum(sizes))
    assert sum(quotas) == min(max(wanted, sum(lower)), sum(upper))
    bounds = list(zip(lower, quotas, upper, strict=True))
    assert all(least <= quota <= most for least, quota, most in bounds)
    assert all(quotas[i] == upper[i] for i in bound)
    # One level explains them all: who is above it is held by its lower bound, and the other way.
    least = max((q - 1) / n for q, n, lo in zip(quotas, sizes, lower, strict=True) if q >= lo)
    free_high = [(q - 1) / n for q, n, lo in zip(quotas, sizes, lower, strict=True) if q > lo]
    free_low = [(q + 1) / n for q, n, up in zip(quotas, sizes, upper, strict=True) if q < up]
    assert not free_high or not free_low or max(free_high) <= min(free_low) + 1e-9
    assert least < 1


def test_only_who_would_have_given_more_is_named() -> None:
    assert apportion([3, 1], 0.5, [0, 0], [2, 0]) == ([2, 0], [1])
    assert apportion([4, 4], 0.5, [0, 3], [3, 3]) == ([1, 3], [])
    assert apportion([4, 4], 0.9, [0, 0], [3, 3]) == ([3, 3], [0, 1])


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.77, 0.9])
def test_every_layer_gets_the_share(share) -> None:
    scores = digits_scores()
    selected = Selection(scope="layer")(scores, share)
    assert removed(selected.masks) == round(share * total(selected.masks))
    assert selected.guarded == []
    for mask in selected.masks.values():
        assert abs(int((~mask).sum()) - share * mask.numel()) < 1
