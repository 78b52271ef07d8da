"""One bit a weight, there and back, through a checkpoint file read with weights_only."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.masking import pack_masks, unpack_masks


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=4),
    seed=st.integers(0, 1000),
)
def test_there_and_back(shapes, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = {f"m{i}": torch.rand(s, generator=generator) < 0.5 for i, s in enumerate(shapes)}
    file = io.BytesIO()
    torch.save(pack_masks(masks), file)
    file.seek(0)
    found = unpack_masks(torch.load(file, weights_only=True))
    assert list(found) == list(masks)
    assert all(torch.equal(found[name], masks[name]) for name in masks)


def test_eight_weights_a_byte() -> None:
    masks = {"a": torch.ones(128, 784).bool(), "b": torch.ones(10, 128).bool()}
    assert pack_masks(masks)["bits"].numel() == (128 * 784 + 10 * 128) // 8


def test_a_damaged_state_is_refused() -> None:
    packed = pack_masks({"a": torch.ones(20).bool()})
    packed["bits"] = packed["bits"][:-1]
    with pytest.raises(ValueError, match="Expected 3 bytes"):
        unpack_masks(packed)
