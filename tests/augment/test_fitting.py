"""A generator trained beside a model: isolated, reproducible, resumable, faults named."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.augment.fitting import (
    GeneratorError,
    GeneratorFitter,
    average_in_place,
    build_vae,
    require_generator,
)
from lightning_prune.augment.vae import DenseVAE, settings_for

CPU = torch.device("cpu")


class _Noise(nn.Module):
    """A user's generator that draws from the global random state, as most do."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(features))
        self.dropout = nn.Dropout(0.5)

    def loss(self, x: Tensor) -> Tensor:
        return (self.dropout(x) - self.mean + 0.1 * torch.randn_like(x)).square().mean()

    def sample(self, n: int) -> Tensor:
        return self.dropout(self.mean + torch.randn(n, len(self.mean)))


def _fitter(vae: nn.Module, x: Tensor, **changes) -> GeneratorFitter:
    arguments = {"learning_rate": 1e-2, "seed": 3} | changes
    return GeneratorFitter(vae, x.shape[1:], x.dtype, x.device, **arguments)


def _weights(fitter: GeneratorFitter) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in fitter.vae.parameters()])


@pytest.fixture
def x(digits: Tensor) -> Tensor:
    return digits[:32]


@pytest.mark.parametrize("user", [False, True])
def test_the_random_state_is_left_alone(x, user):
    fitter = _fitter(_Noise() if user else build_vae(settings_for(x), x.dtype, seed=0), x)
    if user:
        x = x.flatten(1)[:, :4]
        fitter.shape = x.shape[1:]
    before = torch.get_rng_state()
    fitter.step(x)
    fitter.draw(5, "inject")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("user", [False, True])
def test_two_runs_are_the_same_whatever_the_global_seed(x, user):
    x = x.flatten(1)[:, :4] if user else x
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fitter = _fitter(_Noise() if user else build_vae(settings_for(x), x.dtype, seed=0), x)
        for _ in range(3):
            fitter.step(x)
        results.append((_weights(fitter), fitter.draw(4, "inject")))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    other = _fitter(_Noise() if user else build_vae(settings_for(x), x.dtype, seed=0), x, seed=4)
    for _ in range(3):
        other.step(x)
    assert not torch.equal(_weights(other), results[0][0])


def test_drawing_does_not_disturb_the_training(x):
    quiet, busy = (_fitter(build_vae(settings_for(x), x.dtype, seed=0), x) for _ in range(2))
    for _ in range(3):
        quiet.step(x)
        busy.draw(2, "generate")
        busy.step(x)
        busy.draw(9, "picture", index=0)
    assert torch.equal(_weights(quiet), _weights(busy))
    assert torch.equal(quiet.draw(3, "inject"), busy.draw(3, "inject"))
    assert not torch.equal(busy.draw(3, "inject"), busy.draw(3, "inject"))
    assert not torch.equal(busy.draw(3, "inject", rank=0), busy.draw(3, "inject", rank=1))


def test_the_users_gradients_are_left_alone(x):
    encoder = nn.Linear(64, 64)
    inputs = encoder(x.flatten(1)).view_as(x)  # still carries a graph
    fitter = _fitter(build_vae(settings_for(x), x.dtype, seed=0), x)
    before = inputs.detach().clone()
    terms = fitter.step(inputs)
    assert encoder.weight.grad is None
    assert torch.equal(inputs, before)
    assert all(p.grad is None for p in fitter.vae.parameters())
    assert set(terms) == {"loss", "reconstruction", "kl"}
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_trains_where_gradients_are_off(x, context):
    fitter = _fitter(build_vae(settings_for(x), x.dtype, seed=0), x)
    with context():
        inputs = x + 0.0
        before = _weights(fitter).clone()
        fitter.step(inputs)
        sample = fitter.draw(2, "inject")
    assert not torch.equal(_weights(fitter), before)
    assert not sample.is_inference()


def test_autocast_does_not_reach_the_generator(x):
    plain, cast = (_fitter(build_vae(settings_for(x), x.dtype, seed=0), x) for _ in range(2))
    plain.step(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.step(x)
    assert torch.equal(_weights(plain), _weights(cast))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_samples_have_the_users_dtype(x, dtype):
    x = x.to(dtype)
    fitter = _fitter(build_vae(settings_for(x), dtype, seed=0), x)
    assert fitter.step(x)
    assert fitter.draw(2, "inject").dtype == dtype


def test_a_step_on_bad_inputs_is_skipped(x):
    fitter = _fitter(build_vae(settings_for(x), x.dtype, seed=0), x)
    fitter.step(x)
    before = _weights(fitter).clone()
    bad = x.clone()
    bad[0, 0, 0] = torch.nan
    assert fitter.step(bad) == {}
    assert torch.equal(_weights(fitter), before)
    assert (fitter.trained, fitter.skipped) == (1, 1)
    assert fitter.step(x)["loss"].isfinite()


def test_gradients_that_are_not_finite_are_skipped_even_if_the_loss_is():
    class Root(_Noise):
        def loss(self, x: Tensor) -> Tensor:
            return (self.mean - self.mean).sqrt().sum() + self.mean.sum()  # 0, slope infinite

    fitter = _fitter(Root(), torch.rand(3, 4))
    assert fitter.step(torch.rand(3, 4)) == {}
    assert torch.equal(_weights(fitter), torch.zeros(4))


def test_a_resumed_fitter_ends_like_an_uninterrupted_one(digits):
    batches = digits.split(64)[:6]
    whole = _fitter(build_vae(settings_for(batches[0]), digits.dtype, seed=3), batches[0])
    for batch in batches[:3]:
        whole.step(batch)
        whole.draw(2, "inject")
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = GeneratorFitter.from_state(state, None, learning_rate=1e-2, seed=3)
    for batch in batches[3:]:
        whole.step(batch)
        resumed.step(batch)
    assert torch.equal(_weights(whole), _weights(resumed))
    assert torch.equal(whole.draw(4, "inject"), resumed.draw(4, "inject"))


def test_a_state_of_something_else_is_refused(x):
    state = _fitter(build_vae(settings_for(x), x.dtype, seed=0), x).state_dict()
    with pytest.raises(ValueError, match="_Noise like this one"):
        GeneratorFitter.from_state(state, _Noise(), learning_rate=1e-2, seed=0)
    state = _fitter(_Noise(), torch.rand(3, 4)).state_dict()
    with pytest.raises(ValueError, match="your own"):
        GeneratorFitter.from_state(state, None, learning_rate=1e-2, seed=0)


def test_a_generator_without_parameters_to_train_is_used_as_it_is():
    frozen = _Noise().requires_grad_(False)
    fitter = _fitter(frozen, torch.rand(3, 4))
    assert fitter.step(torch.rand(3, 4)) == {}
    assert fitter.trained == float("inf")
    assert fitter.draw(2, "inject").shape == (2, 4)
    state = fitter.state_dict()
    assert GeneratorFitter.from_state(state, frozen, learning_rate=1e-2, seed=0).batches == 1


def test_samples_come_from_eval_mode_and_modes_come_back():
    noise = _Noise()
    fitter = _fitter(noise, torch.rand(3, 4))
    assert (fitter.draw(500, "inject") != 0).all()  # dropout would leave zeros
    assert noise.dropout.training


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        (lambda n: torch.zeros(n + 1, 4), r"shape \(4, 4\)"),
        (lambda n: torch.zeros(n, 2, 2), r"shape \(3, 2, 2\)"),
        (lambda n: [0.0] * n, "a list"),
        (lambda n: torch.full((n, 4), torch.nan), "NaN"),
        (lambda n: torch.full((n, 4), torch.inf), "infinite"),
        (lambda n: torch.zeros(n, 4, dtype=torch.long), "int64"),
    ],
)
def test_wrong_samples_are_named(sample, problem):
    noise = _Noise()
    noise.sample = sample
    with pytest.raises(GeneratorError, match=rf"_Noise\.sample\(3\).*{problem}"):
        _fitter(noise, torch.rand(3, 4)).draw(3, "inject")


def test_a_sample_of_another_precision_is_converted():
    noise = _Noise()
    noise.sample = lambda n: torch.zeros(n, 4, dtype=torch.float64)
    assert _fitter(noise, torch.rand(3, 4)).draw(2, "inject").dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (lambda x: x.mean(0), r"shape \(4,\)"),
        (lambda x: 0.0, "float"),
        (lambda x: x.mean(), "no gradient"),
    ],
)
def test_wrong_losses_are_named(loss, problem):
    noise = _Noise()
    noise.loss = loss
    with pytest.raises(GeneratorError, match=problem):
        _fitter(noise, torch.rand(3, 4)).step(torch.rand(3, 4))


def test_token_ids_work_with_a_generator_that_knows_them():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(5))

        def loss(self, x: Tensor) -> Tensor:
            return -self.logits.log_softmax(0)[x].mean()

        def sample(self, n: int) -> Tensor:
            return torch.multinomial(self.logits.softmax(0), n * 3, replacement=True).view(n, 3)

    x = torch.tensor([[0, 1, 2], [0, 0, 1]])
    fitter = _fitter(Tokens(), x)
    for _ in range(20):
        assert set(fitter.step(x)) == {"loss"}
    assert fitter.draw(6, "inject").dtype == torch.long


@pytest.mark.parametrize("value", [nn.Linear(2, 2), object(), "vae"])
def test_what_is_no_generator_is_refused(value):
    with pytest.raises(TypeError, match="`loss"):
        require_generator(value)
    require_generator(DenseVAE((2,)))


def test_averaging_over_processes_is_one_exchange_for_all_tensors():
    calls = []

    def average(flat: Tensor) -> Tensor:
        calls.append(flat.shape)
        return flat / 2

    tensors = [torch.ones(2, 3), torch.full((), 4.0)]
    average_in_place(tensors, average)
    assert calls == [(7,)]
    assert torch.equal(tensors[0], torch.full((2, 3), 0.5))
    assert tensors[1] == 2.0


def test_a_process_with_another_batch_ends_with_the_same_generator(digits):
    """Two fitters that exchange gradients as two processes do stay equal."""
    halves = digits[:32], digits[32:64]
    fitters = [_fitter(build_vae(settings_for(halves[0]), digits.dtype, seed=0), h) for h in halves]
    for _ in range(3):
        sent: list[Tensor] = []

        def keep(flat: Tensor, into: list[Tensor] = sent) -> Tensor:
            into.append(flat.clone())
            return flat

        for rank, fitter in enumerate(fitters):
            probe = GeneratorFitter.from_state(
                fitter.state_dict(), None, learning_rate=1e-2, seed=3
            )
            probe.step(halves[rank], rank=rank, average=keep)
        mean = (sent[0] + sent[1]) / 2
        for rank, fitter in enumerate(fitters):
            fitter.step(halves[rank], rank=rank, average=lambda _, mean=mean: mean.clone())
        assert not torch.equal(sent[0], sent[1])
    assert torch.equal(_weights(fitters[0]), _weights(fitters[1]))
    assert torch.equal(fitters[0].vae.input_range.high, fitters[1].vae.input_range.high)


# Classes, and half precision


def _conditional(x: Tensor, **changes) -> GeneratorFitter:
    return _fitter(DenseVAE((8, 8), classes=3), x, **changes)


def test_a_conditional_vae_is_trained_on_labels_and_draws_them(x):
    y = torch.arange(32) % 3
    fitter, others = _conditional(x), _conditional(x)
    others.vae.load_state_dict(fitter.vae.state_dict())
    for _ in range(3):
        assert fitter.step(x, y)["loss"].isfinite()
        others.step(x, (y + 1) % 3)
    assert not torch.equal(_weights(fitter), _weights(others))
    inputs, labels = fitter.draw_labelled(50, "inject", index=1)
    assert inputs.shape == (50, 8, 8)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == [0, 1, 2]
    assert torch.equal(fitter.draw(50, "inject", index=1), inputs)
    again = fitter.draw_labelled(50, "inject", index=1)
    assert torch.equal(again.inputs, inputs)
    assert torch.equal(again.labels, labels)


def test_labels_reach_none_but_a_conditional_vae(x):
    with_labels, without = (
        _fitter(build_vae(settings_for(x), x.dtype, seed=0), x) for _ in range(2)
    )
    with_labels.step(x, torch.zeros(32, dtype=torch.long))
    without.step(x)
    assert torch.equal(_weights(with_labels), _weights(without))
    assert with_labels.draw_labelled(2, "inject").labels is None
    own = _fitter(_Noise(), torch.rand(3, 4))
    assert set(own.step(torch.rand(3, 4), torch.zeros(3, dtype=torch.long))) == {"loss"}


def test_a_conditional_vae_without_labels_says_so(x):
    with pytest.raises(ValueError, match="3 classes"):
        _conditional(x).step(x)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (None, "a NoneType"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
        (torch.zeros(2), "float32"),
        (torch.tensor([0, 3]), "from 0 to 3"),
    ],
)
def test_wrong_labels_of_samples_are_named(x, labels, problem):
    fitter = _conditional(x)
    fitter.vae.sample_labelled = lambda n: (torch.zeros(n, 8, 8), labels)
    with pytest.raises(GeneratorError, match=rf"sample_labelled\(2\).*{problem}"):
        fitter.draw_labelled(2, "inject")


def test_a_step_in_half_precision_keeps_the_weights_whole(x):
    whole = _fitter(build_vae(settings_for(x), x.dtype, seed=0), x)
    half = _fitter(build_vae(settings_for(x), x.dtype, seed=0), x, autocast=torch.bfloat16)
    for _ in range(20):
        whole.step(x)
        terms = half.step(x)
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert not torch.equal(_weights(whole), _weights(half))
    assert terms["loss"].item() == pytest.approx(whole.step(x)["loss"].item(), rel=0.2)


def test_heads_on_a_networks_features_come_back_from_a_state(x):
    settings = settings_for(x) | {"kind": "conv", "features": 7, "classes": 2}
    fitter = _fitter(build_vae(settings, x.dtype, seed=0), x)
    again = GeneratorFitter.from_state(fitter.state_dict(), None, learning_rate=1e-2, seed=0)
    assert again.vae.encoder.features == 7
    assert torch.equal(_weights(fitter), _weights(again))
