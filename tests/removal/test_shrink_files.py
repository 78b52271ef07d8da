"""Smaller models on disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune.removal import (
    RemovalError,
    load_shrunk,
    save_shrunk,
    shrink,
    shrink_with_report,
)
from tests.removal.shrink_cases import fresh, largest_difference, made, scattered, whole_units

NAMES = ("mlp_batch_norm", "lenet", "mobilenet", "unet", "two_inputs", "recurrent", "transformer")


@pytest.mark.parametrize("name", NAMES)
def test_a_freshly_built_model_is_given_the_widths_and_the_weights(
    name: str, tmp_path: Path
) -> None:
    model, inputs = made(name, 0)
    small, report = shrink_with_report(model, example_inputs=inputs, masks=scattered(model, 0.95))
    save_shrunk(small, tmp_path / "small.pt")
    dense, _ = made(name, 5)
    loaded = load_shrunk(tmp_path / "small.pt", dense)
    assert loaded is dense
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters_after
    state, other = small.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert str(loaded) == str(small)
    for each in fresh(inputs, 1)[:1]:
        x = (
            {k: v.float() if v.is_floating_point() else v for k, v in each.items()}
            if isinstance(each, dict)
            else (each.float() if each.is_floating_point() else each)
        )
        assert largest_difference(small, loaded, x) == 0


def test_loading_needs_no_removal_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    small = shrink(model, example_inputs=torch.randn(4, 3), masks=whole_units(model, biases=True))
    save_shrunk(small, tmp_path / "small.pt")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    dense = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    loaded = load_shrunk(tmp_path / "small.pt", dense)
    assert torch.equal(loaded(torch.ones(1, 3)), small(torch.ones(1, 3)))
    with pytest.raises(ImportError, match=r"lightning_prune\[removal\]"):
        shrink(dense, example_inputs=torch.ones(1, 3))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_shrunk(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), tmp_path / "a.pt")
    with pytest.raises(RemovalError) as raised:
        load_shrunk(
            tmp_path / "a.pt", nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(3), nn.Linear(2, 2))
        )
    for part in ("has no layer '2'", "'1.weight' is (3,) in the model, (2,)", "no '2.weight'"):
        assert part in str(raised.value)
    small = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    save_shrunk(small, tmp_path / "c.pt")
    dense = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 4))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with pytest.raises(RemovalError, match=r"'0' has out_features 12 in the file, but 3 in"):
        load_shrunk(tmp_path / "c.pt", dense)
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(RemovalError, match="'0' is a Conv1d in the model, another layer in"):
        load_shrunk(tmp_path / "c.pt", nn.Sequential(nn.Conv1d(7, 12, 1), nn.ReLU(), dense[2]))
    torch.save({"weight": torch.ones(2)}, tmp_path / "b.pt")
    with pytest.raises(RemovalError, match="written by save_shrunk"):
        load_shrunk(tmp_path / "b.pt", nn.Linear(3, 2))
