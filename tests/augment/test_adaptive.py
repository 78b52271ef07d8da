"""From losses to the factor: a slow twin, the rule's promises, what is refused."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, Normal

from lightning_prune.augment.adaptive import Losses, MixRule, gap_share, losses_of

VALUES = st.lists(st.floats(0.0, 50.0), min_size=2, max_size=30)
SHARES = st.floats(-3.0, 1.0)
ERRORS = st.floats(0.0, 3.0)
MIXES = st.floats(0.0, 1.0)


def losses(values):
    return Losses.of(torch.tensor(values, dtype=torch.float64))


@given(VALUES, VALUES)
def test_the_gap_share_is_that_of_the_statistics_module(training, held_out):
    found = gap_share(losses(training), losses(held_out))
    mean = statistics.fmean(held_out)
    if mean == 0:
        assert found is None
        return
    error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (training, held_out)))
    share = (mean - statistics.fmean(training)) / mean
    assert found == pytest.approx((share, error / mean), rel=1e-6, abs=1e-4)


@given(VALUES, st.integers(0, 30))
def test_sums_over_batches_are_those_over_all(values, cut):
    parts = losses(values[:cut]) + losses(values[cut:])
    whole = losses(values)
    assert parts.count == whole.count
    assert parts.mean == pytest.approx(whole.mean)
    assert parts.squares == pytest.approx(whole.squares)


def test_too_little_is_no_gap():
    some = losses([1.0, 2.0])
    for other in ([], [1.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]):
        assert gap_share(some, losses(other)) is None
    assert gap_share(losses([1.0]), some) is None
    assert gap_share(losses([math.nan, 1.0]), some) is None


@given(MIXES, SHARES, ERRORS)
def test_the_factor_stays_in_its_range_and_stands_still_when_asked_again(mix, share, error):
    rule = MixRule()
    moved = rule(mix, share, error)
    assert moved == 0 or rule.floor <= moved <= 1
    assert rule(moved, share, error) == moved


@given(MIXES, SHARES, SHARES, ERRORS)
def test_a_larger_gap_never_means_a_smaller_factor(mix, one, other, error):
    low, high = sorted((one, other))
    assert MixRule()(mix, low, error) <= MixRule()(mix, high, error)


@given(MIXES, SHARES, ERRORS, ERRORS)
def test_knowing_less_moves_it_less(mix, share, one, other):
    sure, unsure = sorted((one, other))
    rule = MixRule(floor=0.0)
    assert abs(rule(mix, share, unsure) - mix) <= abs(rule(mix, share, sure) - mix) + 1e-12


def test_it_falls_to_zero_and_comes_back_only_when_that_is_sure():
    rule = MixRule(none=0.5, full=1.0)
    assert rule(1.0, 0.3, 0.1) == 0.0
    assert rule(0.0, 0.9, 0.5) == 0.0  # may be, may be not
    assert rule(0.0, 0.9, 0.1) == pytest.approx(0.6)
    assert rule(1.0, 0.5, 0.005) == 0.0  # 0.01 is below the floor
    assert MixRule(none=0.5, full=1.0, floor=0.0)(1.0, 0.5, 0.005) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "arguments", [{"none": 0.9}, {"full": 1.1}, {"errors": -1.0}, {"floor": 1.0}]
)
def test_what_is_no_ramp_is_refused(arguments):
    with pytest.raises(ValueError, match="`none` < `full`"):
        MixRule(**arguments)


def test_losses_are_negative_log_likelihoods():
    torch.manual_seed(0)
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    y = torch.randint(3, (5, 4))
    expected = -Categorical(logits=z.movedim(1, 2)).log_prob(y).mean(1)
    torch.testing.assert_close(losses_of(z, y, "categorical"), expected)
    torch.testing.assert_close(losses_of(z, y.int(), "categorical"), expected)
    one_hot = torch.nn.functional.one_hot(y, 3).movedim(2, 1).double()
    torch.testing.assert_close(losses_of(z, one_hot, "categorical"), expected)
    bits = torch.randint(2, z.shape)
    expected = -Bernoulli(logits=z).log_prob(bits.double()).flatten(1).mean(1)
    torch.testing.assert_close(losses_of(z, bits, "bernoulli"), expected)
    target = torch.randn(5, dtype=torch.float64)
    expected = -Normal(z[:, 0, 0], 1.0).log_prob(target) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(losses_of(z[:, 0, :1], target, "gaussian"), expected)
    assert losses_of(z[:, :, 0].half(), y[:, 0], "categorical").dtype == torch.float32


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_labels_that_do_not_fit_are_named(likelihood):
    with pytest.raises(ValueError, match=rf"{likelihood}.*shape \(4, 7\)"):
        losses_of(torch.zeros(4, 3), torch.zeros(4, 7), likelihood)
