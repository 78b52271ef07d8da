"""Samples of each kind: what they are made of, that the draw decides all, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.augment.choosing import Starved, starvation
from lightning_prune.augment.drawing import Drawing, Place
from lightning_prune.augment.fitting import GeneratorError, GeneratorFitter
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.augment.vae import DenseVAE

KINDS = ("prior", "starved", "reconstructions", "interpolations")


def forward(module, batch):
    return module(batch[0])


def fitter_of(vae, seed=3):
    return GeneratorFitter(
        vae,
        torch.Size([8, 8]),
        torch.float32,
        torch.device("cpu"),
        learning_rate=1e-3,
        seed=seed,
    )


@pytest.fixture
def form(digits):
    x, y = digits[:24], torch.arange(24) % 10
    return BatchForm((x, y), x, y)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Dropout(0.5), nn.Linear(12, 10))


@pytest.fixture
def fitter(digits):
    torch.manual_seed(1)
    fitter = fitter_of(DenseVAE((8, 8)))
    for batch in digits.split(64)[:12]:
        fitter.step(batch)
    return fitter


def draw(kind, fitter, n, place, model, form, **arguments):
    return Drawing(kind, **arguments)(
        fitter, n, place, module=model, injection=Injection(forward), form=form
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_a_function_of_its_place_and_of_nothing_else(kind, fitter, model, form):
    other = copy.deepcopy(fitter)
    state = torch.get_rng_state()
    first, second = (draw(kind, fitter, 5, Place("a"), model, form)[0] for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (5, 8, 8)
    assert not torch.equal(first, second)
    torch.rand(7)
    draw(kind, other, 3, Place("b"), model, form)  # another purpose's do not count
    with torch.inference_mode():
        again = draw(kind, other, 5, Place("a"), model, form)[0]
    assert not again.is_inference()
    assert torch.equal(again, first)
    assert torch.equal(draw(kind, other, 5, Place("a", index=2), model, form)[0], second)
    assert not torch.equal(
        draw(kind, other, 5, Place("a", rank=1, index=2), model, form)[0], second
    )
    assert other.draws == {"a": 1, "b": 1}
    assert all(module.training for module in model.modules())


def test_plain_samples_are_the_fitters_own(fitter, model, form):
    expected = copy.deepcopy(fitter).draw(6, "inject")
    assert torch.equal(draw("prior", fitter, 6, Place("inject"), model, form)[0], expected)


def test_starved_samples_are_those_of_the_pool_on_which_the_model_wavers(fitter, model, form):
    """Written out: the pool, the model in eval mode on all of it at once, the choice."""
    pool = copy.deepcopy(fitter).draw(4 * 9, "inject")
    rule = Starved(floor=0.0)
    got = draw("starved", fitter, 9, Place("inject"), model, form, starved=rule)[0]
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = twin(pool)
        assert torch.equal(got, pool[rule(pool, logits, 9)])
        assert starvation(twin(got)).mean() > starvation(logits).mean()


def test_our_vaes_own_likelihood_keeps_the_unlikely_out(fitter, model, form, monkeypatch):
    """With a bound that is high for every second candidate, only these are chosen."""
    pool = copy.deepcopy(fitter).draw(4 * 9, "inject")
    asked = []

    def elbo(x, y=None):
        asked.extend(x)
        return torch.tensor([float(i % 2) for i in range(len(asked) - len(x), len(asked))])

    monkeypatch.setattr(fitter.vae, "elbo", elbo)
    rule = Starved(floor=0.5)
    got = draw("starved", fitter, 9, Place("inject"), model, form, starved=rule)[0]
    assert torch.equal(torch.stack(asked), pool)
    chosen = [int((pool == x).flatten(1).all(1).nonzero()[0, 0]) for x in got]
    assert all(index % 2 for index in chosen)


def test_a_conditional_vaes_samples_keep_their_classes(digits, model, form):
    torch.manual_seed(1)
    fitter = fitter_of(DenseVAE((8, 8), classes=10))
    pool = copy.deepcopy(fitter).draw_labelled(20, "a")
    x, labels = draw("starved", fitter, 5, Place("a"), model, form)
    for sample, label in zip(x, labels, strict=True):
        index = int((pool.inputs == sample).flatten(1).all(1).nonzero()[0, 0])
        assert pool.labels[index] == label
    x, labels = draw("reconstructions", fitter, 24, Place("a"), model, form)
    torch.testing.assert_close(  # each real input once, with its own class
        x[labels.argsort()].sum(0), fitter.vae.reconstruct(form.inputs, form.labels).sum(0)
    )
    assert torch.equal(labels.sort().values, form.labels.sort().values)
    assert draw("interpolations", fitter, 7, Place("a"), model, form)[1].shape == (7,)
    assert draw("prior", fitter, 7, Place("a"), model, form)[1].shape == (7,)
    soft = form.labels.float()
    with pytest.raises(ValueError, match="class indices"):
        draw("interpolations", fitter, 7, Place("a"), model, BatchForm(None, form.inputs, soft))


class Bare(nn.Module):
    """A generator with the two methods of the protocol, and a third if need be."""

    def loss(self, x):
        return x.sum()

    def sample(self, n):
        return torch.rand(n, 8, 8)


class Bent(Bare):
    wrong = torch.zeros(2, 3)

    def interpolate(self, x, other, t):
        return self.wrong


def test_a_generator_of_the_users_need_not_know_a_likelihood(model, form):
    assert draw("starved", fitter_of(Bare()), 5, Place("a"), model, form)[0].shape == (5, 8, 8)


@pytest.mark.parametrize("kind", ["reconstructions", "interpolations"])
def test_what_cannot_interpolate_is_refused_before_any_training(kind, model, form):
    with pytest.raises(TypeError, match="Bare has none"):
        Drawing(kind).check(Bare())
    with pytest.raises(TypeError, match="Bare has none"):
        draw(kind, fitter_of(Bare()), 5, Place("a"), model, form)
    Drawing("starved").check(Bare())
    Drawing(kind).check(DenseVAE((8, 8)))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(5, 3), r"shape \(5, 3\)"),
        (torch.zeros(5, 8, 8, dtype=torch.long), "int64"),
        (torch.full((5, 8, 8), torch.nan), "NaN"),
        ([1], "list"),
    ],
)
def test_bad_interpolations_are_named(made, message, model, form, monkeypatch):
    monkeypatch.setattr(Bent, "wrong", made)
    with pytest.raises(GeneratorError, match=message):
        draw("interpolations", fitter_of(Bent()), 5, Place("a"), model, form)


def test_faults_are_listed_together():
    with pytest.raises(ValueError, match=r"(?s)select.*pool"):
        Drawing("all", pool=0)
