from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lightning_prune.passes.batches import default_forward
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import gauss_newton, linearisation
from lightning_prune.refit.calibration import Calibration, hold_out
from lightning_prune.refit.divergence import Output, divergence
from lightning_prune.refit.gauss_newton import refit_outputs
from lightning_prune.refit.linearisation import Objective
from lightning_prune.refit.survivors import Survivors
from tests.cases import Recurrent, Tied, Transformer, Twice
from tests.refit.output_cases import accuracy, magnitude, pruned, same, state

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kept", [2**30, 0])
def test_products_are_those_of_the_explicit_matrix(likelihood, kept, monkeypatch):
    monkeypatch.setattr(linearisation, "KEPT_BYTES", kept)  # 0: graphs are computed anew
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    dense = Teacher.of(model)
    masks = {"0.weight": torch.rand(5, 4) > 0.4, "2.weight": torch.rand(3, 5) > 0.4}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    x = torch.randn(11, 4).double()
    survivors = Survivors(model, masks)
    kept_weights = sum(int(mask.sum()) for mask in masks.values())
    vector = survivors.read()
    assert len(vector) == kept_weights + 8
    output = Output(likelihood, 2.0)
    calibration = Calibration(dense, [], [], likelihood=likelihood)
    objective = Objective(model, calibration, survivors, x.split(4), 2.0, at_most=4)

    def logits(vector: Tensor) -> Tensor:
        return functional_call(model, survivors.spread(vector), (x,))

    def loss(vector: Tensor) -> Tensor:
        return output.divergence(logits(vector), dense.logits(model, x, default_forward)) / len(x)

    jacobian = jacrev(logits)(vector)
    z = logits(vector)
    explicit = torch.zeros(len(vector), len(vector)).double()
    for n in range(len(x)):
        curve = torch.autograd.functional.hessian(
            lambda z: output.divergence(z[None], z.detach()[None]), z[n].detach()
        )
        explicit += jacobian[n].T @ curve @ jacobian[n] / len(x)
    gradient = objective.linearise(vector)
    assert torch.allclose(gradient, jacrev(loss)(vector), atol=1e-12)
    assert objective.value(vector) == pytest.approx(loss(vector).item(), rel=1e-9)
    for column in range(0, len(vector), 3):
        unit = torch.zeros_like(vector)
        unit[column] = 1
        assert torch.allclose(objective.product(unit), explicit[column], atol=1e-12)


class MeanOverSteps(nn.Module):
    """The embedding of a sequence, with logits at each position: (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh()).transpose(1, 2)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


CASES: dict[str, tuple[Any, Any]] = {
    "convolution, batch norm": (convolutional, lambda: torch.randn(60, 1, 8, 8)),
    "a module called twice": (Twice, lambda: torch.randn(60, 5)),
    "tied": (Tied, lambda: torch.randint(9, (60, 4))),
    "attention": (Transformer, lambda: torch.randint(1, 20, (60, 5))),
    "recurrent": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(60, 3, 4)),
    "positions": (MeanOverSteps, lambda: torch.randint(9, (60, 4))),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_models_of_all_kinds_come_closer(case, double):
    torch.manual_seed(1)
    make, inputs = CASES[case]
    model, x = make(), inputs()
    if double:
        model, x = model.double(), x.double() if x.is_floating_point() else x
    calibration = Calibration(Teacher.of(model), *hold_out(x.split(16)))
    masks = magnitude(model, 0.6)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    report = refit_outputs(model, masks, calibration, steps=3)
    assert report.left == {}
    assert sorted(report.refitted) == sorted(masks)
    assert report.error_after < 0.8 * report.error_before
    assert divergence(model, calibration) == pytest.approx(report.error_after, rel=1e-3)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
    varied = Survivors(model, masks).names
    for name, tensor in model.named_parameters():
        if name not in varied:
            assert torch.equal(tensor, before[name]), name
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, before[name]), name
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_survivors_are_kept_weights_and_biases_beside_them_once_each():
    model = convolutional()
    masks = {"0.weight": torch.rand(4, 1, 3, 3) > 0.5, "5.weight": torch.rand(5, 64) > 0.5}
    survivors = Survivors(model, masks)
    assert survivors.names == ["0.weight", "5.weight", "0.bias", "5.bias"]  # not batch norm's
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert len(survivors.read()) == kept + 4 + 5
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    before = state(model)
    survivors.write(survivors.read())
    assert same(model, before)
    tied = Tied()
    assert Survivors(tied, {"table.weight": torch.ones(9, 6, dtype=torch.bool)}).names == [
        "table.weight"
    ]


def test_on_a_linear_model_one_step_is_masked_least_squares(monkeypatch):
    monkeypatch.setattr(gauss_newton, "DAMPING", 1e-10)
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    dense = Teacher.of(model)
    masks = {"weight": torch.rand(3, 8) > 0.4}
    with torch.no_grad():
        model.weight.mul_(masks["weight"])
    x = torch.randn(60, 8).double()
    z = dense.logits(model, x, default_forward)
    calibration = Calibration(dense, list(x.split(16)), [], likelihood="gaussian")
    report = refit_outputs(model, masks, calibration, steps=1, products=60)
    for row, mask in enumerate(masks["weight"]):
        inputs = torch.cat([x[:, mask], torch.ones(60, 1).double()], 1)
        solution = torch.linalg.lstsq(inputs, z[:, row]).solution
        assert torch.allclose(model.weight[row, mask], solution[:-1], atol=1e-6)
        assert torch.allclose(model.bias[row], solution[-1], atol=1e-6)
    error = 0.5 * (model(x) - z).square().sum(1).mean()
    assert report.error_after == pytest.approx(error.item(), rel=1e-9)


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_digits_survive_pruning(share):
    model, masks, calibration = pruned(share)
    before = accuracy(model)
    report = refit_outputs(model, masks, calibration)
    assert report.error_after < 0.25 * report.error_before
    assert accuracy(model) > before + 0.3
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_it_repeats_exactly_and_leaves_no_trace():
    models = []
    for seed in range(2):
        model, masks, calibration = pruned(0.9)
        dense = calibration.dense
        model[0].eval()
        model.register_forward_pre_hook(lambda module, args: None)
        hooks = len(model._forward_pre_hooks)
        torch.manual_seed(seed)
        random_state = torch.get_rng_state()
        with torch.inference_mode(bool(seed)):  # as in a validation loop
            batches = [batch.clone() for batch in calibration.batches]
            calibration = Calibration(dense, batches, calibration.held_out)
            refit_outputs(model, masks, calibration, steps=2)
        assert torch.equal(random_state, torch.get_rng_state())
        assert [m.training for m in model] == [False, True, True, True, True, True]
        assert len(model._forward_pre_hooks) == hooks
        assert not any(p.requires_grad or p.is_inference() for p in model.parameters())
        models.append(model)
    assert same(models[0], models[1].state_dict())


def test_the_size_of_batches_does_not_matter():
    model, masks, calibration = pruned(0.9)
    other = copy.deepcopy(model)
    refit_outputs(model, masks, calibration, steps=1, products=5)
    labelled = [(x, torch.zeros(len(x))) for x in torch.cat(calibration.batches).split(13)]
    again = Calibration(calibration.dense, labelled, calibration.held_out)
    refit_outputs(other, masks, again, steps=1, products=5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_generated_samples_are_all_used_whatever_the_number_of_real_ones():
    model, masks, calibration = pruned(0.9)
    other, without = copy.deepcopy(model), copy.deepcopy(model)
    real, generated = calibration.batches[:4], calibration.batches[4:]
    count = sum(map(len, real))
    apart = replace(calibration, batches=real, generated=generated)
    together = replace(calibration, batches=[*real, *generated])
    refit_outputs(model, masks, apart, steps=1, samples=count)
    refit_outputs(other, masks, together, steps=1)
    assert same(model, state(other))
    refit_outputs(without, masks, replace(apart, generated=[]), steps=1)
    assert not same(model, state(without))


def test_fewer_samples_than_weights():
    model, masks, calibration = pruned(0.8, samples=100)
    assert sum(int(mask.sum()) for mask in masks.values()) > 700
    before = accuracy(model)
    report = refit_outputs(model, masks, calibration, samples=60)
    assert report.error_after < report.error_before
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert accuracy(model) > before


def test_no_refit_leaves_anything_in_memory():
    """An operation that keeps its own output (ReLU) once held on to it through a hook on it."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model, masks, calibration = pruned(0.9)
    counts = []
    for _ in range(3):
        refit_outputs(model, masks, calibration, steps=1, products=2)
        counts.append(tensors())
    assert counts[1] == counts[2]
