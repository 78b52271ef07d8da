"""A call of a layer is its columns times its weight: against the layer itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.refit import columns
from lightning_prune.refit.columns import as_rows, chunks
from lightning_prune.refit.gram import BLOCKED_FROM, Moments
from lightning_prune.refit.layers import Layer
from tests.device_reads import DeviceReads

LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear, positions": (nn.Linear(5, 3), (7, 2, 4, 5)),
    "linear, one sample": (nn.Linear(5, 3), (5,)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (7, 3, 9)),
    "conv1d, no batch axis": (nn.Conv1d(3, 4, 3), (3, 9)),
    "conv1d, same": (nn.Conv1d(3, 4, 4, padding="same", dilation=2), (7, 3, 9)),
    "conv1d, circular": (nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (7, 3, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 0), (2, 1)), (7, 4, 6, 5)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2), (7, 4, 6, 5)),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (7, 4, 6, 5)),
    "conv2d, reflected": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (7, 4, 6, 5)),
    "conv2d, valid": (nn.Conv2d(4, 6, 3, padding="valid"), (7, 4, 6, 5)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), (2, 1, 1), 1, groups=2), (3, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("budget", [columns.CHUNK_BYTES, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_columns_times_rows_is_the_output(
    name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "CHUNK_BYTES", budget)
    module, shape = LAYERS[name]
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64)
    z = module(x).detach()
    parts = list(chunks(module, x, z))
    if budget == 1:
        assert all(len(a) == getattr(module, "groups", 1) for a, _ in parts)
        assert len(parts) == (
            1
            if x.ndim == len(module.weight.shape) - 1
            else x.numel() // 5
            if isinstance(module, nn.Linear)
            else len(x)
        )
    a, target = torch.cat([a for a, _ in parts], 1), torch.cat([t for _, t in parts], 1)
    rows = as_rows(module, module.weight.detach())
    bias = as_rows(module, module.bias.detach()).mT
    torch.testing.assert_close(a @ rows.mT + bias, target, rtol=1e-12, atol=1e-12)
    with_ones = torch.cat([a for a, _ in chunks(module, x, bias=True)], 1)
    assert torch.equal(with_ones[..., :-1], a)
    assert bool((with_ones[..., -1] == 1).all())
    # every output is in its place: group by group, in the order of the weight's rows
    expected = z.reshape(-1, z.shape[-1]) if isinstance(module, nn.Linear) else None
    if expected is not None:
        torch.testing.assert_close(target[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_in_float64_and_do_not_depend_on_the_split(dtype: torch.dtype) -> None:
    module = nn.Conv2d(4, 6, 3, groups=2).to(dtype)
    layer = Layer("weight", module, module.weight, module.bias)
    x, z = torch.randn(8, 4, 6, 5, dtype=dtype), torch.randn(8, 6, 4, 3, dtype=dtype)
    whole, parts = Moments.empty(layer, bias=True), Moments.empty(layer, bias=True)
    whole.add(module, x, z)
    for index in torch.arange(8).split(3):
        parts.add(module, x[index], z[index])
    assert whole.gram.dtype == whole.cross.dtype == torch.float64
    assert whole.gram.shape == (2, 19, 19)
    assert whole.cross.shape == (2, 19, 3)
    assert whole.positions == parts.positions == 8 * 12
    for name in ("gram", "cross", "squares"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [BLOCKED_FROM - 2, BLOCKED_FROM - 1, BLOCKED_FROM + 2])
def test_sums_by_blocks_are_the_whole_product(size: int, groups: int) -> None:
    module = nn.Conv1d(size * groups, 3 * groups, 1, groups=groups).double()
    layer = Layer("weight", module, module.weight, module.bias)
    x = torch.randn(9, size * groups, 2, dtype=torch.float64)
    moments = Moments.empty(layer, bias=True)
    for part in x.split(4):  # the mirrored halves are not added to
        moments.add(module, part)
    a = torch.cat([a for a, _ in chunks(module, x)], 1)
    a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
    torch.testing.assert_close(moments.gram, a.mT @ a, rtol=1e-12, atol=1e-12)


def test_no_number_is_read_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CHUNK_BYTES", 1)
    module = nn.Linear(5, 3)
    moments = Moments.empty(Layer("weight", module, module.weight, module.bias), bias=True)
    z = torch.randn(20, 3)
    with DeviceReads() as reads, torch.no_grad():
        moments.add(module, torch.randn(20, 5), z)
    assert reads.number == 0
    assert moments.squares == pytest.approx(float(z.double().square().sum()), rel=1e-12)


def test_the_error_is_the_squared_residual() -> None:
    module = nn.Linear(5, 3).double()
    layer = Layer("weight", module, module.weight, module.bias)
    x, z = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    moments = Moments.empty(layer, bias=True)
    moments.add(module, x, z)
    rows = torch.cat([module.weight, module.bias[:, None]], 1)[None].detach()
    residual = float((module(x) - z).detach().square().sum())
    assert moments.error(rows) == pytest.approx(residual, rel=1e-10)
