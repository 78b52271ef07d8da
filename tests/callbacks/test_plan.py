"""The plan before the work: its numbers are those that a fit then reaches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_prune import SaliencyPruningCallback, Threshold
from lightning_prune.callbacks.plan import PlannedEvent, make_plan
from lightning_prune.schedules import CubicSchedule, EpochSchedule, as_schedule
from tests.callbacks.pruning_cases import TOTAL, WEIGHTS, fit, make_model

NONE = EpochSchedule({})


def test_a_fit_does_what_was_planned() -> None:
    schedule = CubicSchedule(0.87, start_epoch=0, end_epoch=4)
    plan = make_plan(make_model(), schedule, epochs=6)
    pruner = SaliencyPruningCallback(schedule, criterion="magnitude")
    fit(pruner, max_epochs=6)
    assert plan.events is not None
    reached = [(r["epoch"], r["target"], r["total"] - r["kept"]) for r in pruner.history]
    assert [event[:3] for event in plan.events] == reached
    assert len(reached) == 4
    removed = [0, *(count for _, _, count in reached)]
    news = [after - before for before, after in pairwise(removed)]
    assert [event.newly_removed for event in plan.events] == news
    assert plan.total == sum(plan.parameters.values()) == TOTAL
    assert list(plan.parameters) == list(pruner.masks) == WEIGHTS


def test_every_parameter_is_pruned_or_left_out_with_a_reason() -> None:
    model = make_model()
    plan = make_plan(model, NONE, exclude=["net.3.*"], epochs=2)
    assert {*plan.parameters, *plan.left_out} == {name for name, _ in model.named_parameters()}
    assert plan.parameters == {"net.0.weight": 64 * 24}
    assert plan.left_out["net.3.weight"] == "excluded by 'net.3.*'"
    assert plan.left_out["net.0.bias"] == "a bias"
    assert plan.left_out["net.1.weight"] == "part of a BatchNorm1d"
    assert make_plan(model, NONE, ["net.3.*"], epochs=2).parameters == {"net.3.weight": 240}


def test_what_is_removed_already_stays_removed() -> None:
    plan = make_plan(nn.Linear(10, 10), EpochSchedule({0: 0.2, 1: 0.5}), epochs=2, already=30)
    assert plan.events == (PlannedEvent(0, 0.2, 30, 0), PlannedEvent(1, 0.5, 50, 20))
    assert "Removed already: 30" in str(plan)


def test_what_scores_decide_is_not_made_up() -> None:
    schedule = EpochSchedule({0: 0.2, 1: Threshold(1e-6), 2: 0.5})
    plan = make_plan(nn.Linear(10, 10), schedule, epochs=3)
    assert plan.events == (
        PlannedEvent(0, 0.2, 20, 20),
        PlannedEvent(1, Threshold(1e-6), None, None),
        PlannedEvent(2, 0.5, None, None),
    )
    assert str(plan).splitlines()[-2].split()[:5] == ["1", ">", "1e-06", "by", "scores"]


def test_without_a_number_of_epochs_the_whole_schedule_is_shown_if_it_has_an_end() -> None:
    model = nn.Linear(10, 10)
    whole = make_plan(model, EpochSchedule({3: 0.5, 90: 0.8}))
    assert whole.events is not None
    assert [event.epoch for event in whole.events] == [3, 90]
    cut = make_plan(model, EpochSchedule({3: 0.5, 90: 0.8}), epochs=90)
    assert cut.events == whole.events[:1]
    endless = make_plan(model, as_schedule(lambda epoch: 0.5))
    assert endless.events is None
    assert "when the schedule says so" in str(endless)
    assert "when the schedule says so" in endless.summary()


def test_the_table_fits_a_terminal_and_the_deep() -> None:
    deep = nn.Sequential(*[nn.Linear(8, 8) for _ in range(30)])
    plan = make_plan(deep, EpochSchedule({epoch: 0.03 * epoch for epoch in range(1, 21)}))
    lines = str(plan).splitlines()
    assert lines[0] == "Pruned: 30 parameters with 1,920 weights"
    assert "  a bias: 0.bias, 1.bias, 2.bias, 3.bias and 26 more" in lines
    assert len(lines) == 1 + 30 + 2 + 1 + 20
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["20", "60.0", "%", "58", "1,152", "768"]
    assert len(plan.summary()) < 250
    assert "..." in plan.summary()
    assert "in this run" in str(make_plan(deep, NONE, epochs=3))
    assert "no event" in make_plan(deep, NONE, epochs=3).summary()


def test_rounds_of_steps_are_called_so() -> None:
    plan = make_plan(nn.Linear(10, 10), EpochSchedule({3: 0.5}), epochs=9, unit="round")
    assert "round 3: 50.0 % (50)" in plan.summary()
    assert "round" in str(plan)
    assert "epoch" not in str(plan)


def test_planning_changes_nothing() -> None:
    model = make_model()
    model.net[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert "net.0.weight" in make_plan(model, EpochSchedule({0: 0.5}), epochs=1).parameters
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.net[0].weight.requires_grad
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_faults_are_those_of_its_parts() -> None:
    with pytest.raises(ValueError, match="lazy module"):
        make_plan(nn.LazyLinear(3), NONE, epochs=1)
    with pytest.raises(ValueError, match=r"did you mean 'net\.0\.\*'"):
        make_plan(make_model(), NONE, ["nett.0.*"], epochs=1)
    with pytest.raises(ValueError, match="shares must not decrease"):
        make_plan(make_model(), as_schedule(lambda epoch: 0.5 - 0.1 * epoch), epochs=2)
    with pytest.raises(ValueError, match="epochs: expected a whole number >= 1"):
        make_plan(make_model(), NONE, epochs=0)
