"""What the tests of the refit against the output share: real digits, a trained network, masks."""

from __future__ import annotations

import copy
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit.calibration import Calibration, hold_out


@cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


@cache
def trained() -> nn.Module:
    """64-40-20-10 on the first 1,400 digits, 3,560 weights."""
    x, y = digits()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 40),
        nn.ReLU(),
        nn.Linear(40, 20),
        nn.Dropout(0.1),
        nn.ReLU(),
        nn.Linear(20, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(25):
        for index in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    return net.requires_grad_(False)


def magnitude(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Remove the smallest weights of each matrix and kernel, in place."""
    masks = {}
    for name, p in model.named_parameters():
        if p.ndim > 1:
            sizes = p.detach().abs()
            masks[name] = sizes > sizes.flatten().kthvalue(int(share * p.numel())).values
            p.data.mul_(masks[name])
    return masks


def pruned(share: float, samples: int = 1400) -> tuple[nn.Module, dict[str, Tensor], Calibration]:
    model = copy.deepcopy(trained())
    fit, held_out = hold_out(digits()[0][:samples].split(50))
    calibration = Calibration(Teacher.of(model), fit, held_out)
    return model, magnitude(model, share), calibration


def accuracy(model: nn.Module) -> float:
    x, y = digits()
    return float((copy.deepcopy(model).eval()(x[1400:]).argmax(1) == y[1400:]).float().mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
