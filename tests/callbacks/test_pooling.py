"""Small batches scored as one: the same samples, whatever form they come in."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lightning_prune import squared_gradients
from lightning_prune.callbacks import pooling
from lightning_prune.callbacks.pooling import Pool
from lightning_prune.callbacks.scoring import ScoringOptions, ScoringPass
from lightning_prune.exceptions import NonFiniteScoresError
from tests import reference
from tests.callbacks.pruning_cases import digits, make_model, trainer


def test_batches_come_out_as_one_in_their_form() -> None:
    pool = Pool()
    assert pool.take() is None
    for k in (1.0, 2.0):
        batch = {"x": torch.full((3, 2), k), "more": [torch.full((3,), int(k))]}
        assert pool.put(batch, torch.full((3, 4), k))
    batch, logits = pool.take() or pytest.fail("nothing there")
    assert batch["x"][:, 0].tolist() == [1, 1, 1, 2, 2, 2] == logits[:, 0].tolist()
    assert batch["more"][0].tolist() == [1, 1, 1, 2, 2, 2]
    assert pool.take() is None


def test_a_loader_may_use_its_buffers_again() -> None:
    pool, buffer, logits = Pool(), torch.ones(2, 3), torch.ones(2, 4)
    pool.put(buffer, logits)
    buffer.zero_()
    logits.zero_()
    batch, found = pool.take() or pytest.fail("nothing there")
    assert batch.eq(1).all()
    assert found.eq(1).all()


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(3, 5), torch.zeros(3)),  # another width
        (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3)),
        [torch.zeros(3, 2), torch.zeros(3)],  # a list, not a tuple
        (torch.zeros(3, 2), torch.zeros(4)),  # not one for each sample
        (torch.zeros(3, 2), "three captions"),
        (torch.zeros(3, 2), torch.tensor(1.0)),
    ],
)
def test_what_cannot_stand_beside_the_others_is_left_out(batch) -> None:
    pool = Pool()
    assert pool.put((torch.ones(3, 2), torch.zeros(3)), torch.zeros(3, 4))
    assert not pool.put(batch, torch.zeros(3, 4))
    assert pool.take()[1].shape == (3, 4)  # type: ignore[index]


@pytest.mark.parametrize("limit", ["SAMPLES", "BYTES"])
def test_a_pool_is_full_by_samples_or_bytes(limit, monkeypatch) -> None:
    monkeypatch.setattr(pooling, limit, 10 if limit == "SAMPLES" else 10 * 6 * 4)
    pool = Pool()
    pool.put(torch.ones(5, 2), torch.ones(5, 4))
    assert not pool.full
    pool.put(torch.ones(5, 2), torch.ones(5, 4))
    assert pool.full


def scored(batches: list[Any], **options: Any) -> tuple[dict[str, torch.Tensor], int]:
    model = make_model().eval()
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    scoring = ScoringPass(model, names, ScoringOptions(tolerance=0.0, **options))
    for batch in batches:
        with torch.no_grad():
            model(batch[0])
        scoring.add(batch)
    scoring.score_pool()
    scoring.close()
    exact = squared_gradients(model, batches, parameters=names, **options)
    found = scoring._accumulator.compute()
    assert reference.largest_error(found, exact) < 1e-5
    return found, scoring._accumulator.samples


@pytest.mark.parametrize("target", ["probability", "label_probability"])
def test_pooled_scores_are_those_of_the_batches(target) -> None:
    x, y = digits()
    batches = [(x[i : i + 30], y[i : i + 30]) for i in range(0, 600, 30)]
    odd = [(x[600:610], y[600:610], "ten"), [x[610:640], y[610:640]]]
    _, samples = scored([*batches, *odd, *batches[:2]], target=target)
    assert samples == 600 + 40 + 60


def test_a_sample_that_is_not_finite_is_named_within_its_batch() -> None:
    model, (x, y) = make_model().eval(), digits()
    bad = x[30:60].clone()
    bad[7] = torch.nan
    scoring = ScoringPass(model, ["net.0.weight"], ScoringOptions())
    with torch.no_grad():
        model(x[:30])
        scoring.add((x[:30], y[:30]))
        model(bad)
    with pytest.raises(NonFiniteScoresError, match="sample 7 of the batch"):
        scoring.add((bad, y[30:60]))
    scoring.close()


def test_the_seconds_are_those_of_the_scoring_wherever_it_happens(monkeypatch) -> None:
    """What waits in a pool is scored in the end, by whoever comes last."""
    model, (x, y) = make_model().eval(), digits()
    scoring = ScoringPass(model, ["net.0.weight"], ScoringOptions())
    update = scoring._accumulator.update

    def slow(batch: Any, logits: Any) -> None:
        time.sleep(0.2)
        update(batch, logits)

    monkeypatch.setattr(scoring._accumulator, "update", slow)
    with torch.no_grad():
        model(x[:30])
        scoring.add((x[:30], y[:30]))
    scoring.score_pool()
    result = scoring.finish(trainer()) or pytest.fail("nothing scored")
    assert 0.2 <= result.seconds < 5
