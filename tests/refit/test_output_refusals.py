from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.passes.batches import default_forward
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit.borrowing import borrowed
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.divergence import divergence
from lightning_prune.refit.gauss_newton import refit_outputs
from lightning_prune.refit.linearisation import Objective
from lightning_prune.refit.survivors import Survivors
from tests.refit.output_cases import magnitude, pruned, same, state


def test_what_is_worse_on_the_samples_checked_on_is_refused():
    model, _, calibration = pruned(0.9)
    calibration.dense.restore(model)
    masks = {"0.weight": model[0].weight.abs() > 0.15}
    model[0].weight.data.mul_(masks["0.weight"])
    zeros = [torch.zeros(5, 64)]  # on these no weight of the first layer matters: nothing to repair
    checked = Calibration(calibration.dense, calibration.batches, zeros)
    before = state(model)
    report = refit_outputs(model, masks, checked)
    assert report.error_before == report.error_after == 0
    assert "no step lowered" in report.left["0.weight"]
    assert report.refitted == []
    assert same(model, before)
    assert refit_outputs(model, masks, calibration).refitted == ["0.weight"]
    assert divergence(model, checked) > 0


def test_a_rise_at_temperature_1_is_refused(monkeypatch):
    model, masks, calibration = pruned(0.9)
    before = state(model)
    value = Objective.value

    def pessimist(self: Any, vector: Tensor, temperature: float | None = None) -> float:
        rise = 10 if temperature == 1 and not torch.equal(vector, start) else 0
        return value(self, vector, temperature) + rise

    start = Survivors(model, masks).read()
    monkeypatch.setattr(Objective, "value", pessimist)
    report = refit_outputs(model, masks, calibration, steps=1)
    assert "temperature 1" in report.left["0.weight"]
    assert same(model, before)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Once.apply(self.first(x)))


def test_an_operation_without_a_second_derivative_is_reported():
    torch.manual_seed(0)
    model, x = Custom(), torch.randn(30, 4)
    calibration = Calibration(Teacher.of(model), [x], [])
    masks = magnitude(model, 0.5)
    before = state(model)
    report = refit_outputs(model, masks, calibration)
    assert same(model, before)
    assert set(report.left) == set(masks)
    assert "Once" in report.left["first.weight"]
    assert report.error_before == report.error_after > 0


def test_nothing_changes_when_a_forward_fails():
    model, masks, calibration = pruned(0.9)
    before, calls = state(model), []

    def forward(module: nn.Module, batch: Any) -> Tensor:
        calls.append(None)
        if len(calls) > 60:
            raise RuntimeError("out of luck")
        return default_forward(module, batch)

    failing = Calibration(calibration.dense, calibration.batches, calibration.held_out, forward)
    with pytest.raises(RuntimeError, match="out of luck"):
        refit_outputs(model, masks, failing, products=2, steps=50)
    assert same(model, before)
    assert model.training


def test_weights_that_are_not_finite_are_left():
    model, masks, calibration = pruned(0.9)
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    before = state(model)
    report = refit_outputs(model, masks, calibration)
    assert set(report.left) == set(masks)
    assert all(
        torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in model.state_dict().items()
    )


def test_nothing_left_to_fit():
    model, _, calibration = pruned(0.9)
    masks = {"5.weight": torch.zeros(10, 20, dtype=torch.bool)}
    with torch.no_grad():
        model[5].weight.zero_()
    report = refit_outputs(model, masks, calibration)  # the biases fit the mean prediction
    assert report.left == {"5.weight": "no weight survives"}
    assert report.error_after < report.error_before
    bare = nn.Linear(2, 2, bias=False)
    empty = Calibration(Teacher.of(bare), [torch.ones(3, 2)], [])
    nn.init.zeros_(bare.weight)
    report = refit_outputs(bare, {"weight": torch.zeros(2, 2, dtype=torch.bool)}, empty)
    assert "survives" in report.left["weight"]


def test_all_faults_of_a_call_come_at_once():
    model, masks, calibration = pruned(0.9)
    masks["nowhere"] = masks["0.weight"]
    masks["2.weight"] = masks["2.weight"][:1]
    with pytest.raises(ValueError, match="cannot be used") as caught:
        refit_outputs(model, masks, calibration, steps=0, products=-1, samples=0, temperature=0)
    for word in ("nowhere", "2.weight", "steps", "products", "samples", "temperature"):
        assert word in str(caught.value)


def test_borrowed_attention_is_the_plain_one():
    with borrowed(nn.Linear(1, 1), derivatives=2):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
