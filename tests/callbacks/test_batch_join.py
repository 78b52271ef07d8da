"""Generated samples in the training batch: who sees them, who does not, and that it is undone."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SaliencyPruningCallback, VAEAugmentCallback
from lightning_prune.augment.fitting import GeneratorFitter
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.augment.vae import DenseVAE
from lightning_prune.callbacks.batch_join import HOOK, BatchJoin, whole
from lightning_prune.callbacks.reading import on_device
from lightning_prune.passes.teacher import Teacher
from lightning_prune.saliency import default_forward, read_inputs, read_labels

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32)[:96].flatten(1) / 16
Y = torch.tensor(DIGITS.target)[:96]
B, N = 24, 6


class Dicts(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


class Model(L.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        self.lr, self.seen, self.validated, self.gradients = lr, [], [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        y = read_labels(batch)
        logits = self(read_inputs(batch))
        return logits.square().mean() if y is None else F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        self.validated.append(len(batch[0]))

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Joining(L.Callback):
    """What the VAE callback does, with a generator that trains on the real part of each batch."""

    def __init__(self, n=N, classes=None):
        self.n, self.join, self.real, self.noted = n, BatchJoin(), [], []
        vae = DenseVAE((64,), classes=classes)
        self.fitter = GeneratorFitter(
            vae, torch.Size([64]), X.dtype, X.device, learning_rate=1e-3, seed=0
        )
        self.injection = Injection(default_forward)

    def setup(self, trainer, pl_module, stage):
        self.join.check(pl_module, "vae")

    def on_fit_start(self, trainer, pl_module):
        self.teacher = Teacher.of(pl_module)
        self.join.attach(trainer, lambda batch: self.add(pl_module, batch))

    def add(self, pl_module, batch):
        if not self.fitter.trained:
            return batch
        x, y = read_inputs(batch), read_labels(batch)
        made = self.fitter.draw_labelled(self.n, "inject")
        form = BatchForm(batch, x, y)
        return self.injection.joined(pl_module, form, made.inputs, made.labels, self.teacher)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.noted.append(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        real = self.join.real_part(batch)
        self.real.append(real)
        self.fitter.step(read_inputs(real), read_labels(real))
        self.join.forget()

    def on_exception(self, trainer, pl_module, exception):
        self.join.detach()

    def teardown(self, trainer, pl_module, stage):
        self.join.detach()


def fit(model, *callbacks, data=None, **arguments):
    trainer = L.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu"} | arguments,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if not isinstance(data, L.LightningDataModule):
        data = DataLoader(TensorDataset(X, Y) if data is None else data, B)
        trainer.fit(model, data, DataLoader(TensorDataset(X, Y), 32))
    else:
        trainer.fit(model, datamodule=data)
    return trainer


@pytest.mark.parametrize("data", [TensorDataset(X, Y), TensorDataset(X), Dicts(X, Y)])
def test_the_training_step_sees_one_larger_batch_and_nobody_else_does(data):
    torch.manual_seed(0)
    model, callback = Model(), Joining()
    fit(model, callback, data=data)
    sizes = [len(read_inputs(batch)) for batch in model.seen]
    assert sizes == [B, B + N, B + N, B + N]
    assert {len(read_inputs(batch)) for batch in callback.real} == {B}
    assert set(model.validated) == {32}  # sanity check and validation
    for index, (seen, noted) in enumerate(zip(model.seen, callback.noted, strict=True)):
        assert seen is noted
        assert torch.equal(read_inputs(seen)[:B], X[index * B :][:B])
        assert torch.equal(read_inputs(callback.real[index]), X[index * B :][:B])


def test_labels_are_the_teachers_or_the_classes():
    torch.manual_seed(0)
    model, callback = Model(), Joining()
    fit(model, callback)
    twin = Model()
    twin.load_state_dict(callback.teacher.weights)
    for x, y in model.seen[1:]:
        assert torch.equal(y[B:], twin(x[B:]).argmax(1))
    model, callback = Model(), Joining(classes=10)
    fit(model, callback)
    made = callback.fitter.draw_labelled(N, "inject", index=1)
    # The generator has learnt since, but its classes are a function of the draw alone.
    assert torch.equal(model.seen[1][1][B:], made.labels)


def test_the_gradients_are_those_of_the_larger_batch():
    """Weights do not move, so each step's gradient can be had from the batch it saw."""
    torch.manual_seed(0)
    model = Model(lr=0.0)
    fit(model, Joining(), accumulate_grad_batches=2)
    parameters = list(model.parameters())
    for step, gradients in enumerate(model.gradients):
        loss = sum(F.cross_entropy(model(x), y) / 2 for x, y in model.seen[2 * step : 2 * step + 2])
        for got, wanted in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert len(model.gradients) == 2


def test_half_precision_needs_nothing_of_its_own():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    model = Model()
    fit(model, Joining(), plugins=[plugin])
    assert [len(x) for x, _ in model.seen] == [B, B + N, B + N, B + N]
    assert all(p.isfinite().all() for p in model.parameters())


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(X, Y), B)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]


def test_samples_join_behind_the_users_own_transforms():
    model, callback = Model(), Joining()
    fit(model, callback, data=Data())
    assert torch.equal(model.seen[1][0][:B], X[B : 2 * B] + 1)
    assert torch.equal(callback.real[1][0], X[B : 2 * B] + 1)


def test_passes_of_our_own_are_not_joined():
    class Pass(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert trainer.training
            assert len(on_device(trainer, (X[:3], Y[:3]))[0]) == 3

    model = Model()
    fit(model, Joining(), Pass())
    assert len(model.seen[-1][0]) == B + N


def test_the_strategy_gets_its_method_back():
    assert HOOK not in vars(fit(Model(), Joining()).strategy)

    class Failing(Model):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    for model, callback in ((Failing(), Joining()), (Model(), Joining(n=-1))):
        caught = []

        class Keep(L.Callback):
            def on_exception(self, trainer, pl_module, exception, caught=caught):
                caught.append(trainer)

        with pytest.raises((ZeroDivisionError, RuntimeError)):
            fit(model, callback, Keep())
        assert HOOK not in vars(caught[0].strategy)
        assert callback.join._real is None


class Strategy:
    def batch_to_device(self, batch, device=None, dataloader_idx=0):
        return [*batch, "moved"]


class FakeTrainer:
    """As much of a Trainer as the training loop's transfer of a batch shows."""

    training = True

    def __init__(self):
        self.strategy, self.lightning_module = Strategy(), self
        self._current_fx_name = HOOK


@pytest.mark.parametrize("first", [0, 1])
def test_two_that_join_can_leave_in_any_order(first):
    trainer, joins = FakeTrainer(), [BatchJoin(), BatchJoin()]
    for number, join in enumerate(joins):
        join.attach(trainer, lambda batch, number=number: [*batch, number])
    assert trainer.strategy.batch_to_device(["x"]) == ["x", "moved", 0, 1]
    joins[first].detach()
    assert trainer.strategy.batch_to_device(["x"]) == ["x", "moved", 1 - first]
    joins[1 - first].detach()
    joins[1 - first].detach()
    assert trainer.strategy.batch_to_device(["x"]) == ["x", "moved"]


def test_a_batch_that_nothing_joins_is_handed_on_as_it_is():
    trainer, join, batch = FakeTrainer(), BatchJoin(), ["x"]
    trainer.strategy.batch_to_device = lambda batch: batch
    join.attach(trainer, lambda batch: batch)
    assert trainer.strategy.batch_to_device(batch) is batch
    assert join.real_part(batch) is batch
    join.detach()
    assert HOOK in vars(trainer.strategy)  # as it was found


def test_copies_leave_the_fit_behind():
    trainer, join = FakeTrainer(), BatchJoin()
    join.attach(trainer, lambda batch: [*batch, 1])
    for other in (copy.deepcopy(join), pickle.loads(pickle.dumps(join))):
        other.detach()
    assert trainer.strategy.batch_to_device([]) == ["moved", 1]


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_a_step_that_fetches_its_batches_is_refused():
    class Fetching(Model):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(MisconfigurationException, match="dataloader_iter"):
        fit(Fetching(), Joining())


class Rows(torch.utils.data.Dataset):
    """Samples of any form, made of a digit and its number."""

    def __init__(self, form, n=96):
        self.form, self.n = form, n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.form(X[index], Y[index])


def joining_fit(model, form, size=B, n=96, **arguments):
    """Train with the callback itself; samples join from the second epoch on."""
    vae = VAEAugmentCallback(
        inject=("train",), train_by="batch", adapt=False, warmup=1, **arguments
    )
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SaliencyPruningCallback({0: 0.5}, criterion="magnitude"), vae],
    )  # fmt: skip
    trainer.fit(model, DataLoader(Rows(form, n), size), DataLoader(TensorDataset(X, Y), 32))


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda x, y: (x, y, y % 2), r"inputs and labels .* torch.int64 tensor of shape \(24,\)"),
        (lambda x, y: (x, y, torch.rand(2, 2)), r"torch.float32 tensor of shape \(24, 2, 2\)"),
        (lambda x, y: (x, {"cls": y}), r"beside the inputs .* torch.int64 tensor of shape"),
        (lambda x, y: (x, str(int(y))), "a tuple of 24 entries|a list of 24 entries"),
    ],
)
def test_real_labels_do_not_end_up_beside_generated_samples(form, found):
    class Taking(Model):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return self(batch[0]).square().mean()

    model = Taking()
    with pytest.raises(MisconfigurationException, match=found) as caught:
        joining_fit(model, form)
    assert "train_by='distill'" in str(caught.value)
    assert not model.seen  # before the first step, though nothing would join yet


def test_names_of_samples_follow_them():
    model = Model()
    joining_fit(model, lambda x, y: (x, y, f"digit {y}"))
    sizes = [tuple(map(len, batch)) for batch in model.seen]
    assert sizes == [(B,) * 3] * 4 + [(B + B // 2,) * 3] * 4
    *_, names = model.seen[-1]
    assert names[B:] == names[: B // 2]


def test_a_regression_read_as_classes_is_refused_before_the_first_step():
    class Regression(Model):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return F.mse_loss(self(batch[0]), batch[1])

    model = Regression()
    model.net[2] = nn.Linear(16, 1)

    def form(x, y):
        return x, y[None].float()

    with pytest.raises(ValueError, match="for regression 'gaussian'"):
        joining_fit(model, form)
    assert not model.seen
    joining_fit(model, form, likelihood="gaussian")
    assert len(model.seen[-1][1].unique()) > 10


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_batches_get_their_share_on_average(size):
    model = Model()
    joining_fit(model, lambda x, y: (x, y), size=size, n=60)
    joined = [len(x) - size for x, _ in model.seen[60 // size :]]
    assert abs(sum(joined) - 30) <= 2
    assert set(joined) <= {size // 2, -(-size // 2)}


@pytest.mark.parametrize("sizes", [(1, 2), (7, 7, 7, 2), (16,)])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.83])
def test_the_share_is_right_whatever_the_batches_sizes(sizes, share):
    batches = [sizes[k % len(sizes)] for k in range(4000)]
    made = sum(whole(share * size, k) for k, size in enumerate(batches))
    assert abs(made - share * sum(batches)) < 20
