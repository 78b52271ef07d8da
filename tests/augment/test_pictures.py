"""A grid of samples, for loggers that can show it."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.augment.pictures import log_picture, picture_grid


@pytest.mark.parametrize(
    ("shape", "channels"), [((16,), 1), ((4, 4), 1), ((1, 4, 4), 1), ((3, 4, 4), 3), ((5, 4, 4), 1)]
)
def test_pictures_lie_side_by_side(shape, channels):
    samples = torch.randn(6, *shape)
    grid = picture_grid(samples, columns=4)
    assert grid.shape == (channels, 2 * 5 + 1, 4 * 5 + 1)
    assert grid.min() == 0
    assert grid.max() == 1
    if channels == 1 and len(shape) < 3:
        second = grid[0, 1:5, 6:10]
        flat = samples[1].reshape(4, 4)
        expected = (flat - samples.min()) / (samples.max() - samples.min())
        torch.testing.assert_close(second, expected)
    assert not grid[:, 6:, 11:].any()  # no fifth and sixth place in the second row


@pytest.mark.parametrize("shape", [(13,), (1,), (), (2, 3, 4, 4)])
def test_what_is_no_picture_is_not_shown(shape):
    assert picture_grid(torch.rand(3, *shape)) is None


def test_a_constant_sample_is_black():
    assert not picture_grid(torch.full((2, 4, 4), 7.0)).any()
    assert picture_grid(torch.zeros(0, 4, 4)) is None


class _Writer:
    def __init__(self) -> None:
        self.seen = []

    def add_image(self, name, picture, step):
        self.seen.append((name, tuple(picture.shape), step))


class _Board:
    def __init__(self) -> None:
        self.experiment = _Writer()


class _Named:
    def __init__(self) -> None:
        self.seen = []

    def log_image(self, key, images, step):
        self.seen.append((key, images[0].shape, str(images[0].dtype), step))


def test_loggers_get_what_they_can_take():
    board, named = _Board(), _Named()
    log_picture([object(), board, named], "vae/samples", lambda: torch.rand(4, 3, 2, 2), 7)
    assert board.experiment.seen == [("vae/samples", (3, 4, 13), 7)]
    assert named.seen == [("vae/samples", (4, 13, 3), "uint8", 7)]


def test_nothing_is_drawn_for_nobody():
    log_picture([object()], "vae/samples", lambda: pytest.fail("drawn"), 0)
