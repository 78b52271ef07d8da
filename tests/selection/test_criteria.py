"""Criteria: what each ranks by, and what a user's own may not return."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.selection import resolve_criterion

WEIGHTS = {"a": nn.Parameter(torch.tensor([[1.0, -2.0]])), "b": nn.Parameter(torch.tensor([3.0]))}
SCORES = {"a": torch.tensor([[4.0, 0.5]]), "b": torch.tensor([1.0])}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("saliency", {"a": [[4.0, 0.5]], "b": [1.0]}),
        ("taylor", {"a": [[4.0, 2.0]], "b": [9.0]}),
        ("magnitude", {"a": [[1.0, 2.0]], "b": [3.0]}),
    ],
)
def test_values(name, expected) -> None:
    found = resolve_criterion(name)(SCORES, WEIGHTS)
    assert {n: score.tolist() for n, score in found.items()} == expected
    assert not any(score.requires_grad for score in found.values())


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_some_need_no_scores(name) -> None:
    criterion = resolve_criterion(name)
    assert not criterion.needs_scores
    assert criterion({}, WEIGHTS).keys() == WEIGHTS.keys()


def test_random_has_a_generator_of_its_own() -> None:
    state = torch.get_rng_state()
    first = resolve_criterion("random", seed=1)({}, WEIGHTS)
    assert torch.equal(state, torch.get_rng_state())
    again, other = (resolve_criterion("random", seed=s)({}, WEIGHTS) for s in (1, 2))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])


def test_an_own_criterion_gets_scores_and_weights() -> None:
    def snr(scores, parameters):
        return {name: scores[name] / parameters[name].abs() for name in parameters}

    criterion = resolve_criterion(snr)
    assert criterion.needs_scores
    assert criterion.name == "snr"
    assert criterion(SCORES, WEIGHTS)["a"].tolist() == [[4.0, 0.25]]


def test_an_own_criterion_can_do_without_scores() -> None:
    def index(scores, parameters):
        return {name: torch.arange(p.numel()).view(p.shape) for name, p in parameters.items()}

    index.needs_scores = False
    assert not resolve_criterion(index).needs_scores


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([1.0], TypeError, "mapping"),
        ({"a": torch.ones(1, 2)}, ValueError, r"\['b'\] are missing"),
        ({"a": torch.ones(1, 2), "b": torch.ones(1), "c": torch.ones(1)}, ValueError, "unknown"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, ValueError, r"\(1, 2\) for 'a'"),
        ({"a": torch.ones(1, 2), "b": [1.0]}, TypeError, "'b'"),
        ({"a": torch.ones(1, 2), "b": torch.tensor([torch.nan])}, NonFiniteScoresError, "'b'"),
    ],
)
def test_an_own_criterion_is_checked(result, error, message) -> None:
    def mine(scores, parameters):
        return result

    with pytest.raises(error, match=f"scores of criterion mine: .*{message}"):
        resolve_criterion(mine)(SCORES, WEIGHTS)


def test_unknown_names_are_refused_with_the_close_one() -> None:
    with pytest.raises(ValueError, match=r"'magnitude'.*got 'magnitud'.*Did you mean 'magnitude'"):
        resolve_criterion("magnitud")


@pytest.mark.parametrize("other", [None, 3, dict])
def test_what_is_no_criterion_is_refused(other) -> None:
    with pytest.raises(TypeError, match="Expected argument `criterion`"):
        resolve_criterion(other)


@pytest.mark.parametrize("name", ["saliency", "taylor", "magnitude", "random"])
def test_criteria_survive_a_pickle(name) -> None:
    # They travel to the processes of a distributed run.
    criterion = pickle.loads(pickle.dumps(resolve_criterion(name)))
    assert criterion(SCORES, WEIGHTS).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("view", [lambda weight: weight, lambda weight: weight[:].view_as(weight)])
def test_scores_that_are_the_weights_do_not_change_with_them(view) -> None:
    weights = {name: weight.clone() for name, weight in WEIGHTS.items()}
    given = lambda scores, parameters: {n: view(w) for n, w in parameters.items()}  # noqa: E731
    found = resolve_criterion(given)(SCORES, weights)
    for weight in weights.values():
        weight.zero_()
    for name, score in found.items():
        assert torch.equal(score, WEIGHTS[name].detach())
