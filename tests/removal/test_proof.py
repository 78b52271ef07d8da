"""The proof lets round-off through and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.removal import RemovalError, shrink_with_report
from lightning_prune.removal.proof import check_rounding, disagreement
from lightning_prune.removal.surgery import Patient

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "got", "off"),
    [
        ([[2.0, 4.0]], [[2.0, 4.0]], 0.0),
        ([[2.0, 4.0]], [[2.0, 3.0]], 0.25),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ([[NAN, 1.0]], [[NAN, 1.0]], 0.0),
        ([[NAN, 1.0]], [[1.0, 1.0]], INF),
        ([[1.0, 1.0]], [[NAN, 1.0]], INF),
        ([[INF, 1.0]], [[-INF, 1.0]], INF),
        ([[INF, 2.0]], [[INF, 1.0]], 0.5),
        ([[1.0], [2.0]], [[1.0]], INF),
        ([[1.0]], [[1.0, 1.0]], INF),
        ([[1e-3], [1e3]], [[2e-3], [1e3]], 1.0),
    ],
)
def test_the_difference_is_relative_to_each_output(
    expected: list[list[float]], got: list[list[float]], off: float
) -> None:
    a, b = ([torch.tensor(x).double() for x in each] for each in (expected, got))
    assert disagreement(a, b)[0] == pytest.approx(off)


def test_whole_numbers_have_to_be_equal() -> None:
    assert disagreement([torch.tensor([3])], [torch.tensor([4])])[0] == INF
    assert disagreement([torch.tensor([3])], [torch.tensor([3])])[0] == 0.0


def test_round_off_is_let_through_and_more_is_not() -> None:
    exact = [torch.randn(8, dtype=torch.double)]
    rounded = [exact[0].float()]
    check_rounding(exact, rounded, [rounded[0] * (1 + 1e-6)])
    with pytest.raises(RemovalError, match="no model is returned"):
        check_rounding(exact, rounded, [rounded[0] * (1 + 1e-4)])
    check_rounding(exact, exact, [exact[0] * (1 + 1e-12)])
    with pytest.raises(RemovalError, match="no model is returned"):
        check_rounding(exact, exact, [exact[0] * (1 + 1e-8)])


def test_a_wrong_cut_is_undone_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    operate = Patient.operate

    def clumsy(self: Patient, plans: Any) -> None:
        operate(self, plans)
        if any(each.group.root == "2" for each in plans):
            with torch.no_grad():
                self.model.get_submodule("4").bias += 1e-6

    monkeypatch.setattr(Patient, "operate", clumsy)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    ).double()
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
        model[4].weight[:, 3:] = 0
    x = torch.randn(4, 3).double()
    small, report = shrink_with_report(model, example_inputs=x)
    # The first layer is cut all the same, the second is kept whole.
    assert (small[0].out_features, small[2].out_features) == (4, 6)
    assert "differs by" in report.whole["2"]
    torch.testing.assert_close(small(x), model(x))


def test_what_differs_in_its_own_dtype_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = Patient.finished

    def coarse(self: Patient, like: nn.Module) -> nn.Module:
        result = finished(self, like)
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.copy_(parameter.bfloat16())
        return result

    monkeypatch.setattr(Patient, "finished", coarse)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, 3:] = 0
    with pytest.raises(RemovalError, match="within round-off"):
        shrink_with_report(model, example_inputs=torch.randn(4, 3))
