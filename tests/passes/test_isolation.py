"""What is borrowed is given back as it was."""

from __future__ import annotations

from contextlib import nullcontext

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune.passes.isolation import (
    derived_seed,
    evaluating,
    own_randomness,
    random_state_kept,
    unlogged,
)

CPU = torch.device("cpu")


def test_random_state_comes_back_after_an_exception():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), own_randomness(CPU, 1):
        torch.rand(5).view(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_from_their_key_alone():
    draws = []
    for key in ((0, "fit", 1), (0, "fit", 2), (0, "inject", 1), (1, "fit", 1), (0, "fit", 1)):
        torch.rand(3)
        with own_randomness(CPU, *key):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[-1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert 0 <= derived_seed("any") < 2**63


@pytest.mark.parametrize("index", [None, 3])
def test_the_state_of_any_accelerator_comes_back(monkeypatch, index):
    """A stand-in for a device that no test machine has, with a random state that is a number."""
    states = {2: 20, 3: 30}

    class Accelerator:
        device = staticmethod(lambda index: nullcontext())
        current_device = staticmethod(lambda: 2)
        get_rng_state = staticmethod(states.get)
        set_rng_state = staticmethod(lambda state, index: states.update({index: state}))

        @staticmethod
        def manual_seed(seed):
            states[2 if index is None else index] = seed

    monkeypatch.setattr(torch, "xpu", Accelerator)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Accelerator)  # torch's is cached
    device = torch.device("xpu") if index is None else torch.device("xpu", index)
    for context in (random_state_kept(device), own_randomness(device, 1)):
        with context:
            states[2 if index is None else index] += 1
        assert states == {2: 20, 3: 30}


def test_a_device_without_a_module_in_torch_has_the_cpus_state():
    before = torch.get_rng_state()
    for context in (random_state_kept(torch.device("xla")), own_randomness(torch.device("xla"), 1)):
        with context:
            torch.rand(3)
        assert torch.equal(torch.get_rng_state(), before)


class _Frozen(nn.Dropout):
    """Refuses to leave eval mode, as users do with parts they have frozen."""

    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)


def test_every_submodule_gets_its_own_mode_back():
    model = nn.Sequential(
        nn.BatchNorm1d(2), nn.Sequential(_Frozen(), nn.Linear(2, 2)), nn.LSTM(2, 2)
    )
    model.train()
    model[1][1].training = False
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError), evaluating(model):
        model[:2](torch.rand(3, 5))
    assert [module.training for module in model.modules()] == before


def test_recurrent_layers_stay_differentiable():
    model = nn.Sequential(nn.LSTM(2, 2), nn.Dropout())
    with evaluating(model, differentiable=True):
        assert model[0].training
        assert not model[1].training


class _Logarithm(nn.Module):
    """Has a ``log`` that is something else, and part of its work."""

    def log(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.log(x)


def test_lightning_modules_are_quiet_wherever_they_are_and_nothing_else_is():
    class Logging(L.LightningModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.log("mean", x.mean())
            self.log_dict({"mean": x.mean()})
            return x

    inner, said = Logging(), []
    inner.log_dict = said.append  # somebody's own
    model = nn.Sequential(_Logarithm(), inner)
    with unlogged(model), unlogged(model):  # in one another, too
        assert bool(model(torch.ones(2)).eq(0).all())
    assert said == []
    with pytest.raises(RuntimeError, match="inside"), unlogged(model):
        raise RuntimeError("inside")
    assert "log" not in vars(inner)
    assert inner.log_dict == said.append
