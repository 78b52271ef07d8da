"""Devices without float64: what is to be precise goes to the CPU."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune import SaliencyAccumulator
from lightning_prune.passes import precision


def test_where_float64_is() -> None:
    assert precision.precise_device(torch.device("mps")) == torch.device("cpu")
    assert precision.precise_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert precision.widest(torch.device("mps")) == torch.float32
    assert precision.widest(torch.device("cpu")) == torch.float64
    assert precision.precise(torch.ones(2)).dtype == torch.float64


def test_counts_of_a_metric_stay_where_float64_is(monkeypatch) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("meta",))
    accumulator = SaliencyAccumulator(nn.Linear(3, 2)).to("meta")
    assert all(total.is_meta for total in accumulator.sums.values())
    assert accumulator.samples_seen.device == accumulator.energy.device == torch.device("cpu")
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ())
    assert accumulator.to("meta").samples_seen.is_meta
