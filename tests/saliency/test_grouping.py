"""Groups: every row exactly once, never more samples than there is room for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.saliency.grouping import group_rows
from lightning_prune.saliency.target import output_rows


@settings(max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(2, 12),
    st.sampled_from([0.0, 1e-3, 0.3]),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([1, 300, 2**20]),
    st.integers(0, 99),
)
def test_every_row_is_taken_exactly_once(
    samples: int, classes: int, tolerance: float, launch: float, room: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = 4 * torch.randn(samples, classes, dtype=torch.float64)
    rows = output_rows(logits, tolerance=tolerance)
    groups = group_rows(rows, workspace=2**20, launch=launch, width=2**20 // (2 * room) or 1)
    found = torch.zeros(samples, classes, classes, dtype=torch.float64)
    for group in groups:
        assert len(group.samples) <= max(1, room)
        gradients = group.gradients(logits[group.samples])
        for direction in gradients:
            outer = direction[:, :, None] * direction[:, None, :]
            found.index_add_(0, group.samples, outer)
    everything = rows.vectors(torch.arange(len(rows.prediction)))
    expected = torch.zeros_like(found)
    expected.index_add_(0, rows.sample, everything[:, :, None] * everything[:, None, :])
    torch.testing.assert_close(found, expected)


def test_the_work_space_bounds_the_gradients_of_the_outputs() -> None:
    logits = torch.randn(64, 10, dtype=torch.float64)
    rows = output_rows(logits)
    workspace = 32 * 10 * 24  # room for 24 samples times passes
    for group in group_rows(rows, workspace, launch=1.0, width=1):
        assert group.gradients(logits[group.samples]).shape[:2].numel() <= 24


def test_nothing_to_backpropagate_makes_no_group() -> None:
    rows = output_rows(torch.tensor([[1000.0, 0.0]], dtype=torch.float64))
    assert not group_rows(rows, 2**20, launch=1.0, width=1)


@pytest.mark.parametrize("launch", [0.1, 100.0])
def test_a_costly_start_makes_fewer_groups(launch: float) -> None:
    torch.manual_seed(0)
    rows = output_rows(6 * torch.randn(200, 10, dtype=torch.float64), tolerance=1e-4)
    groups = group_rows(rows, 2**28, launch=launch, width=1)
    assert (len(groups) > 3) == (launch < 1)


@pytest.mark.parametrize("alone", [False, True])
def test_a_sample_with_many_rows_is_not_run_once_for_each(alone: bool) -> None:
    """Pixels and tokens: as many rows for each of few samples, so one forward pass will do."""
    torch.manual_seed(0)
    rows = output_rows(torch.randn(3, 5, 40, dtype=torch.float64))
    (group,) = group_rows(rows, 2**28, launch=100.0, width=1, alone=alone)
    assert sorted(group.samples.tolist()) == [0, 1, 2]


def test_a_sample_is_not_repeated_where_it_is_run_by_itself_as_well() -> None:
    """Of ten samples one has 400 rows: repeating it fills passes, but each repeat runs it again."""
    logits = torch.zeros(10, 2, 400, dtype=torch.float64)
    logits[1:, 0, 1:] = 1000.0  # nothing in doubt there
    rows = output_rows(logits)
    assert len(rows.prediction) == 409
    runs = {
        alone: sum(len(g.samples) for g in group_rows(rows, 2**28, 2.0, 1, alone))
        for alone in (False, True)
    }
    assert runs == {False: 409, True: 10}
