"""Scores and earlier masks to select by: small, with many ties, and from a real network."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from lightning_prune.selection import keep_largest

Shapes = st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=3), min_size=1, max_size=5)
Levels = st.integers(1, 7)  # few levels: many equal scores
# Spread evenly: floats of hypothesis crowd at the ends, where earlier masks decide everything.
Shares = st.integers(0, 40).map(lambda part: part / 41)
Earlier = st.none() | Shares.map(lambda share: share * 0.8)
Seeds = st.integers(0, 10**6)


def make_scores(shapes, levels, seed):
    """Scores of a few whole values; one parameter in two is a hundred times weaker."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{i}": torch.randint(levels, shape, generator=generator).float()
        * (0.01 if (seed >> i) & 1 else 1.0)
        for i, shape in enumerate(shapes)
    }


def make_masks(scores, share, seed):
    """Masks of an earlier event that ranked by something else; they may empty a parameter."""
    if share is None:
        return None
    generator = torch.Generator().manual_seed(seed + 1)
    noise = {name: torch.rand(score.shape, generator=generator) for name, score in scores.items()}
    return keep_largest(noise, share)


def digits_scores():
    """w^2 g^2 of a small network with a convolution after some steps on real digits."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:256], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels[:256])
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 30), nn.ReLU(), nn.Linear(30, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {
        name: (p.detach() * p.grad).square() for name, p in model.named_parameters() if p.dim() > 1
    }


def removed(masks) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def total(masks) -> int:
    return sum(mask.numel() for mask in masks.values())


def complete(scores, masks):
    ones = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    return ones if masks is None else masks


def assert_equal(masks, expected) -> None:
    assert list(masks) == list(expected)
    for name in masks:
        assert masks[name].dtype == torch.bool
        assert torch.equal(masks[name], expected[name]), name
