"""The estimate from random signs: unbiased, seeded, with an honest standard error."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.saliency import RandomSigns, SaliencyAccumulator, squared_gradients
from tests import reference
from tests.cases import make


@pytest.mark.parametrize(
    "target", ["probability", "fisher", "label_probability", "empirical_fisher"]
)
@pytest.mark.parametrize("name", ["dense prediction", "mlp", "lstm"])
def test_the_mean_over_many_draws_is_the_exact_score(name: str, target: str) -> None:
    model, x = make(name)
    with torch.no_grad():
        logits = model(x)
    y = torch.randint(0, logits.shape[1], (len(x), *logits.shape[2:]))
    if y.ndim > 1:
        y[0, 0] = -100
    exact = reference.squared_gradients(model, (x, y), target=target)
    accumulator = SaliencyAccumulator(model, target=target, signs=RandomSigns(draws=400))
    accumulator.update((x, y))
    found, error = accumulator.compute(), accumulator.standard_error()
    for key, score in exact.items():
        away = (found[key] - score).abs()
        assert float(away.max()) < 0.35 * float(score.max())
        # Within four standard errors nearly everywhere, and those are neither far too small nor far
        # too large.
        assert float((away > 4 * error[key] + 1e-9 * score.max()).double().mean()) < 0.05
        if name != "dense prediction" and target in ("label_probability", "empirical_fisher"):
            assert float(error[key].max()) < 1e-12  # one term a sample: its sign does not matter
        else:
            assert float(away.mean()) > 0.2 * float(error[key].mean())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_other_likelihoods(likelihood: str) -> None:
    model, x = make("mlp")
    exact = squared_gradients(model, [x], likelihood=likelihood)
    found = squared_gradients(model, [x], likelihood=likelihood, signs=RandomSigns(draws=400))
    assert reference.largest_error(found, exact) < 0.3


def test_the_seed_decides_and_the_users_random_state_is_untouched() -> None:
    model, x = make("dense prediction")
    state = torch.get_rng_state()
    first = squared_gradients(model, [x], signs=RandomSigns(draws=2, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    again = squared_gradients(model, [x], signs=RandomSigns(draws=2, seed=1))
    other = squared_gradients(model, [x], signs=RandomSigns(draws=2, seed=2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_one_draw_has_no_spread() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        RandomSigns(draws=1)


def test_exact_scores_have_no_error() -> None:
    model, x = make("mlp")
    accumulator = SaliencyAccumulator(model)
    accumulator.update(x)
    assert not any(error.any() for error in accumulator.standard_error().values())
