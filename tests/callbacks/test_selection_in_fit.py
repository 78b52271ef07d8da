"""What is removed as one piece, and what may come back, in a real fit."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_prune import SaliencyPruningCallback, Selection
from tests.callbacks.pruning_cases import TOTAL, WEIGHTS, Witness, fit, removed, zeros


def pruned(selection: Selection, schedule: Any = None, **kwargs: Any) -> Any:
    pruner = SaliencyPruningCallback(schedule or {0: 0.5, 1: 0.5}, selection=selection, **kwargs)
    witness = Witness(pruner)
    model = fit(pruner, witness, max_epochs=4)
    assert witness.steps_checked
    return pruner, model


def test_two_of_four() -> None:
    pruner, model = pruned(Selection("2:4"), {0: 0.25, 1: 0.5})
    for name in WEIGHTS:
        kept = (model.get_parameter(name) != 0).reshape(-1, 4).sum(1)
        assert (kept == 2).all()
    assert [r["sparsity"] for r in pruner.history] == [0.25, 0.5]


def test_whole_units() -> None:
    pruner, model = pruned(Selection("unit"), parameters=[WEIGHTS[0]])
    rows = (model.get_parameter(WEIGHTS[0]) != 0).sum(1)
    assert sorted(set(rows.tolist())) == [0, 64]
    assert int((rows == 0).sum()) == 12
    assert pruner.sparsity == 0.5


def test_each_layer_by_itself_and_a_floor_under_each() -> None:
    pruner, _ = pruned(Selection(scope="layer"))
    assert set(pruner.history[-1]["density"].values()) == {0.5}
    pruner, _ = pruned(Selection(min_density=0.3), {0: 0.65})
    assert min(pruner.history[-1]["density"].values()) >= 0.3
    assert removed(pruner.masks) == round(0.65 * TOTAL)


def test_weights_come_back_where_r_says_so() -> None:
    still, _ = pruned(Selection())
    pruner, model = pruned(Selection(regrow=0.2))
    first, last = still.masks, pruner.masks
    back = sum(int((last[n] & ~first[n]).sum()) for n in WEIGHTS)
    assert 0 < back <= round(0.2 * TOTAL * 0.5)
    assert removed(last) == removed(first) == TOTAL // 2
    # They have been trained since (but where an input that validation knows was always 0).
    assert TOTAL // 2 <= zeros(model) <= TOTAL // 2 + 2 < TOTAL // 2 + back


def test_what_does_not_fit_is_refused_before_the_first_step() -> None:
    for selection, schedule, criterion, message in (
        (Selection("2:4"), {0: 0.75}, "taylor", "expected at most 0.5"),
        (Selection(regrow=0.1), {0: 0.5}, "magnitude", "compares weights by R"),
        (Selection("head", heads={"nobody": 2}), {0: 0.5}, "taylor", "fit none"),
    ):
        pruner = SaliencyPruningCallback(schedule, criterion=criterion, selection=selection)
        with pytest.raises(ValueError, match=message):
            fit(pruner, max_epochs=2)
        assert not pruner.history
