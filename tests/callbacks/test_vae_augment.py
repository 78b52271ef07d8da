"""The VAE callback in real Trainers on real digits."""

from __future__ import annotations

import copy
import csv
import pickle
import sys

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.augment import DenseVAE, Distillation, GeneratorError
from lightning_prune.callbacks.generator_training import GeneratorTraining
from lightning_prune.callbacks.vae_augment import VAEAugmentCallback
from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.teacher import Teacher

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32)[:300]
Y = torch.tensor(DIGITS.target)[:300]


class Digits(L.LightningModule):
    """A classifier with dropout and batch norm, whose steps need random numbers."""

    def __init__(self, optimizer=torch.optim.Adam, automatic=True):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(16, 10),
        )
        self.kind = optimizer
        self.automatic_optimization = automatic

    def forward(self, x):
        return self.net(x)

    def read(self, batch):
        return (batch["image"], batch["label"]) if isinstance(batch, dict) else batch

    def training_step(self, batch, batch_idx):
        x, y = self.read(batch)
        loss = F.cross_entropy(self(x), y)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = self.read(batch)
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=1e-2)


class Plain(Digits):
    """A model without batch norm, for batches of one, and without arguments, for a CLI."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()


class StandInPruner(L.Callback):
    """Calls what the pruner calls, when it calls it: scores at a validation's end, then prunes."""

    def __init__(self, epoch=0, prune=True):
        self.epoch, self.prune, self.batches = epoch, prune, []

    def _sources(self, trainer):
        return [c for c in trainer.callbacks if isinstance(c, VAEAugmentCallback)]

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking and trainer.current_epoch == self.epoch:
            for source in self._sources(trainer):
                self.batches.extend(source.scoring_batches(trainer, pl_module, samples=100))

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch + 1 and self.prune:
            for source in self._sources(trainer):
                source.before_pruning(trainer, pl_module)
            with torch.no_grad():
                pl_module.net[1].weight[:, ::2] = 0.0


def loader(x=X, y=Y, shuffle=False, batch_size=32):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def fit(callbacks, model=None, train=None, val=None, ckpt_path=None, **arguments):
    model = Digits() if model is None else model
    arguments = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | arguments
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(
        model,
        loader() if train is None else train,
        loader(X[:64], Y[:64]) if val is None else val,
        ckpt_path=ckpt_path,
    )
    return trainer, model


def seeded_fit(callbacks, seed=0, **arguments):
    torch.manual_seed(seed)
    trainer, model = fit(callbacks, **arguments)
    return trainer, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The user's training


@pytest.mark.parametrize("automatic", [True, False])
def test_training_only_the_vae_changes_nothing_else_bit_for_bit(automatic):
    def run(callbacks):
        torch.manual_seed(0)
        model = Digits(automatic=automatic)
        return seeded_fit(callbacks, model=model, train=loader(shuffle=True))

    callback = VAEAugmentCallback(inject=())
    _, plain, random = run([StandInPruner()])
    _, beside, random_beside = run([callback, StandInPruner()])
    assert same(plain, beside)
    assert torch.equal(random, random_beside)
    assert callback.generate(3).shape == (3, 8, 8)


def test_without_a_pruning_event_the_training_is_untouched_too():
    torch.manual_seed(0)
    _, plain, _ = seeded_fit([], model=Digits(), train=loader(shuffle=True))
    torch.manual_seed(0)
    _, beside, _ = seeded_fit(
        [VAEAugmentCallback(), StandInPruner(prune=False)],
        model=Digits(),
        train=loader(shuffle=True),
    )
    assert same(plain, beside)


def test_the_term_is_in_the_training_from_the_first_event_on():
    pruned = []
    for callback in (VAEAugmentCallback(inject=()), VAEAugmentCallback(inject=("train",))):
        torch.manual_seed(0)
        trainer, state, _ = seeded_fit([callback, StandInPruner()], model=Digits(), max_epochs=3)
        pruned.append((trainer.callback_metrics, state))
    assert not same(pruned[0][1], pruned[1][1])
    assert "vae/distillation" not in pruned[0][0]
    assert pruned[1][0]["vae/distillation"] > 0


def test_the_user_keeps_the_random_state_beside_the_term():
    _, _, alone = seeded_fit([StandInPruner()], train=loader(shuffle=True), max_epochs=3)
    callbacks = [StandInPruner(), VAEAugmentCallback()]
    _, _, beside = seeded_fit(callbacks, train=loader(shuffle=True), max_epochs=3)
    assert torch.equal(alone, beside)


def test_running_statistics_are_those_of_the_real_data():
    """With a learning rate of 0 the weights stay, and so must what batch norm sees."""
    states = []
    for callbacks in ([], [VAEAugmentCallback(warmup=0), StandInPruner(prune=False), _Event()]):
        torch.manual_seed(0)
        model = Digits(optimizer=lambda p, lr: torch.optim.SGD(p, lr=0.0))
        states.append(seeded_fit(callbacks, model=model)[1])
    assert same(*states)


class _Event(L.Callback):
    """A pruning event before the first step that changes no weight."""

    def on_train_start(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if isinstance(callback, VAEAugmentCallback):
                callback.before_pruning(trainer, pl_module)


class Idle(Digits):
    """A model whose own loss pulls nowhere."""

    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)


def test_the_term_alone_leads_a_pruned_student_to_its_teacher():
    """Without one real input or label, the student comes closer to the dense model on digits."""
    callback, model = VAEAugmentCallback(share=1.0), Digits()
    fit([callback], model=model, max_epochs=25)
    dense = copy.deepcopy(model).eval()

    def distance():
        with torch.no_grad():
            p, q = dense(X).log_softmax(1), model.eval()(X).log_softmax(1)
        model.train()
        return (p.exp() * (p - q)).sum(1).mean().item()

    student = Idle()
    student.net = model.net
    callback._joining.teacher = Teacher.of(student)
    with torch.no_grad():
        model.net[1].weight[:, ::3] = 0.0
    before = distance()
    fit([callback, _Half()], model=student, max_epochs=10)
    assert before > 0.1
    assert distance() < 0.5 * before


class _Half(L.Callback):
    """Keeps a third of the first layer's weights at zero."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net[1].weight[:, ::3] = 0.0


# Scoring


@pytest.mark.parametrize("form", ["x", "pair", "list", "dict"])
def test_scoring_batches_have_the_form_of_the_users(form):
    def collate(rows):
        x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        return {"x": x, "pair": (x, y), "list": [x, y], "dict": {"image": x, "label": y}}[form]

    class Model(Digits):
        def read(self, batch):
            x = batch if isinstance(batch, torch.Tensor) else super().read(batch)[0]
            return x, torch.zeros(len(x), dtype=torch.long)

    batches = DataLoader(TensorDataset(X, Y), 32, collate_fn=collate)
    pruner, callback = StandInPruner(epoch=1), VAEAugmentCallback(warmup=5)
    model = Model()
    seen = []

    class Check(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            for batch in pruner.batches:
                x = batch if form == "x" else batch["image"] if form == "dict" else batch[0]
                if form != "x":
                    y = batch["label"] if form == "dict" else batch[1]
                    assert torch.equal(y, pl_module(x).argmax(1))
                seen.append(len(x))

    fit([callback, pruner, Check()], model=model, train=batches, val=batches)
    assert seen == [32, 18]  # half of 100, no batch larger than the largest real one
    kind = {"x": torch.Tensor, "pair": tuple, "list": list, "dict": dict}[form]
    assert all(type(batch) is kind for batch in pruner.batches)


def test_nothing_is_scored_where_nothing_is_asked_for_or_ready():
    for callback in (
        VAEAugmentCallback(inject=("train",)),
        VAEAugmentCallback(inject=()),
        VAEAugmentCallback(warmup=1000),
    ):
        pruner = StandInPruner()
        fit([callback, pruner], max_epochs=1)
        assert pruner.batches == []
    assert list(VAEAugmentCallback().scoring_batches(None, None, 10)) == []


def test_scoring_leaves_the_model_as_it_was():
    model, callback = Digits(), VAEAugmentCallback(warmup=1)
    before = {}

    class Around(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.sanity_checking:
                return
            before["state"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            before["random"] = torch.get_rng_state()
            before["modes"] = [m.training for m in pl_module.modules()]
            list(callback.scoring_batches(trainer, pl_module, 64))
            assert same(before["state"], pl_module.state_dict())
            assert torch.equal(before["random"], torch.get_rng_state())
            assert before["modes"] == [m.training for m in pl_module.modules()]

    fit([callback, Around()], model=model, max_epochs=1)
    assert before


# What the VAE learns, and its range


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x,
        lambda x: (x / 16 - 0.5) / 0.25,
        lambda x: (x / 16).flatten(1),
        lambda x: (x / 16).unsqueeze(1),
        lambda x: (
            (x / 16).unsqueeze(1).repeat(1, 3, 1, 1) * torch.tensor([1.0, 5.0, 9.0]).view(3, 1, 1)
        ),
        lambda x: x.double(),
    ],
    ids=["raw", "normalised", "flat", "channel", "colours", "double"],
)
def test_generated_inputs_resemble_the_users(transform):
    x = transform(X)
    model = Digits().to(x.dtype)
    if x.ndim == 4 and x.shape[1] == 3:
        model.net[1] = nn.Linear(192, 16)
    callback = VAEAugmentCallback()
    fit([callback], model=model, train=loader(x), val=loader(x[:64], Y[:64]), max_epochs=20)
    samples = callback.generate(300)
    assert samples.shape == (300, *x.shape[1:])
    assert samples.dtype == x.dtype
    assert samples.min() >= x.min() - 1e-3
    assert samples.max() <= x.max() + 1e-3
    means = torch.stack([samples.mean(0).flatten(), x.mean(0).flatten()])
    assert torch.corrcoef(means)[0, 1] > 0.95
    assert (means[0] - means[1]).abs().max() < 0.2 * (x.max() - x.min())


def test_generate_gives_new_inputs_each_time_and_disturbs_nothing():
    callback = VAEAugmentCallback(inject=())
    fit([callback], max_epochs=1)
    assert not torch.equal(callback.generate(2), callback.generate(2))
    before = torch.get_rng_state()
    callback.generate(2)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="`n`"):
        callback.generate(0)


def test_before_the_first_batch_the_error_says_when():
    callback = VAEAugmentCallback()
    with pytest.raises(RuntimeError, match=r"trainer\.fit"):
        callback.generate(1)
    with pytest.raises(RuntimeError, match=r"trainer\.fit"):
        _ = callback.vae
    own = DenseVAE((8, 8))
    assert VAEAugmentCallback(own).vae is own


# Generators of the user's


class OneShift(nn.Module):
    """Learns the mean digit, and draws around it from the global random state."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(8, 8))

    def loss(self, x):
        return (x + 0.01 * torch.randn_like(x) - self.mean).square().mean()

    def sample(self, n):
        return self.mean + torch.randn(n, 8, 8)


def test_a_generator_of_the_users_is_trained_and_used():
    generator = OneShift()
    callback = VAEAugmentCallback(generator, learning_rate=0.3)
    pruner = StandInPruner()
    trainer, _ = fit([callback, pruner], max_epochs=4)
    assert callback.vae is generator
    assert torch.corrcoef(torch.stack([generator.mean.flatten(), X.mean(0).flatten()]))[0, 1] > 0.9
    assert callback.generate(2).shape == (2, 8, 8)
    assert "vae/loss" in trainer.callback_metrics
    assert "vae/kl" not in trainer.callback_metrics
    assert "vae/distillation" in trainer.callback_metrics


def test_a_generator_of_the_users_leaves_the_training_alone():
    _, plain, random = seeded_fit([], seed=4, train=loader(shuffle=True))
    torch.manual_seed(4)
    generator = OneShift()
    _, beside, random_beside = seeded_fit(
        [VAEAugmentCallback(generator, inject=())], seed=4, train=loader(shuffle=True)
    )
    assert same(plain, beside)
    assert torch.equal(random, random_beside)


@pytest.mark.parametrize(
    "sample", [lambda n: torch.zeros(n, 64), lambda n: torch.full((n, 8, 8), torch.nan)]
)
def test_a_wrong_sample_stops_the_run_between_two_steps(sample):
    generator = OneShift()
    generator.sample = sample
    model = Digits()
    with pytest.raises(GeneratorError, match=r"OneShift\.sample"):
        fit([_Event(), VAEAugmentCallback(generator, warmup=3)], model=model)
    assert model.trainer.global_step == 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_generator_that_shares_the_models_parameters_is_refused():
    model = Digits()
    model.generator = OneShift()
    with pytest.raises(MisconfigurationException, match="shares parameters"):
        fit([VAEAugmentCallback(model.generator)], model=model)


def test_losses_that_are_not_finite_never_reach_the_model(recwarn):
    class Broken(OneShift):
        def loss(self, x):
            return super().loss(x) * torch.nan

    generator, model = Broken(), Digits()
    fit([VAEAugmentCallback(generator), StandInPruner()], model=model, max_epochs=3)
    named = [str(w.message) for w in recwarn if "NaN or infinite" in str(w.message)]
    assert len(named) == 1
    assert "at batch 1." in named[0]
    assert not generator.mean.any()
    assert all(p.isfinite().all() for p in model.parameters())


# Faults that are named before the first step


def test_token_ids_need_a_generator_of_their_own():
    class Tokens(Digits):
        def forward(self, x):
            return self.net(x.float())

    model = Tokens()
    with pytest.raises(MisconfigurationException, match=r"torch\.int64.*`loss\(x\)"):
        fit([VAEAugmentCallback()], model=model, train=loader(X.long()), val=loader(X.long()))
    assert model.trainer.global_step == 0


def test_single_numbers_need_a_generator_of_their_own():
    class Lookup(Digits):
        def forward(self, x):
            return self.net(x[:, None].expand(-1, 64))

    batches = loader(X[:, 3, 3])
    with pytest.raises(MisconfigurationException, match=r"\(\) fit no.*\n.*has shape \(1,\)"):
        fit([VAEAugmentCallback()], model=Lookup(), train=batches, val=batches)


def test_a_batch_that_cannot_be_read_is_named():
    def collate(rows):
        x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        return {"a": x, "b": x + 1, "label": y}

    class Two(Digits):
        def read(self, batch):
            return batch["a"], batch["label"]

    batches = DataLoader(TensorDataset(X, Y), 32, collate_fn=collate)
    with pytest.raises(BatchFormatError, match="one input tensor a batch"):
        fit([VAEAugmentCallback()], model=Two(), train=batches, val=batches)


def test_a_forward_that_fails_is_found_before_the_first_step():
    class Other(Digits):
        def forward(self, x, mask):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0], None), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    model = Other()
    with pytest.raises(BatchFormatError, match="forward="):
        fit([VAEAugmentCallback()], model=model)
    assert model.trainer.global_step == 0
    callback = VAEAugmentCallback(forward=lambda module, batch: module(batch[0], None))
    pruner = StandInPruner()
    fit([callback, pruner], model=Other(), max_epochs=2)


def test_labels_that_no_prediction_fits_are_found_before_the_first_step():
    class Sevens(Digits):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            pass

    sevens = torch.zeros(len(X), 7)
    with pytest.raises(ValueError, match=r"`likelihood`"):
        fit([VAEAugmentCallback()], model=Sevens(), train=loader(y=sevens))
    fit(
        [VAEAugmentCallback(inject=("train",))],
        model=Sevens(),
        train=loader(y=sevens),
        max_epochs=1,
    )


def test_all_arguments_out_of_range_are_named_at_once():
    with pytest.raises(
        ValueError, match=r"(?s)`inject`.*`share`.*`learning_rate`.*`warmup`.*`name`"
    ):
        VAEAugmentCallback(inject=("scores",), share=0.0, learning_rate=-1.0, warmup=-1, name="")
    with pytest.raises(ValueError, match="`likelihood`"):
        VAEAugmentCallback(likelihood="poisson")
    with pytest.raises(TypeError, match="`vae`"):
        VAEAugmentCallback(nn.Linear(2, 2))
    assert VAEAugmentCallback(inject="train").inject == ("train",)


def test_inputs_of_another_shape_are_named():
    callback = VAEAugmentCallback()
    fit([callback], max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"\('N', 8, 8\).*\(32, 64\)"):
        fit([callback], train=loader(X.flatten(1)))


# What is logged


def test_losses_and_pictures_reach_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit([VAEAugmentCallback(), StandInPruner()], logger=logger, max_epochs=3)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    for name in ("vae/loss", "vae/reconstruction", "vae/kl"):
        values = [event.value for event in events.Scalars(name)]
        assert len(values) == 3
        assert values[-1] < 100
    assert len(events.Scalars("vae/distillation")) == 1  # two epochs are the warm-up
    pictures = events.Images("vae/samples")
    assert len(pictures) == 2
    assert (pictures[0].width, pictures[0].height) == (8 * 9 + 1, 8 * 9 + 1)


def test_logged_losses_are_means_over_samples():
    callback = VAEAugmentCallback(inject=())
    seen = []
    original = callback._training.step
    callback._training.step = lambda trainer, form, **options: (
        seen.append((original(trainer, form, **options), len(form.inputs))) or seen[-1][0]
    )
    trainer, _ = fit([callback], max_epochs=1)
    expected = sum(terms["loss"].item() * n for terms, n in seen) / sum(n for _, n in seen)
    assert trainer.callback_metrics["vae/loss"].item() == pytest.approx(expected, rel=1e-5)


def test_loggers_without_pictures_are_passed_over(tmp_path):
    loggers = [CSVLogger(tmp_path, "", "csv"), TensorBoardLogger(tmp_path, "", "events")]
    fit([VAEAugmentCallback(warmup=1)], logger=loggers, max_epochs=2, log_every_n_steps=1)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        assert sum(bool(row["vae/loss"]) for row in csv.DictReader(file)) == 2
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0})
    assert len(events.Reload().Images("vae/samples")) == 2  # of the logger behind it


def test_two_of_the_kind_work_side_by_side():
    first, second = VAEAugmentCallback(), VAEAugmentCallback(OneShift(), name="other", seed=1)
    trainer, _ = fit([first, second, StandInPruner()], max_epochs=3)
    assert first.state_key != second.state_key
    assert {"vae/loss", "other/loss", "vae/distillation", "other/distillation"} <= set(
        trainer.callback_metrics
    )


# Checkpoints


class Saver(L.Callback):
    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("user", [False, True])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, user):
    def callbacks():
        torch.manual_seed(2)
        return VAEAugmentCallback(OneShift() if user else None, warmup=10), StandInPruner()

    def model():
        torch.manual_seed(0)
        model = Digits(optimizer=torch.optim.AdamW)
        model.net[4] = nn.Identity()  # Lightning does not restore the global random state
        return model

    whole, pruner = callbacks()
    _, uninterrupted = fit([whole, pruner], model=model(), max_epochs=5)

    first, pruner = callbacks()
    path = tmp_path / "epoch=2.ckpt"
    fit([first, pruner, Saver(path, epoch=2)], model=model(), max_epochs=3)
    state = torch.load(path, weights_only=True)
    assert state["callbacks"][first.state_key]["teacher"] is not None

    second, pruner = callbacks()
    _, resumed = fit([second, pruner], model=model(), max_epochs=5, ckpt_path=path)
    assert same(uninterrupted.state_dict(), resumed.state_dict())
    assert same(whole.vae.state_dict(), second.vae.state_dict())
    assert torch.equal(whole.generate(3), second.generate(3))


def test_a_checkpoint_brings_the_vae_back_without_a_fit(tmp_path):
    callback = VAEAugmentCallback()
    trainer, model = fit([callback], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = VAEAugmentCallback()
    L.Trainer(
        accelerator="cpu",
        callbacks=[again],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).validate(model, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(again.generate(2), callback.generate(2))


def test_a_state_from_before_the_first_batch_loads():
    state = VAEAugmentCallback().state_dict()
    callback = VAEAugmentCallback()
    fit([callback], max_epochs=1)
    callback.load_state_dict(state)
    with pytest.raises(RuntimeError):
        callback.generate(1)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    callback = VAEAugmentCallback()
    fit([_Event(), callback], max_epochs=1)
    other = VAEAugmentCallback()
    other.load_state_dict(callback.state_dict())
    model = Digits()
    model.net[5] = nn.Linear(16, 11)
    with pytest.raises(MisconfigurationException, match="dense weights"):
        fit([other], model=model)


def test_copies_and_pickles_carry_the_vae_along():
    callback = VAEAugmentCallback()
    fit([_Event(), callback], max_epochs=1)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert torch.equal(twin.generate(2), copy.deepcopy(callback).generate(2))


# Trainers of every kind


def test_a_second_fit_goes_on_training_the_same_vae():
    callback, model = VAEAugmentCallback(), Digits()
    fit([_Event(), callback], model=model, max_epochs=1)
    vae, steps = callback.vae, int(callback.vae.steps)
    teacher = callback._joining.teacher
    fit([callback], model=model, max_epochs=1)
    assert callback.vae is vae
    assert int(vae.steps) == 2 * steps
    assert callback._joining.teacher is teacher
    fit([callback], model=Digits(), max_epochs=1)
    assert callback._joining.teacher is None  # the teacher of one model teaches no other


@pytest.mark.parametrize(
    "arguments",
    [
        {"fast_dev_run": 2},  # samples join the second
        {"max_steps": 3, "max_epochs": -1},
        {"limit_val_batches": 0},
        {"val_check_interval": 0.5},
        {"gradient_clip_val": 0.5},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_trainers_of_every_kind(arguments):
    callback = VAEAugmentCallback(inject=("train",), warmup=1)
    trainer, state, _ = seeded_fit([_Event(), callback, StandInPruner()], **arguments)
    assert callback.generate(2).shape == (2, 8, 8)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert trainer.callback_metrics["vae/distillation"] > 0
    _, without, _ = seeded_fit([VAEAugmentCallback(inject=()), StandInPruner()], **arguments)
    assert not same(state, without)


@pytest.mark.parametrize(
    ("batch_size", "generated"), [(1, [1] * 9), (299, [1, 30, 1])], ids=["1", "299"]
)
def test_small_and_ragged_batches(batch_size, generated):
    class Noting(Plain):
        """Notes the sizes of the batches that it is trained on in eval mode: the term's."""

        def forward(self, x):
            if torch.is_grad_enabled() and not self.net[4].training:
                sizes.append(len(x))
            return super().forward(x)

    sizes = []
    callback = VAEAugmentCallback(warmup=1, share=0.1)
    trainer, _ = fit(
        [_Event(), callback],
        model=Noting(),
        train=loader(X[:300], Y[:300], batch_size=batch_size),
        limit_train_batches=5,
        max_epochs=2,
    )
    assert sizes == generated  # in all batches but the first
    assert trainer.callback_metrics["vae/distillation"].isfinite()


def test_validating_alone_needs_no_vae():
    callback = VAEAugmentCallback()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.validate(Digits(), loader(), verbose=False)
    with pytest.raises(RuntimeError):
        callback.generate(1)


def test_no_data_of_the_users_is_held_after_the_fit():
    callback = VAEAugmentCallback()
    fit([_Event(), callback], max_epochs=1)
    assert callback._training.form is None
    assert callback._joining._generated is None


# Configuration


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_a_lightning_cli_reads_every_argument(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = {
        "vae": {
            "class_path": "lightning_prune.augment.DenseVAE",
            "init_args": {"shape": [8, 8], "latent": 4, "likelihood": "gaussian"},
        },
        "inject": ["train"],
        "share": 0.25,
        "distillation": {"weight": 0.3, "temperature": 4.0},
        "likelihood": "bernoulli",
        "learning_rate": 1e-3,
        "warmup": 5,
        "seed": 7,
        "forward": "lightning_prune.saliency.default_forward",
        "name": "digits",
        "training": {"every_n_steps": 2, "epochs": [1, 5], "precision": "bf16"},
        "encode": "torch.nn.functional.relu",
    }
    callback = {
        "class_path": "lightning_prune.callbacks.vae_augment.VAEAugmentCallback",
        "init_args": arguments,
    }
    cli = LightningCLI(
        Plain,
        args={"trainer": {"callbacks": [callback], "logger": False, "accelerator": "cpu"}},
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
    )
    (made,) = [c for c in cli.trainer.callbacks if isinstance(c, VAEAugmentCallback)]
    assert made.inject == ("train",)
    assert made.vae.latent == 4
    assert made._injection.distillation == Distillation(0.3, 4.0)
    assert made._injection.likelihood == "bernoulli"
    assert made.state_key == VAEAugmentCallback(name="digits").state_key
    assert made._training.training == GeneratorTraining(2, (1, 5), precision="bf16")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_lightning_cli_takes_a_kind_of_vae(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    callback = {
        "class_path": "lightning_prune.callbacks.vae_augment.VAEAugmentCallback",
        "init_args": {"vae": "conv", "classes": 10, "encoder": "net"},
    }
    cli = LightningCLI(
        Plain,
        args={"trainer": {"callbacks": [callback], "logger": False, "accelerator": "cpu"}},
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
    )
    (made,) = [c for c in cli.trainer.callbacks if isinstance(c, VAEAugmentCallback)]
    assert made._training.choice.vae == "conv"
    assert made._training.choice.classes == 10
