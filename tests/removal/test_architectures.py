"""Thirty architectures, weights removed here and there: the same function, fewer numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.removal import shrink_with_report
from tests.removal.shrink_cases import (
    ARCHITECTURES,
    fresh,
    in_double,
    largest_difference,
    made,
    masked,
    scattered,
)

SHARE_LEFT = {
    "mlp": 0.2,
    "mlp_batch_norm": 0.2,
    "lenet": 0.4,
    "resnet": 0.95,
    "preact": 0.9,
    "densenet": 0.4,
    "mobilenet": 0.3,
    "grouped": 0.6,
    "depth_multiplier": 0.6,
    "decoder": 0.5,
    "unet": 0.2,
    "conv1d": 0.3,
    "conv3d": 0.2,
    "padded_pools": 0.2,
    "reflecting": 0.3,
    "layer_norm": 0.5,
    "group_norm": 0.7,
    "embedding": 0.2,
    "transformer": 0.8,
    "attention": 0.5,
    "recurrent": 0.9,
    "tied": 0.8,
    "twice": 0.7,
    "two_inputs": 0.3,
    "two_outputs": 0.5,
    "highway": 0.5,
    "bilinear": 0.8,
    "squeeze_excite": 0.4,
    "concatenated_input": 0.3,
    "mixer": 0.8,
    "split_in_two": 0.5,
    "written_width": 0.5,
}
"""At most so much of the parameters is left at 97 %."""

KEPT_WHOLE = {
    "layer_norm": {"0": "LayerNorm", "1": "LayerNorm"},
    "group_norm": {"0": "GroupNorm", "5": "NativeBatchNorm", "6": "InstanceNorm2d"},
    "transformer": {"into": "LayerNorm"},
    "attention": {"attention.q": "Bmm", "attention.v": "Bmm"},
    "recurrent": {"lstm": "LSTM", "gru": "GRU"},
    "tied": {"encoder": "used more than once", "back": "mix channels"},
    "twice": {"shared": "used more than once", "into": "used more than once"},
    "two_outputs": {"features": "outputs of the model", "a": "outputs of the model"},
    "bilinear": {"both": "Bilinear", "out": "an input of the model"},
    "depth_multiplier": {"6": "several inputs a group"},
    "mixer": {"into": "mix channels", "along": "mix channels"},
    "written_width": {"conv": "not the same"},
    "mlp": {"4": "outputs of the model"},
}


@pytest.mark.parametrize("share", [0.9, 0.97])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_smaller_model_computes_the_same(name: str, share: float) -> None:
    model, inputs = made(name, 1)
    model, inputs = model.double(), in_double(inputs)
    masks = scattered(model, share)
    small, report = shrink_with_report(model, example_inputs=inputs, masks=masks)
    assert small is not model
    for each in fresh(inputs, 2):
        assert largest_difference(masked(model, masks), small, each) < 1e-9
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert report.parameters_after <= report.parameters_before
    if share > 0.95:
        assert report.parameters_after <= SHARE_LEFT[name] * report.parameters_before
        for layer, why in KEPT_WHOLE.get(name, {}).items():
            assert why in report.whole[layer]


@pytest.mark.parametrize("name", ["lenet", "mobilenet", "conv1d", "two_inputs"])
def test_the_origins_say_where_every_number_lay(name: str) -> None:
    model, inputs = made(name, 1)
    small, report = shrink_with_report(model, example_inputs=inputs, masks=scattered(model, 0.95))
    dense = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fewer = 0
    for key, tensor in [*small.named_parameters(), *small.named_buffers()]:
        if key in report.new_biases:
            continue
        was = report.take(key, dense[key].detach())
        assert was.shape == tensor.shape
        fewer += was.numel() < dense[key].numel()
        if key.endswith("weight") and dense[key].dim() > 1:  # a bias may have taken constants in
            kept = tensor != 0
            torch.testing.assert_close(was[kept], tensor.detach()[kept])
    assert fewer
