"""Which parameters are pruned by default, and how users name their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations

from lightning_prune.masking import find_prunable


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm((4, 4))
        self.group_norm = nn.GroupNorm(2, 4)
        self.rms_norm = nn.RMSNorm((2, 4))
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.lstm = nn.LSTM(4, 4)
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.image_bias = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.raw = nn.Parameter(torch.zeros(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.phase = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)


def test_the_weights_of_layers_and_nothing_else() -> None:
    prunable = find_prunable(Everything())
    assert set(prunable.parameters) == {
        "conv.weight",
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "raw",
        "frozen.weight",
    }
    reasons = prunable.left_out
    assert reasons["conv.bias"] == reasons["attention.bias_k"] == reasons["image_bias"] == "a bias"
    assert reasons["layer_norm.weight"] == "part of a LayerNorm"
    assert reasons["rms_norm.weight"] == "part of a RMSNorm"
    assert "parametrised" in reasons["spectral.parametrizations.weight.original"]
    assert "complex64" in reasons["phase"]
    assert "vector" in reasons["scale"]


def test_the_older_norms_of_weights_are_parametrisations_too() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        normed = utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    model = nn.ModuleDict({"lstm": normed, "spectral": utils.spectral_norm(nn.Linear(4, 4))})
    prunable = find_prunable(model)
    assert list(prunable.parameters) == ["lstm.weight_ih_l0"]
    parametrised = {name for name, why in prunable.left_out.items() if "parametrised" in why}
    assert parametrised == {"lstm.weight_hh_l0_g", "lstm.weight_hh_l0_v", "spectral.weight_orig"}


def test_every_parameter_is_on_one_side() -> None:
    model = Everything()
    prunable = find_prunable(model)
    names = [name for name, _ in model.named_parameters()]
    assert sorted([*prunable.parameters, *prunable.left_out]) == sorted(names)
    order = [name for name in names if name in prunable.parameters]
    assert list(prunable.parameters) == order


def test_a_tied_weight_counts_once() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["table"].weight
    assert len(find_prunable(model).parameters) == 1


def test_named_ones_are_taken_whatever_they_are() -> None:
    prunable = find_prunable(Everything(), ["raw", "conv.bias"])
    assert list(prunable.parameters) == ["raw", "conv.bias"]
    assert prunable.left_out["conv.weight"] == "not named"


def test_unknown_names_are_refused_all_at_once_with_close_ones() -> None:
    with pytest.raises(ValueError, match="parameters") as caught:
        find_prunable(Everything(), ["conv.weigth", "nothing_like_it_at_all", "phase", "raw"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "did you mean 'conv.weight'" in lines[1]
    assert "nothing_like_it_at_all" in lines[2]
    assert "complex64" in lines[3]


@pytest.mark.parametrize(("names", "error"), [([], ValueError), ("conv.weight", TypeError)])
def test_names_are_a_list_of_some(names, error) -> None:
    with pytest.raises(error, match="parameters"):
        find_prunable(Everything(), names)


def test_nothing_to_prune_is_an_error_with_reasons() -> None:
    with pytest.raises(ValueError, match="part of a BatchNorm1d"):
        find_prunable(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="no parameters at all"):
        find_prunable(nn.ReLU())
    with pytest.raises(ValueError, match="lazy module"):
        find_prunable(nn.LazyLinear(3))


def test_a_pattern_takes_what_is_prunable_by_default_of_what_it_fits() -> None:
    prunable = find_prunable(Everything(), ["lstm.*", "embed*"])
    assert list(prunable.parameters) == [
        "embedding.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
    ]
    assert prunable.left_out["lstm.bias_ih_l0"] == "a bias"
    assert prunable.left_out["conv.weight"] == prunable.left_out["conv.bias"] == "not named"


def test_an_exact_name_and_a_pattern_that_fits_it_do_not_take_from_each_other() -> None:
    for names in (["conv.bias", "conv.*"], ["conv.*", "conv.bias"]):
        assert list(find_prunable(Everything(), names).parameters) == ["conv.weight", "conv.bias"]


def test_excluded_ones_are_left_out_with_the_pattern_however_they_were_chosen() -> None:
    prunable = find_prunable(Everything(), exclude=["lstm.*", "raw"])
    assert set(find_prunable(Everything()).parameters) - set(prunable.parameters) == {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "raw",
    }
    assert prunable.left_out["lstm.weight_hh_l0"] == "excluded by 'lstm.*'"
    assert prunable.left_out["raw"] == "excluded by 'raw'"
    assert prunable.left_out["lstm.bias_hh_l0"] == "a bias"
    named = find_prunable(Everything(), ["conv.*", "conv.bias"], exclude=["*.bias"])
    assert list(named.parameters) == ["conv.weight"]
    assert named.left_out["conv.bias"] == "excluded by '*.bias'"


def test_patterns_that_fit_nothing_are_refused_all_at_once_with_close_ones() -> None:
    with pytest.raises(ValueError, match="parameters") as caught:
        find_prunable(Everything(), ["atention.*", "*.bias"], exclude=["lsmt.*", "conv.*"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "did you mean 'attention.*'" in lines[1]
    assert "'conv.bias' (a bias)" in lines[2]
    assert "full name" in lines[2]
    assert "`exclude`" in lines[3]
    assert "did you mean 'lstm.*'" in lines[4]


def test_to_exclude_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"excluded by '\*'.*Exclude less"):
        find_prunable(nn.Linear(2, 2), exclude=["*"])
    with pytest.raises(TypeError, match="`exclude`"):
        find_prunable(nn.Linear(2, 2), exclude="weight")


def test_finding_changes_nothing_about_frozen_parameters() -> None:
    model = Everything()
    assert not find_prunable(model, ["froz*"]).parameters["frozen.weight"].requires_grad
    assert model.conv.weight.requires_grad


def test_an_exact_name_works_even_if_it_looks_like_a_pattern() -> None:
    model = nn.Module()
    model.register_parameter("w[0]", nn.Parameter(torch.ones(2, 2)))
    model.register_parameter("w0", nn.Parameter(torch.ones(2, 2)))
    assert list(find_prunable(model, ["w[0]"]).parameters) == ["w[0]"]
    assert list(find_prunable(model, exclude=["w[0]"]).parameters) == ["w0"]


@pytest.mark.parametrize("name", ["head.weight", "head.*"])
def test_a_tied_weight_can_be_given_by_any_of_its_names(name: str) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embedding"].weight
    model["body"] = nn.Linear(4, 4)
    assert list(find_prunable(model, [name]).parameters) == ["embedding.weight"]
    prunable = find_prunable(model, exclude=[name])
    assert list(prunable.parameters) == ["body.weight"]
    assert prunable.left_out["embedding.weight"] == f"excluded by {name!r}"


def test_vectors_in_the_shape_of_a_kernel_are_vectors() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(1, 4, 1, 1))
            self.class_token = nn.Parameter(torch.randn(1, 1, 8))
            self.temperature = nn.Parameter(torch.ones(1, 1))
            self.positions = nn.Parameter(torch.randn(1, 16, 8))
            self.into, self.out = nn.Linear(1, 5), nn.Linear(5, 1)
            self.depthwise, self.point = nn.Conv1d(4, 4, 1, groups=4), nn.Conv2d(1, 1, (3, 1))
            self.cell, self.lstm = nn.GRUCell(1, 1), nn.LSTM(1, 4)
            self.table = nn.Embedding(6, 1)

    model = Scaled()
    prunable = find_prunable(model)
    assert set(prunable.parameters) == {
        "positions",
        *(f"{name}.weight" for name in ("into", "out", "depthwise", "point", "table")),
        *(f"cell.weight_{part}" for part in ("ih", "hh")),
        *(f"lstm.weight_{part}_l0" for part in ("ih", "hh")),
    }
    assert "vector in the shape (1, 4, 1, 1)" in prunable.left_out["gamma"]
    assert {"class_token", "temperature"} < set(prunable.left_out)
    assert list(find_prunable(model, ["gamma"]).parameters) == ["gamma"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_the_weights_of_a_scripted_part_are_those_of_its_layers() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2))

    scripted = model()
    scripted[0] = torch.jit.script(scripted[0])
    expected, found = find_prunable(model()), find_prunable(scripted)
    assert list(found.parameters) == list(expected.parameters) == ["0.0.weight", "1.weight"]
    assert found.left_out.keys() == expected.left_out.keys()
    assert found.left_out["0.0.bias"] == "a bias"
