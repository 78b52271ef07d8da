"""VAEs conditional on the class: labels in, inputs of that class out."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from lightning_prune.augment.conditional import condition_of
from lightning_prune.augment.conv_vae import ConvVAE
from lightning_prune.augment.settings import settings_for
from lightning_prune.augment.vae import DenseVAE


@pytest.mark.parametrize("kind", [DenseVAE, ConvVAE])
def test_samples_look_like_their_class(kind):
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    vae = kind(**settings_for(x[:64]), classes=10)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(15):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            vae.loss(x[index], y[index]).backward()
            optimizer.step()
    judge = LogisticRegression(max_iter=300).fit(x.flatten(1)[::2] / 16, y[::2])
    samples, labels = vae.eval().sample_labelled(500)
    assert set(labels.tolist()) == set(range(10))
    assert judge.score(samples.flatten(1) / 16, labels) > 0.8
    sevens = vae.sample(50, torch.tensor(7)).flatten(1) / 16
    assert (judge.predict(sevens) == 7).mean() > 0.8
    # The bound knows the classes too: right labels explain the inputs better than wrong ones.
    assert vae.elbo(x[:200], y[:200]).mean() > vae.elbo(x[:200], (y[:200] + 1) % 10).mean() + 1


@pytest.mark.parametrize("kind", [DenseVAE, ConvVAE])
def test_labels_reach_encoder_and_decoder(kind):
    vae = kind((4, 4), classes=3).eval()
    unit = torch.rand(2, 4, 4)
    zero, one = (condition_of(torch.tensor(k), 3, 2, unit) for k in (0, 1))
    assert not torch.allclose(vae.posterior(unit, zero).mean, vae.posterior(unit, one).mean)
    z = torch.zeros(2, vae.latent)
    assert not torch.allclose(
        vae.decoder(torch.cat([z, zero], 1)), vae.decoder(torch.cat([z, one], 1))
    )


def test_the_labels_asked_for_are_the_labels_returned():
    vae = DenseVAE((4,), classes=3)
    labels = torch.tensor([2, 0, 1, 1])
    samples, returned = vae.sample_labelled(4, labels)
    assert torch.equal(returned, labels)
    assert samples.shape == (4, 4)
    torch.manual_seed(0)
    _, drawn = vae.sample_labelled(3000)
    torch.testing.assert_close(drawn.bincount() / 3000, torch.full((3,), 1 / 3), rtol=0, atol=0.04)
    assert vae.sample(0).shape == (0, 4)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (None, "got None"),
        (torch.tensor([0.0, 1.0]), "dtype torch.float32"),
        (torch.tensor([0, 1, 2]), r"shape \(3,\)"),
        (torch.tensor([0, 3]), "values from 0 to 3"),
        (torch.tensor([-1, 2]), "values from -1 to 2"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, found):
    vae = DenseVAE((4,), classes=3)
    with pytest.raises(ValueError, match=found):
        vae.terms(torch.rand(2, 4), labels)
    assert vae.steps == 0  # nothing was half done


def test_an_unconditional_vae_takes_no_orders():
    vae = DenseVAE((4,))
    assert vae.sample_labelled(2)[1] is None
    vae.loss(torch.rand(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="unconditional"):
        vae.sample(2, torch.tensor([0, 1]))


def test_interpolation_runs_from_class_to_class():
    vae = DenseVAE((4,), classes=3).eval()
    x, other = torch.rand(2, 2, 4)
    a, b = torch.tensor([0, 1]), torch.tensor([2, 2])
    torch.testing.assert_close(vae.interpolate(x, other, 0.0, a, b), vae.reconstruct(x, a))
    torch.testing.assert_close(vae.interpolate(x, other, 1.0, a, b), vae.reconstruct(other, b))
