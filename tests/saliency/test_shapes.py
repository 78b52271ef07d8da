"""Shapes drawn at random: every rule against the one-sample loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.saliency import squared_gradients
from lightning_prune.saliency.target import output_rows
from tests import reference

small = st.integers(1, 3)
samples = st.integers(1, 4)
seeds = st.integers(0, 99)


def check(model: nn.Module, x: torch.Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        width = model(x.float()).flatten(1).shape[1]
    model = nn.Sequential(model, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).double().eval()
    x = x.double() if x.is_floating_point() else x
    expected = reference.squared_gradients(model, x)
    split = max(1, len(x) // 2)
    assert reference.largest_error(squared_gradients(model, [x]), expected) < 1e-9
    parts = squared_gradients(model, [x[split:], x[:split]])
    assert reference.largest_error(parts, expected) < 1e-9


@settings(max_examples=25)
@given(
    samples,
    st.lists(small, max_size=2),
    small,
    st.integers(1, 4),
    st.booleans(),
    seeds,
)
def test_linear(n: int, positions: list[int], width: int, out: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    check(nn.Linear(width, out, bias=bias), torch.randn(n, *positions, width), seed)


@settings(max_examples=40)
@given(
    samples,
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.tuples(small, small),
    st.tuples(st.integers(0, 2), st.integers(1, 2)),
    st.booleans(),
    seeds,
)
def test_convolutions(
    n: int,
    dims: int,
    groups: int,
    kernel: int,
    channels: tuple[int, int],
    padding_dilation: tuple[int, int],
    transposed: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    padding, dilation = padding_dilation
    stride = 1 + seed % 2
    kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    if not transposed:
        kinds = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    elif padding > dilation * (kernel - 1):
        padding = 0
    layer = kinds[dims - 1](
        channels[0] * groups,
        channels[1] * groups,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=seed % 3 != 0,
    )
    side = 1 + dilation * (kernel - 1) + seed % 2
    check(layer, torch.randn(n, channels[0] * groups, *[side] * dims), seed)


@settings(max_examples=20)
@given(
    samples,
    st.integers(1, 5),
    st.integers(2, 6),
    st.none() | st.integers(-2, 1),
    seeds,
)
def test_embeddings(n: int, length: int, rows: int, padding: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Embedding(rows, 3, padding_idx=padding)
    expected_shape = (n, length)
    x = torch.randint(0, rows, expected_shape)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(3 * length, 4)).double()
    expected = reference.squared_gradients(model, x)
    assert reference.largest_error(squared_gradients(model, [x]), expected) < 1e-9


@settings(max_examples=20)
@given(samples, st.integers(0, 3), st.integers(1, 3), seeds)
def test_norms(n: int, kind: int, spatial: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers = [nn.GroupNorm(2, 4), nn.LayerNorm([4, *[3] * spatial]), nn.RMSNorm(3), nn.LayerNorm(3)]
    body = nn.Sequential([nn.Conv1d, nn.Conv2d, nn.Conv3d][spatial - 1](2, 4, 1), layers[kind])
    check(body, torch.randn(n, 2, *[3] * spatial), seed)


@settings(max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(2, 90),
    st.sampled_from([0.0, 1e-6, 1e-3, 0.1]),
    st.sampled_from([0.3, 3.0, 30.0]),
    st.sampled_from(["probability", "fisher"]),
    seeds,
)
def test_what_is_dropped_stays_below_the_tolerance(
    n: int, classes: int, tolerance: float, scale: float, target: str, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(n, classes, dtype=torch.float64) * scale
    rows = output_rows(logits, target=target, tolerance=tolerance)
    p = logits.softmax(-1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if target == "fisher":
        jacobian = jacobian / p.sqrt()[:, :, None].clamp_min(1e-150)
    exact = torch.einsum("nkc,nkd->cd", jacobian, jacobian)
    vectors = rows.vectors(torch.arange(len(rows.prediction)))
    found = vectors.t() @ vectors
    total = float(jacobian.square().sum())
    assert abs(rows.total - total) <= 1e-9 * total
    assert rows.dropped <= tolerance * rows.total
    # The rows' sum of outer products is the exact one up to what was dropped.
    assert float((found - exact).diagonal().sum().abs()) <= (tolerance + 1e-9) * total
    assert float((found - exact).abs().max()) <= (tolerance + 1e-9) * total
