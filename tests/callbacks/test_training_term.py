"""The term's gradients beside the user's: scaled, shared out, clipped, averaged as theirs are."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import Distillation, distillation_loss
from lightning_prune.callbacks.training_term import add_training_term, check_strategy
from lightning_prune.callbacks.vae_augment import VAEAugmentCallback
from lightning_prune.passes.teacher import Teacher
from tests.two_processes import join_group

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32)[:96].flatten(1) / 16
Y = torch.tensor(DIGITS.target)[:96]
WEIGHT, TEMPERATURE = 0.5, 2.0


class Model(L.LightningModule):
    def __init__(self, optimizer=torch.optim.SGD, automatic=True, skip=False, **arguments):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        self.kind, self.arguments = optimizer, {"lr": 0.1} | arguments
        self.automatic_optimization, self.skip = automatic, skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.skip:
            return None
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return self.kind(self.parameters(), **self.arguments)


class Recorder(L.Callback):
    """Prunes half of the first layer before the run, and notes gradients and generated batches."""

    def __init__(self, callback):
        self.callback, self.gradients, self.generated, self.weights = callback, [], [], []
        self.batches, self.batch_of_step = [], []

    def on_train_start(self, trainer, pl_module):
        self.callback.before_pruning(trainer, pl_module)
        with torch.no_grad():
            pl_module.net[0].weight[:8] = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        joining = self.callback._joining
        self.batches.append(batch)
        generated = None if joining is None else joining._generated
        self.generated.append(None if generated is None else generated[0])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.batch_of_step.append(len(self.batches) - 1)
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.gradients.append(
            [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        )


def run(inject=("train",), model=None, weight=WEIGHT, **arguments):
    """Fit two batches of 48, the VAE ready after the first, and return what was recorded."""
    torch.manual_seed(0)
    model = Model() if model is None else model
    callback = VAEAugmentCallback(
        inject=inject, warmup=1, distillation=Distillation(weight, TEMPERATURE), share=0.25
    )
    recorder = Recorder(callback)
    trainer = L.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "plugins": []} | arguments,
        callbacks=[callback, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(X, Y), 24))
    return recorder, model, callback


def term_gradients(recorder, callback, step, batch):
    """The term's gradients, computed from scratch with the weights of a step."""
    student, teacher = Model(), Model()
    teacher.load_state_dict(callback._joining.teacher.weights)
    for parameter, value in zip(student.parameters(), recorder.weights[step], strict=True):
        parameter.data.copy_(value)
    loss = distillation_loss(student(batch), teacher(batch).detach(), "categorical", TEMPERATURE)
    return torch.autograd.grad(WEIGHT * loss, list(student.parameters()))


def user_gradients(recorder, step):
    """The gradients of the user's loss, computed from scratch with the weights of a step."""
    model = Model()
    for parameter, value in zip(model.parameters(), recorder.weights[step], strict=True):
        parameter.data.copy_(value)
    x, y = recorder.batches[recorder.batch_of_step[step]]
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def differences(with_term, without, step):
    """What the term added at a step before which both runs were the same."""
    return [a - b for a, b in zip(with_term.gradients[step], without.gradients[step], strict=True)]


def models(**arguments):
    for _ in range(2):
        torch.manual_seed(1)
        yield Model(**arguments)


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_the_gradients_are_the_users_plus_the_terms(automatic, optimizer):
    one, other = models(automatic=automatic, optimizer=optimizer)
    with_term, _, callback = run(model=one)
    without, _, _ = run(inject=(), model=other)
    assert with_term.generated[0] is None  # not warmed up yet
    assert len(with_term.generated[1]) == 6
    assert all(not d.any() for d in differences(with_term, without, 0))
    expected = term_gradients(with_term, callback, 1, with_term.generated[1])
    for difference, gradient in zip(differences(with_term, without, 1), expected, strict=True):
        torch.testing.assert_close(difference, gradient, rtol=1e-4, atol=1e-6)


def test_accumulated_terms_are_divided_as_the_loss_is():
    one, other = models()
    with_term, _, callback = run(model=one, accumulate_grad_batches=3)
    without, _, _ = run(inject=(), model=other, accumulate_grad_batches=3)
    parts = [term_gradients(with_term, callback, 0, batch) for batch in with_term.generated[1:3]]
    for difference, *gradients in zip(differences(with_term, without, 0), *parts, strict=True):
        torch.testing.assert_close(difference, sum(gradients) / 3, rtol=1e-4, atol=1e-6)
    assert len(with_term.gradients) == 2  # the last batch alone, divided by 3 too


@pytest.mark.parametrize("automatic", [True, False])
def test_amp_scales_come_and_go(automatic):
    """With a GradScaler the unscaled gradients are those of full precision, to half's accuracy."""
    recorded = []
    for inject in (("train",), ()):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        torch.manual_seed(1)
        recorded.append(run(inject, Model(automatic=automatic), plugins=[plugin]))
    (with_term, _, callback), (without, _, _) = recorded
    expected = term_gradients(with_term, callback, 1, with_term.generated[1])
    for difference, gradient in zip(differences(with_term, without, 1), expected, strict=True):
        torch.testing.assert_close(difference, gradient, rtol=5e-2, atol=1e-4)


def test_the_sum_is_clipped():
    _, clipped, _ = run(gradient_clip_val=1e-3)
    _, free, _ = run()
    torch.manual_seed(0)
    start = Model()

    def moved(model):
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return sum((a - b)[..., :].square().sum() for a, b in list(pairs)[1:]).sqrt()

    assert moved(clipped) <= 4 * 0.1 * 1e-3 * 1.01
    assert moved(free) > 10 * moved(clipped)


def test_a_skipped_step_stays_skipped(recwarn):
    torch.manual_seed(1)
    model = Model(skip=True)
    before = [p.clone() for p in model.parameters()]
    run(model=model)
    assert torch.equal(before[2], model.net[2].weight)


def test_frozen_parameters_stay_frozen():
    torch.manual_seed(1)
    model = Model()
    model.net[2].requires_grad_(False)
    before = model.net[2].weight.clone()
    recorder, _, _ = run(model=model)
    assert torch.equal(model.net[2].weight, before)
    assert recorder.gradients[-1][2] is None


def test_a_weight_of_zero_adds_nothing():
    one, other = models()
    _, with_term, _ = run(model=one, weight=0.0)
    _, without, _ = run(inject=(), model=other)
    for a, b in zip(with_term.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


class Mixed(L.Callback):
    """Adds the term on fixed inputs with a factor of its own at each step."""

    def __init__(self, mixes, forward=lambda module, batch: module(batch)):
        self.mixes, self.added, self.losses = mixes, [], []
        self.injection = Injection(forward, distillation=Distillation(WEIGHT, TEMPERATURE))

    def on_train_start(self, trainer, pl_module):
        self.teacher = Teacher.of(Model())

    def on_after_backward(self, trainer, pl_module):
        before = [p.grad.clone() for p in pl_module.parameters()]
        self.losses.append(
            add_training_term(
                trainer,
                pl_module,
                trainer.optimizers[0],
                X[:6],
                self.injection,
                self.teacher,
                mix=self.mixes[trainer.global_step],
            )
        )
        self.added.append([p.grad - b for p, b in zip(pl_module.parameters(), before, strict=True)])


def mixed(mixes, **arguments):
    callback = Mixed(mixes, **arguments)
    torch.manual_seed(3)
    trainer = L.Trainer(
        max_steps=len(mixes),
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(lr=0.0), DataLoader(TensorDataset(X, Y), 24))
    return callback


def test_the_mix_is_a_factor_of_the_weight():
    """The weights do not move, so all that differs between the steps is the factor."""
    callback = mixed([1.0, 0.25, 0.0])
    whole, quarter, none = callback.added
    assert any(bool(t.abs().max() > 1e-4) for t in whole)
    for a, b in zip(whole, quarter, strict=True):
        torch.testing.assert_close(b, a / 4, rtol=1e-3, atol=1e-7)
    assert not any(t.any() for t in none)
    assert torch.equal(callback.losses[0], callback.losses[1])  # the loss is without any weight
    assert callback.losses[2] is None


def test_a_mix_of_zero_costs_nothing():
    def forward(module, batch):
        raise AssertionError

    mixed([0.0, 0.0], forward=forward)
    with pytest.raises(AssertionError):
        mixed([0.1], forward=forward)


def test_lbfgs_sees_one_objective_a_batch():
    """Every evaluation of a step gets the term on the same inputs, so that the steps are sane."""
    recorder, model, callback = run(model=Model(torch.optim.LBFGS, lr=0.5, max_iter=4))
    assert all(recorder.batch_of_step.count(batch) > 1 for batch in range(4))
    for step, batch in enumerate(recorder.batch_of_step):
        user, generated = user_gradients(recorder, step), recorder.generated[batch]
        term = [torch.zeros_like(gradient) for gradient in user]
        if batch > 0:  # warmed up
            term = term_gradients(recorder, callback, step, generated)
            assert any(gradient.abs().max() > 1e-3 for gradient in term)
        for got, a, b in zip(recorder.gradients[step], user, term, strict=True):
            torch.testing.assert_close(got, a + b, rtol=1e-4, atol=1e-6)
    assert all(p.isfinite().all() for p in model.parameters())


def test_several_optimizers_get_the_gradients_of_their_own_parameters():
    class Two(Model):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [
                torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.net[0], self.net[2])
            ]

    torch.manual_seed(1)
    with_term, _, callback = run(model=Two(automatic=False))
    torch.manual_seed(1)
    without, _, _ = run(inject=(), model=Two(automatic=False))
    expected = term_gradients(with_term, callback, 3, with_term.generated[1])
    # Steps 2 and 3 belong to batch 1: the first optimizer's, then the second's.
    first, second = differences(with_term, without, 2), differences(with_term, without, 3)
    torch.testing.assert_close(first[0], expected[0], rtol=1e-4, atol=1e-6)
    assert not first[2].any()
    torch.testing.assert_close(second[2], expected[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second[0], expected[0], rtol=1e-4, atol=1e-6)


def test_stepping_past_lightning_is_noticed(recwarn):
    class Raw(Model):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    run(model=Raw(automatic=False), max_epochs=3)
    named = [str(w.message) for w in recwarn if "no generated inputs joined" in str(w.message)]
    assert len(named) == 1  # Python shows a warning once a line


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_batches_has_a_term_from_the_second_on():
    """Lightning shows the batch before: how many samples to draw, and of which form."""

    class Fetching(Model):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    recorder, model, _ = run(model=Fetching(), max_epochs=2)
    assert model.trainer.global_step == 8  # both epochs were trained to their ends
    assert [generated is not None for generated in recorder.generated] == [
        *[False, True, True, True],
        *[False, True, True, True],
    ]


def test_gradients_that_are_not_finite_are_left_out():
    class Fragile(Model):
        """Overflows on generated inputs only: real digits are exactly on a grid of sixteenths."""

        overflows = 0

        def forward(self, x):
            off_grid = bool((16 * x - (16 * x).round()).abs().max() > 1e-4)
            self.overflows += off_grid and torch.is_grad_enabled()
            return self.net(x) * (torch.inf if off_grid else 1.0)

    one, other = Fragile(), Fragile()
    other.load_state_dict(one.state_dict())
    run(model=one)
    run(inject=(), model=other)
    assert (one.overflows, other.overflows) == (3, 0)  # in all batches but the first
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_strategies_that_shard_are_refused():
    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards"):
        check_strategy(Trainer(), "vae")
    Trainer.strategy = DDPStrategy()
    check_strategy(Trainer(), "vae")


def test_two_processes_train_one_vae_and_one_model(tmp_path):
    """DDP over gloo: generators, and gradients with the term in them, agree across processes."""
    torch.multiprocessing.spawn(_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in ("vae", "model", "range"):
        assert all(torch.equal(a, b) for a, b in zip(first[kind], second[kind], strict=True))
    assert not torch.equal(first["generated"], second["generated"])
    # The gradient at the last step is the mean over processes of user's plus term's.
    local = [[u + t for u, t in zip(r["user"], r["term"], strict=True)] for r in (first, second)]
    for got, a, b in zip(first["gradient"], *local, strict=True):
        torch.testing.assert_close(got, (a + b) / 2, rtol=1e-4, atol=1e-6)


def _process(rank, store, folder):
    strategy = join_group(rank, store)
    recorder, model, callback = run(devices=2, strategy=strategy, max_epochs=2)
    step, batch = len(recorder.weights) - 1, recorder.generated[-1]
    torch.save(
        {
            "vae": list(callback.vae.parameters()),
            "range": [callback.vae.input_range.low, callback.vae.input_range.high],
            "model": [p.detach() for p in model.parameters()],
            "generated": batch,
            "user": user_gradients(recorder, step),
            "term": term_gradients(recorder, callback, step, batch),
            "gradient": recorder.gradients[step],
        },
        f"{folder}/{rank}.pt",
    )
