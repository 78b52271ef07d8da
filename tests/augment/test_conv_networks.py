"""The convolutional VAE: any size comes back exactly, and digits are learnt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.networks import digits as mnist_digits
from lightning_prune.augment.conv_networks import conv_sizes
from lightning_prune.augment.conv_vae import ConvVAE, recipe_of, vae_from
from lightning_prune.augment.fitting import GeneratorFitter, build_vae
from lightning_prune.augment.settings import settings_for
from lightning_prune.augment.vae import VAE, DenseVAE

SHAPES = [
    ((28, 28), None),
    ((1, 7, 9), None),
    ((3, 13, 32), None),
    ((1, 1, 1), None),
    ((2, 3, 50), None),
    ((6, 101), 1),
    ((97,), None),
    ((2, 5, 6, 7), None),
]


@pytest.mark.parametrize(("shape", "dimensions"), SHAPES)
@pytest.mark.parametrize("classes", [None, 3])
def test_any_size_comes_back_exactly(shape, dimensions, classes):
    vae = ConvVAE(shape, dimensions=dimensions, classes=classes)
    x = torch.rand(2, *shape)
    y = None if classes is None else torch.tensor([0, 2])
    vae.loss(x, y).backward()
    assert all(p.grad is not None for p in vae.parameters())
    assert vae.sample(5).shape == (5, *shape)
    assert vae.sample(0).shape == (0, *shape)
    assert vae.reconstruct(x, y).shape == x.shape


@pytest.mark.parametrize("extent", range(1, 40))
def test_each_layer_works_on_half_of_the_one_before(extent):
    """The sizes that are computed are those that the convolutions make."""
    sizes = conv_sizes((2, extent, 2 * extent + 1), 2, 4)
    made = []
    vae = ConvVAE((2, extent, 2 * extent + 1), width=4)
    for layer in vae.encoder.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: made.append(tuple(out.shape[1:])))
    vae.posterior(torch.rand(1, 2, extent, 2 * extent + 1))
    expected = zip(sizes.channels[1:], sizes.extents[1:], strict=True)
    assert made == [(channels, *extents) for channels, extents in expected]


def test_every_output_depends_on_the_latent_point():
    """No element of an odd-sized picture is left to a constant of the last layer's bias."""
    torch.manual_seed(0)
    vae = ConvVAE((3, 7, 11)).double()
    z = torch.randn(1, vae.latent, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(vae.decoder, z)
    assert (jacobian.abs().amax(dim=(-1, -2)) > 0).all()


def test_a_conv_vae_of_photographs_rides_along():
    vae = ConvVAE((3, 224, 224))
    assert sum(p.numel() for p in vae.parameters()) < 1_000_000
    assert sum(p.numel() for p in ConvVAE((1, 28, 28)).parameters()) < 150_000


def _fitted(kind: type[VAE], x: torch.Tensor, steps: int) -> float:
    torch.manual_seed(0)
    vae = kind(**settings_for(x[:64]))
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        vae.loss(x[torch.randint(len(x) - 200, (64,))]).backward()
        optimizer.step()
    return -vae.elbo(x[-200:]).mean().item()


def test_digits_are_learnt_in_fewer_steps_than_by_the_dense_one():
    x, _ = mnist_digits()
    conv, dense = (_fitted(kind, x[:2000], 300) for kind in (ConvVAE, DenseVAE))
    assert conv < dense - 10.0  # nats, on held-out digits


@pytest.mark.parametrize("kind", [ConvVAE, DenseVAE])
def test_a_recipe_builds_the_same_vae_again(kind):
    vae = kind((3, 9), likelihood="logistic", levels=17, free_bits=0.1, classes=4, latent=3)
    again = vae_from(recipe_of(vae))
    assert type(again) is kind
    assert recipe_of(again) == recipe_of(vae)
    again.load_state_dict(vae.state_dict())
    assert recipe_of(nn.Linear(1, 1)) is None


def test_a_checkpoint_builds_the_conv_vae_again():
    settings = {"kind": "conv", "shape": [1, 9, 9]}
    vae = build_vae(settings, torch.float32, seed=0)
    shape, device = torch.Size([1, 9, 9]), torch.device("cpu")
    fitter = GeneratorFitter(vae, shape, torch.float32, device, learning_rate=1e-3, seed=0)
    fitter.step(torch.rand(4, 1, 9, 9))
    again = GeneratorFitter.from_state(fitter.state_dict(), None, learning_rate=1e-3, seed=0)
    assert isinstance(again.vae, ConvVAE)
    assert torch.equal(fitter.draw(3, "x"), again.draw(3, "x"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"shape": (3, 0)}, "shape"),
        ({"shape": (2, 2, 2, 2, 2)}, "shape"),
        ({"shape": ()}, "shape"),
        ({"shape": (2, 3, 4), "dimensions": 1}, "shape"),
        ({"shape": (3,), "dimensions": 2}, "shape"),
        ({"shape": (3, 4), "dimensions": 7}, "dimensions"),
        ({"shape": (3, 4), "width": 0}, "width"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        ConvVAE(**arguments)


def test_one_message_names_all_faults():
    with pytest.raises(ValueError, match=r"(?s)`latent`.*`levels`.*`free_bits`"):
        ConvVAE((3, 4), latent=0, levels=1, free_bits=-1.0)
