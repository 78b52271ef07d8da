"""Which parameters a model's outputs come from, whatever they go through after that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.saliency.head import output_parameters

ENDS = {
    "linear": (nn.Linear(5, 3), {"2.weight", "2.bias"}),
    "squeezed": (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), {"2.0.weight", "2.0.bias"}),
    "softmax": (nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(-1)), {"2.0.weight", "2.0.bias"}),
    "convolution": (
        nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 1, bias=False)),
        {"2.1.weight"},
    ),
    "norm": (nn.LayerNorm(5), {"2.weight", "2.bias"}),
    "nothing of its own": (nn.Tanh(), set()),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_output_layer_is_found(end: str, mode: type) -> None:
    last, expected = ENDS[end]
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), last), torch.randn(2, 4)
    parameters = dict(model.named_parameters())
    with mode():
        assert output_parameters(model, parameters, lambda: model(x)) == expected
    only = {name: p for name, p in parameters.items() if name.startswith("0")}
    assert output_parameters(model, only, lambda: model(x)) == set()
    assert model.training
