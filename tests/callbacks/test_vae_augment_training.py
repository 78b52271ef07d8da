"""How the VAE callback's generator is chosen, trained, reused and stopped, in real Trainers."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.augment import ConvVAE, DenseVAE
from lightning_prune.augment.fitting import GeneratorFitter
from lightning_prune.callbacks.generator_training import GeneratorTraining
from lightning_prune.callbacks.vae_augment import VAEAugmentCallback

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32)[:200]
Y = torch.tensor(DIGITS.target)[:200]


class Digits(L.LightningModule):
    """A classifier in two named parts, with dropout: its steps need random numbers."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(16, 10))

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Event(L.Callback):
    """A pruning event before the first step; scores at each validation's end."""

    def __init__(self):
        self.batches = []

    def _sources(self, trainer):
        return [c for c in trainer.callbacks if isinstance(c, VAEAugmentCallback)]

    def on_train_start(self, trainer, pl_module):
        for callback in self._sources(trainer):
            callback.before_pruning(trainer, pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            for source in self._sources(trainer):
                self.batches = list(source.scoring_batches(trainer, pl_module, 40))


def loader(x=X, y=Y, shuffle=False, batch_size=32, **arguments):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle, **arguments)


def fit(callbacks, model=None, train=None, val=None, ckpt_path=None, **arguments):
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        enable_model_summary=False,
        **({"enable_progress_bar": False} | defaults | arguments),
    )
    model = Digits() if model is None else model
    train = loader() if train is None else train
    val = loader(X[:64], Y[:64]) if val is None else val
    trainer.fit(model, train, *(() if val is False else (val,)), ckpt_path=ckpt_path)
    return trainer, model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def steps(callback):
    return callback._training.built.batches


# Which VAE


@pytest.mark.parametrize(("kind", "built"), [(None, DenseVAE), ("dense", DenseVAE)])
def test_the_kind_of_vae_is_a_word(kind, built):
    callback = VAEAugmentCallback(kind, inject=())
    fit([callback], max_epochs=1)
    assert type(callback.vae) is built


def test_a_conditional_convolutional_vae_learns_which_class_is_which():
    callback = VAEAugmentCallback("conv", classes=2, inject=("saliency",), warmup=1)
    y = torch.tensor(DIGITS.target)
    x, y = torch.tensor(DIGITS.images, dtype=torch.float32)[y < 2], y[y < 2]
    pruner = Event()
    fit([callback, pruner], train=loader(x, y), val=loader(x, y), max_epochs=30)
    assert isinstance(callback.vae, ConvVAE)
    made, labels = callback._training.built.draw_labelled(200, "inject")
    assert made.shape == (200, 8, 8)
    means = torch.stack([x[y == k].mean(0).flatten() for k in (0, 1)])
    nearest = torch.cdist(made.flatten(1), means).argmin(1)
    assert (nearest == labels).float().mean() > 0.9
    scored = torch.cat([b[0] for b in pruner.batches]).flatten(1)
    classes = torch.cat([b[1] for b in pruner.batches])
    assert classes.dtype == Y.dtype
    # The labels in the batch are the condition's, not the model's prediction.
    assert (torch.cdist(scored, means).argmin(1) == classes).float().mean() > 0.8


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(Y.float(), "float32"), (Y + 5, "from 5 to 14"), (torch.eye(10)[Y], "float32")],
)
def test_labels_that_are_no_classes_are_named_before_the_first_step(labels, problem):
    class Any(Digits):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        validation_step = None

    model = Any()
    callback = VAEAugmentCallback(classes=10, inject=())
    with pytest.raises(MisconfigurationException, match=f"(?s)labels do not fit.*{problem}"):
        fit([callback], model=model, train=loader(y=labels), val=False)
    assert model.trainer.global_step == 0


def test_a_conditional_vae_of_the_users_gets_the_labels():
    vae = DenseVAE((8, 8), classes=10)
    callback = VAEAugmentCallback(vae, inject=())
    fit([callback], max_epochs=1)
    assert callback._training.built.trained == 7
    with pytest.raises(ValueError, match=r"`classes`.*10, but got 9"):
        VAEAugmentCallback(vae, classes=9)


def test_what_no_generator_can_be_built_from_is_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)`classes`.*`vae`.*'cnn'"):
        VAEAugmentCallback("cnn", classes=0)
    with pytest.raises(ValueError, match=r"`encoder`"):
        VAEAugmentCallback(DenseVAE((8, 8)), encoder="features")


# When it is trained


def test_settings_out_of_range_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)every_n.*epochs.*max_steps.*offload.*fit_b.*precis"):
        GeneratorTraining(
            every_n_steps=0,
            epochs=(3, 3),
            max_steps=0,
            offload=2,
            fit_before=-1,
            precision="fp8",
        )
    assert GeneratorTraining(epochs=[0, 2]).epochs == (0, 2)
    with pytest.raises(ValueError, match=r"`training`.*max_steps"):
        VAEAugmentCallback(training=GeneratorTraining(max_steps=3), warmup=4)
    VAEAugmentCallback(training=GeneratorTraining(max_steps=3), warmup=4, inject=())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 28),
        ({"every_n_steps": 3}, 10),  # batches 0, 3, .., 27
        ({"epochs": (1, 3)}, 14),
        ({"max_steps": 9}, 9),
        ({"epochs": (2, 9), "every_n_steps": 2}, 7),
        ({"fit_before": 2}, 42),
        ({"fit_before": 2, "max_steps": 10}, 10),
        ({"fit_before": 1, "epochs": (3, 9)}, 14),
        ({"offload": True}, 28),
        ({"precision": "bf16"}, 28),
    ],
    ids=str,
)
def test_steps_are_taken_when_they_are_due(settings, expected):
    callback = VAEAugmentCallback(inject=(), training=GeneratorTraining(**settings))
    fit([callback], max_epochs=4)
    assert steps(callback) == expected
    assert callback.generate(2).isfinite().all()


OPTIONS = {
    "every": {"training": GeneratorTraining(every_n_steps=3)},
    "epochs": {"training": GeneratorTraining(epochs=(1, 4))},
    "budget": {"training": GeneratorTraining(max_steps=25)},
    "offload": {"training": GeneratorTraining(offload=True)},
    "before": {"training": GeneratorTraining(fit_before=1)},
    "half": {"training": GeneratorTraining(precision="bf16")},
    "classes": {"classes": 10},
    "conv": {"vae": "conv"},
    "encoder": {"encoder": "features"},
    "encode": {
        "encode": lambda x: x[:, ::2, ::2],
        "forward": lambda module, batch: (
            module(batch[0].repeat_interleave(2, 1).repeat_interleave(2, 2))
            if batch[0].shape[1] == 4
            else module(batch[0])
        ),
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, option):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        callback = VAEAugmentCallback(warmup=5, **OPTIONS[option])
        model = Digits(dropout=0.0)  # Lightning does not restore the global random state
        callbacks = [callback, Event()]
        trainer, _ = fit(callbacks, model=model, max_epochs=epochs, ckpt_path=ckpt_path)
        return trainer, model, callback

    _, whole, first = run(4)
    trainer, _, _ = run(2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    _, resumed, second = run(4, path)
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(first.vae.state_dict(), second.vae.state_dict())
    assert torch.equal(first.generate(3), second.generate(3))


@pytest.mark.parametrize("option", [*OPTIONS, "shuffled workers"])
def test_the_users_training_is_untouched_bit_for_bit(option):
    shuffled = {"training": GeneratorTraining(fit_before=2)}
    arguments = OPTIONS.get(option, shuffled) | {"inject": ()}
    results = []
    for callbacks in ([], [VAEAugmentCallback(**arguments)]):
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(5) if option == "before" else None
        workers = 1 if option == "shuffled workers" else 0
        train = loader(
            shuffle=True, generator=own, num_workers=workers, persistent_workers=workers > 0
        )
        _, model = fit(callbacks, train=train)
        results.append((model.state_dict(), torch.get_rng_state()))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_progress_bar_runs_along_where_there_is_one(capsys):
    training = GeneratorTraining(fit_before=2)
    fit([VAEAugmentCallback(training=training)], max_epochs=1)
    assert "vae before" not in "".join(capsys.readouterr())
    fit(
        [VAEAugmentCallback(training=training), TQDMProgressBar()],
        max_epochs=1,
        enable_progress_bar=True,
    )
    assert "14/14" in capsys.readouterr().err


def test_batches_read_before_go_through_the_modules_transfer():
    class Scaling(Digits):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0].float() / 160, batch[1]

    training = GeneratorTraining(fit_before=1)
    callback = VAEAugmentCallback(inject=(), training=training)
    fit([callback], Scaling(), train=loader(X.to(torch.uint8)), max_epochs=1)
    assert callback.vae.input_range.high.item() == pytest.approx(0.1)


def test_an_endless_loader_cannot_be_read_before():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield X[0], Y[0]

    def run(**arguments):
        callback = VAEAugmentCallback(inject=(), training=GeneratorTraining(fit_before=1))
        fit([callback], train=DataLoader(Endless(), 8), max_epochs=1, max_steps=6, **arguments)
        return callback

    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        run()
    assert steps(run(limit_train_batches=4)) == 8


def test_offloading_keeps_the_generator_on_the_cpu_between_uses(monkeypatch):
    moves = []
    monkeypatch.setattr(
        GeneratorFitter, "to", lambda self, device: moves.append((device, self.batches))
    )
    callback = VAEAugmentCallback(inject=(), training=GeneratorTraining(offload=True))
    fit([callback], max_epochs=1, limit_train_batches=2)
    # To the inputs' device before a step, and back after it.
    assert [count for _, count in moves] == [0, 1, 1, 2]
    moves.clear()
    callback._training.device = torch.device("meta")
    callback.generate(2)
    assert [device.type for device, _ in moves] == ["meta", "cpu"]


def test_a_move_takes_the_optimizers_state_along(monkeypatch):
    fitter = GeneratorFitter(
        DenseVAE((8, 8)), X.shape[1:], X.dtype, X.device, learning_rate=1e-3, seed=0
    )
    fitter.step(X[:8])
    before = {id(v) for s in fitter.optimizer.state.values() for v in s.values()}
    monkeypatch.setattr(fitter.vae, "to", lambda device: fitter.vae.double())  # a move of a kind
    fitter.to(torch.device("meta"))
    after = [v for s in fitter.optimizer.state.values() for k, v in s.items() if k != "step"]
    assert {state.dtype for state in after} == {torch.float64}
    assert not before & {id(state) for state in after}


def test_half_precision_is_another_result_and_float32_is_the_default():
    weights = []
    for settings, precision in (({}, "32-true"), ({}, "bf16-mixed"), ({"precision": "bf16"}, None)):
        callback = VAEAugmentCallback(inject=(), training=GeneratorTraining(**settings))
        fit([callback], precision=precision, max_epochs=1)
        weights.append(callback.vae.state_dict())
        assert all(v.dtype != torch.bfloat16 for v in weights[-1].values())
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


# Reuse


def test_a_generator_is_reused_from_either_file(tmp_path):
    callback = VAEAugmentCallback("conv", inject=())
    trainer, _ = fit([callback])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    callback.save_generator(tmp_path / "vae.pt")
    for file in ("run.ckpt", "vae.pt"):
        again = VAEAugmentCallback(checkpoint=tmp_path / file)
        assert same(again.vae.state_dict(), callback.vae.state_dict())
        assert again.generate(2).shape == (2, 8, 8)
        assert again._training.ready
        trainer, _ = fit([again, Event()], max_epochs=1)
        assert trainer.callback_metrics["vae/distillation"].isfinite()
        assert steps(again) == 7


def test_a_resumed_runs_state_goes_before_the_file(tmp_path):
    old = VAEAugmentCallback(inject=(), seed=9)
    fit([old], max_epochs=1)
    old.save_generator(tmp_path / "old.pt")
    first = VAEAugmentCallback(inject=(), checkpoint=str(tmp_path / "old.pt"))
    trainer, _ = fit([first], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    second = VAEAugmentCallback(inject=(), checkpoint=str(tmp_path / "old.pt"), warmup=10**6)
    fit([second], max_epochs=1, ckpt_path=tmp_path / "run.ckpt")
    assert same(second.vae.state_dict(), first.vae.state_dict())
    assert not same(second.vae.state_dict(), old.vae.state_dict())
    assert second._training.ready


def test_files_that_do_not_fit_are_named(tmp_path):
    callback = VAEAugmentCallback(inject=(), name="mine")
    trainer, _ = fit([callback], max_epochs=1)
    path = tmp_path / "vae.pt"
    callback.save_generator(path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    (tmp_path / "text").write_text("x")
    for arguments, problem in (
        ({"vae": "conv"}, "vae='conv', but it has 'dense'"),
        ({"classes": 4}, "classes=4, but it has None"),
        ({"encoder": "features"}, "`encoder=`"),
        ({"vae": DenseVAE((8, 8), latent=3)}, "does not fit"),
        ({"checkpoint": tmp_path / "run.ckpt"}, "`name` tells which"),
        ({"checkpoint": tmp_path / "text"}, "weights_only"),
    ):
        with pytest.raises(ValueError, match=problem):
            VAEAugmentCallback(**({"checkpoint": path} | arguments))
    with pytest.raises(FileNotFoundError):
        VAEAugmentCallback(checkpoint=tmp_path / "none")
    with pytest.raises(MisconfigurationException, match="made for"):
        fit([VAEAugmentCallback(checkpoint=path)], train=loader(X.flatten(1)))
    with pytest.raises(RuntimeError, match="fit"):
        VAEAugmentCallback().save_generator(path)


# Inputs that are no float tensors


class Tokens(L.LightningModule):
    """A classifier of 8 token ids that also takes their embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 4)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head((x if x.is_floating_point() else self.embedding(x)).flatten(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


IDS = X[:, 3].long()


def test_token_ids_are_learnt_in_the_space_of_an_encoding():
    model = Tokens()
    callback = VAEAugmentCallback(
        encode=model.embedding,
        forward=lambda module, batch: module(batch[0]),
        warmup=1,
    )
    trainer, _ = fit([callback, Event()], model=model, train=loader(IDS), val=False)
    made = callback.generate(3)
    assert made.shape == (3, 8, 4)
    assert made.dtype == torch.float32
    assert trainer.callback_metrics["vae/distillation"].isfinite()


def test_integer_inputs_are_told_the_two_ways_out():
    with pytest.raises(MisconfigurationException, match=r"(?s)two ways out.*`encode=`.*`vae=`"):
        fit([VAEAugmentCallback(inject=())], model=Tokens(), train=loader(IDS), val=False)


def test_an_encoding_needs_a_way_into_the_model():
    with pytest.raises(ValueError, match=r"`encode`.*`forward="):
        VAEAugmentCallback(encode=lambda x: x.float())
    VAEAugmentCallback(encode=lambda x: x.float(), inject=())


@pytest.mark.parametrize("encode", [lambda x: x, lambda x: x.float().sum(1), lambda x: [1.0]])
def test_an_encoding_to_something_else_is_named(encode):
    callback = VAEAugmentCallback(inject=(), encode=encode)
    with pytest.raises(MisconfigurationException, match=r"`encode`"):
        fit([callback], model=Tokens(), train=loader(IDS), val=False)


# Collapse, and little data


def test_a_collapse_is_said_once():
    vae = DenseVAE((8, 8), kl_weight=1e4, warmup=0)
    callback = VAEAugmentCallback(vae, inject=(), learning_rate=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([callback], train=loader(batch_size=4), max_epochs=7)
    (said,) = [str(w.message) for w in caught if "collapsed" in str(w.message)]
    assert all(way in said for way in ("free_bits", "warm-up", "kl_weight", "latent="))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_a_handful_of_samples_is_enough_to_run(n, kind):
    callback = VAEAugmentCallback(kind, warmup=1, share=5.0)  # draws larger than any batch
    event = Event()
    few = loader(X[:n], Y[:n])
    trainer, _ = fit([callback, event], train=few, val=few, max_epochs=3)
    assert trainer.callback_metrics["vae/distillation"].isfinite()
    assert sum(len(batch[0]) for batch in event.batches) == 200
    assert max(len(batch[0]) for batch in event.batches) <= n


@pytest.mark.filterwarnings("ignore:Total length of:UserWarning")
def test_an_empty_loader_leaves_nothing_to_build_from():
    training = GeneratorTraining(fit_before=1)
    callback = VAEAugmentCallback(training=training)
    empty = DataLoader(TensorDataset(X[:0], Y[:0]), 4)
    fit([callback], train=empty)
    with pytest.raises(RuntimeError, match="first training batch"):
        callback.generate(1)


# A generator of another kind


class Gan(nn.Module):
    """A small GAN behind ``loss`` and ``sample``: the gradient is turned round for one side."""

    def __init__(self):
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.judge = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def loss(self, x):
        made = self.sample(len(x)).flatten(1)
        frozen = {k: v.detach() for k, v in self.judge.named_parameters()}
        fooled = torch.func.functional_call(self.judge, frozen, (made,))
        real, fake = self.judge(x.flatten(1)), self.judge(made.detach())
        return F.softplus(-real).mean() + F.softplus(fake).mean() + F.softplus(-fooled).mean()

    def sample(self, n):
        made = self.maker(torch.randn(n, 8))
        return 16 * made.sigmoid().view(n, 8, 8)


def test_a_gan_takes_the_vaes_place():
    torch.manual_seed(0)
    gan, event = Gan(), Event()
    callback = VAEAugmentCallback(gan, inject=("saliency", "train"), learning_rate=2e-3)
    trainer, _ = fit([callback, event], max_epochs=40)
    means = torch.stack([callback.generate(300).mean(0).flatten(), X.mean(0).flatten()])
    assert torch.corrcoef(means)[0, 1] > 0.6
    assert trainer.callback_metrics["vae/distillation"].isfinite()
    assert sum(len(batch[0]) for batch in event.batches) == 20
