"""The network's own features as a VAE's encoder, caught in the user's training step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_prune.augment import DenseVAE
from lightning_prune.augment.feature_encoder import FeatureHeads, use_features
from lightning_prune.callbacks.batch_norm_statistics import BatchNormStatistics
from lightning_prune.callbacks.feature_encoder import FeatureEncoder
from lightning_prune.callbacks.generator_training import GeneratorTraining
from lightning_prune.callbacks.vae_augment import VAEAugmentCallback
from tests.callbacks.test_vae_augment_training import Digits, Event, X, Y, fit, loader, same


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_only_heads_and_decoder_are_new(kind):
    callback = VAEAugmentCallback(kind, encoder="features", warmup=1)
    trainer, model = fit([callback, Event()], max_epochs=3)
    names = [name for name, _ in callback.vae.named_parameters() if name.startswith("encoder")]
    assert names == [f"encoder.{part}" for part in FeatureHeads(16, 2).state_dict()]
    mine = {p.data_ptr() for p in callback.vae.parameters()}
    assert not mine & {p.data_ptr() for p in model.parameters()}
    assert trainer.callback_metrics["vae/distillation"].isfinite()
    assert not model.features._forward_hooks
    assert callback.generate(3).shape == (3, 8, 8)


class Counting(Digits):
    """Counts the forward passes of its first part."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.passes, self.outputs = 0, []

    def training_step(self, batch, batch_idx):
        features = self.features(batch[0])
        self.passes += 1
        self.outputs.append(features.detach().clone())
        return F.cross_entropy(self.head(features), batch[1])


def test_there_is_no_second_forward_pass_and_the_step_is_on_its_features():
    """A slow twin: the VAE on features computed apart, with the weights of each step."""
    model, callback = Counting(), VAEAugmentCallback(encoder="features", inject=())
    calls = []
    handle = model.features.register_forward_hook(lambda m, a, o: calls.append(m.training))
    fit([callback], model=model, max_epochs=2, limit_val_batches=0)
    handle.remove()
    # One more, in eval mode, with which the first batch told the features' width.
    assert calls.count(True) == model.passes == 14
    assert calls.count(False) == 1

    twin = VAEAugmentCallback(encoder="features", inject=())
    given = iter(model.outputs)
    twin._training.encoder.take = lambda n, joined=0: next(given)
    fit([twin], model=Counting(), max_epochs=2, limit_val_batches=0)
    assert same(twin.vae.state_dict(), callback.vae.state_dict())


def test_a_pass_between_is_not_the_steps():
    """A callback behind it tries a pass of its own, in eval mode, before the first step."""
    states = []
    for behind in ([], [BatchNormStatistics()]):
        torch.manual_seed(3)
        model = Digits(dropout=0.5)
        model.features.append(nn.BatchNorm1d(16))
        callback = VAEAugmentCallback(encoder="features", inject=())
        fit([callback, *behind], model=model, max_epochs=1, limit_train_batches=2)
        states.append(callback.vae.state_dict())
    assert same(*states)


def test_features_carry_what_the_inputs_are():
    callback = VAEAugmentCallback(encoder="features", inject=())
    _, model = fit([callback], max_epochs=40)
    vae = callback.vae
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    made = vae.reconstruct(X[:50])
    assert torch.equal(state, torch.get_rng_state())
    assert same(before, model.state_dict())
    own = (made - X[:50]).square().mean()
    others = (made - X[50:100]).square().mean()
    assert own < 0.8 * others
    assert vae.elbo(X[:50]).mean() > vae.elbo(16 * torch.rand(50, 8, 8)).mean()
    assert vae.interpolate(X[:4], X[4:8]).shape == (4, 8, 8)


def test_copies_leave_the_network_behind():
    callback = VAEAugmentCallback(encoder="features", inject=())
    _, model = fit([callback], max_epochs=1)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.vae.encoder.source is None
        assert torch.equal(twin.generate(2), copy.deepcopy(callback).generate(2))
        with pytest.raises(RuntimeError, match=r"`encoder=`"):
            twin.vae.elbo(X[:3])
    del model
    assert set(callback.state_dict()["generator"]["vae"]) == set(callback.vae.state_dict())


def test_a_name_that_is_none_is_answered_with_those_that_come_close():
    model = Digits()
    with pytest.raises(MisconfigurationException, match=r"'feature'.*features"):
        fit([VAEAugmentCallback(encoder="feature")], model=model)
    assert model.trainer.global_step == 0


class Aside(Digits):
    """Has parts that give no features of a batch."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.sums = Sums()
        self.pair = Pair()

    def forward(self, x):
        self.sums(x)
        self.pair(x)
        return super().forward(x)


class Sums(nn.Module):
    def forward(self, x):
        return x.sum(0)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("name", "problem"),
    [("unused", "did not"), ("sums", r"shape \(8, 8\)"), ("pair", "a tuple")],
)
def test_what_gives_no_features_is_named_before_the_first_step(name, problem):
    model = Aside()
    with pytest.raises(MisconfigurationException, match=f"'{name}'.*{problem}"):
        fit([VAEAugmentCallback(encoder=name, inject=())], model=model)
    assert model.trainer.global_step == 0
    assert not model.get_submodule(name)._forward_hooks


def test_a_step_past_the_submodule_is_named():
    class Past(Digits):
        def training_step(self, batch, batch_idx):
            x = F.relu(self.features[1](batch[0].flatten(1)))
            return F.cross_entropy(self.head(x), batch[1])

    with pytest.raises(MisconfigurationException, match=r"training step.*'features'"):
        fit([VAEAugmentCallback(encoder="features", inject=())], model=Past())


def test_rows_of_joined_samples_are_cut_off():
    encoder, model = FeatureEncoder("0", lambda m, b: m(b), "vae"), nn.Sequential(nn.Identity())
    encoder.attach(model)
    encoder.arm()
    model(X[:6])
    model(X[:2])  # a second call of the step is not listened to
    assert torch.equal(encoder.take(4, joined=2), X[:4])
    encoder.arm()
    model(X[:6])
    with pytest.raises(MisconfigurationException, match="4 samples"):
        encoder.take(4)


def test_before_the_fit_the_network_computes_the_features():
    callback = VAEAugmentCallback(
        encoder="features", inject=(), training=GeneratorTraining(fit_before=3)
    )
    _, model = fit([callback], max_epochs=1)
    assert callback._training.built.batches == 28
    assert all(module.training for module in model.modules())


def test_heads_refuse_features_of_something_else():
    vae = DenseVAE((8, 8))
    heads = use_features(vae, 16)
    heads.offer(torch.rand(4, 15))
    with pytest.raises(ValueError, match="16 elements"):
        vae.loss(X[:4])
    heads.offer(torch.rand(3, 16))
    with pytest.raises(ValueError, match="4 inputs"):
        vae.loss(X[:4])


def test_classes_stand_beside_the_features():
    callback = VAEAugmentCallback(encoder="features", classes=10, inject=())
    fit([callback], train=loader(X, Y), max_epochs=1)
    assert callback.vae.encoder.hidden.in_features == 26
    assert callback.vae.elbo(X[:5], Y[:5]).shape == (5,)
