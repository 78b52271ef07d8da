"""The factor in a fit: what it is measured on, when, by which weights, and that it survives."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.augment.adaptive import Losses, MixRule, gap_share
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.callbacks.adaptive_mix import AdaptiveMix
from lightning_prune.saliency import default_forward, read_inputs, read_labels

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32).flatten(1) / 16
Y = torch.tensor(DIGITS.target)


class Model(L.LightningModule):
    def __init__(self, width=32, lr=1e-2, dropout=0.2):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10)
        )
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Spy(MixRule):
    """Notes what the rule is asked."""

    asked: list = []  # noqa: RUF012

    def __call__(self, mix, share, error):
        Spy.asked.append((share, error))
        return super().__call__(mix, share, error)


def read(batch):
    return BatchForm(batch, read_inputs(batch), read_labels(batch))


class Mixing(L.Callback):
    """What the VAE callback does around its factor."""

    def __init__(self, samples=64, likelihood="categorical", rule=None, start=0.0):
        Spy.asked = []
        self.values, self.lengths = [], []
        self.mix = AdaptiveMix(
            Injection(default_forward, likelihood),
            read,
            rule=Spy() if rule is None else rule,
            samples=samples,
            start=start,
        )

    def on_train_epoch_start(self, trainer, pl_module):
        self.mix.start_epoch()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mix.keep(read(batch))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.mix.observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer, pl_module):
        self.lengths.append((self.mix._training.count, self.mix._held_out.count))
        self.mix.finish(trainer, pl_module)
        self.values.append(self.mix.value)

    def on_train_epoch_end(self, trainer, pl_module):
        self.mix.end_epoch(trainer, pl_module)

    def teardown(self, trainer, pl_module, stage):
        self.mix.release()

    def state_dict(self):
        return self.mix.state_dict()

    def load_state_dict(self, state_dict):
        self.mix.load_state_dict(state_dict)


def loader(rows, batch=32, **arguments):
    return DataLoader(TensorDataset(X[rows], Y[rows]), batch, **arguments)


def fit(model, callback, train, *validation, ckpt_path=None, **arguments):
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False}
    trainer = L.Trainer(
        **defaults | {"enable_checkpointing": False} | arguments,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train, list(validation) or None, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_it_reads_the_gap_between_training_and_validation_losses():
    """Against a twin: both sets whole, eval mode, the weights at the validation."""
    torch.manual_seed(0)
    model, callback = Model(), Mixing(samples=512)
    fit(model, callback, loader(slice(0, 96)), loader(slice(1000, 1090)))
    assert len(Spy.asked) == 1  # not in the sanity check
    model.eval()
    with torch.no_grad():
        t = F.cross_entropy(model(X[:96]), Y[:96], reduction="none")
        v = F.cross_entropy(model(X[1000:1090]), Y[1000:1090], reduction="none")
    error = (t.var() / 96 + v.var() / 90).sqrt() / v.mean()
    expected = ((1 - t.mean() / v.mean()).item(), error.item())
    assert Spy.asked[0] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    torch.manual_seed(0)
    plain = Model()
    fit(plain, L.Callback(), loader(slice(0, 96)), loader(slice(1000, 1090)))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)  # the user's training is none the wiser


def test_few_samples_keep_it_up_and_many_bring_it_down():
    torch.manual_seed(0)
    few = loader(slice(0, 40)), loader(slice(1000, 1400))
    model, callback = Model(), Mixing(samples=256)
    fit(model, L.Callback(), *few, max_epochs=40)
    fit(model, callback, *few, max_epochs=3)
    assert callback.values[1:] == [1.0, 1.0, 1.0]
    callback = Mixing(samples=256)
    small = Model(width=2)  # too little room to learn anything by heart
    fit(small, callback, loader(slice(0, 1300)), loader(slice(1300, 1700)), max_epochs=2)
    assert callback.values[1:] == [0.0, 0.0]


def test_it_waits_for_the_first_comparison_but_no_longer_than_an_epoch():
    class Used(Mixing):
        """Notes the factor that each step is given."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.values.append(self.mix.value)

        def on_validation_end(self, trainer, pl_module):
            self.mix.finish(trainer, pl_module)

    data = loader(slice(0, 64)), loader(slice(1000, 1064))
    callback = Used(rule=Spy(none=-9.0, full=-8.0))
    fit(Model(), callback, *data, max_epochs=2)
    assert callback.values == [0.0, 0.0, 1.0, 1.0]
    callback = Used(rule=Spy(none=-9.0, full=-8.0))
    fit(Model(), callback, *data, max_epochs=3, check_val_every_n_epoch=3, num_sanity_val_steps=0)
    assert callback.values == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    callback = Used(rule=Spy(none=-9.0, full=-8.0), start=1.0)
    fit(Model(), callback, *data)
    assert callback.values == [1.0, 1.0]


def test_a_bounded_number_is_spread_over_the_first_loader():
    callback, seen = Mixing(samples=64), []
    original = callback.mix._losses

    def noted(trainer, pl_module, form):
        seen.append(form.inputs)
        return original(trainer, pl_module, form)

    callback.mix._losses = noted
    validation = loader(slice(1000, 1128), 16), loader(slice(1300, 1364))
    fit(Model(), callback, loader(slice(0, 320)), *validation)
    assert callback.lengths[-1] == (64, 64)
    starts = [int((x[0] == X).all(1).nonzero()[0, 0]) for x in seen]
    assert starts == [0, 32, 1000, 1032, 1064, 1096]


def test_without_validation_or_labels_it_stays():
    callback = Mixing()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Model(), callback, loader(slice(0, 96)))
    assert callback.mix.value == 1.0  # for want of a better one

    class Unlabelled(Model):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    callback = Mixing()
    data = DataLoader(TensorDataset(X[:96]), 32)
    fit(Unlabelled(), callback, data, data, max_epochs=2)
    assert callback.values == [0.0, 0.0, 1.0]
    assert not Spy.asked


def test_labels_that_do_not_go_with_the_output_are_warned_of_once():
    callback = Mixing(likelihood="bernoulli")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Model(), callback, loader(slice(0, 96)), loader(slice(0, 96)), max_epochs=3)
    found = [str(w.message) for w in caught if "does not adapt" in str(w.message)]
    assert len(found) == 1
    assert "'bernoulli'" in found[0]
    assert callback.values == [0.0, 0.0, 1.0, 1.0]  # it waited for an epoch


def test_validating_by_itself_changes_nothing():
    torch.manual_seed(0)
    callback = Mixing()
    trainer = fit(Model(width=2), callback, loader(slice(0, 320)), loader(slice(1000, 1200)))
    value, asked = callback.mix.value, len(Spy.asked)
    trainer.validate(trainer.model, loader(slice(0, 96)), verbose=False)
    assert (callback.mix.value, len(Spy.asked)) == (value, asked)
    assert callback.mix._kept == []


def test_it_is_logged_once_an_epoch(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = Mixing(samples=256, rule=Spy(none=-0.5, full=1.0))
    data = loader(slice(0, 320)), loader(slice(1000, 1300))
    fit(Model(), callback, *data, max_epochs=3, logger=logger, val_check_interval=0.5)
    rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    logged = [float(row["vae/mix"]) for row in rows if row["vae/mix"]]
    assert logged == pytest.approx(callback.values[2::2])  # behind the sanity check's
    assert 0 < logged[-1] < 1


def test_a_resumed_run_has_the_factors_of_an_uninterrupted_one(tmp_path):
    def run(**arguments):
        torch.manual_seed(0)
        callback = Mixing(samples=256, rule=Spy(none=-0.5, full=1.0))
        data = loader(slice(0, 320)), loader(slice(1000, 1300))
        return callback, fit(Model(dropout=0.0), callback, *data, **arguments)

    whole, _ = run(max_epochs=4)
    first, trainer = run(max_epochs=2)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]
    assert next(iter(state.values())) == {"mix": first.values[-1], "waiting": False}
    second, _ = run(max_epochs=4, ckpt_path=tmp_path / "c.ckpt")
    assert whole.values[1:] == first.values[1:] + second.values[-2:]
    assert len(set(whole.values)) > 2


def test_processes_come_to_one_factor():
    """Two of them, each with half of the samples, against one with all."""

    class FakeTrainer:
        state = TrainerState(fn=TrainerFn.FITTING)
        sanity_checking, world_size = False, 2

        @property
        def strategy(self):
            return self

        def reduce(self, tensor, reduce_op):
            assert reduce_op == "sum"
            return tensor + self.other

    trainer, model = FakeTrainer(), Model()
    training, held_out = torch.rand(40), 4 * torch.rand(60)
    halves = [
        [Losses.of(part) for part in parts]
        for parts in zip(training.split(20), held_out.split(30), strict=True)
    ]
    expected = gap_share(Losses.of(training), Losses.of(held_out))
    for own, other in (halves, halves[::-1]):
        rows = [[k.count, k.total, k.squares] for k in other]
        trainer.other = torch.tensor(rows, dtype=torch.float64)
        mix = AdaptiveMix(Injection(default_forward), read, rule=Spy(none=-1.0, full=1.0))
        mix._training, mix._held_out = own
        Spy.asked = []
        mix.finish(trainer, model)
        assert Spy.asked == [pytest.approx(expected)]
        assert mix.value == pytest.approx(Spy(none=-1.0, full=1.0)(1.0, *expected))
