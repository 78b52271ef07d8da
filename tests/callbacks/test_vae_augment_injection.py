"""How generated inputs enter scoring and training, in real Trainers on real digits."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SaliencyPruningCallback, VAEAugmentCallback
from lightning_prune.augment import DenseVAE, GeneratorError
from lightning_prune.exceptions import BatchFormatError
from tests.two_processes import join_group

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32).div(16)
Y = torch.tensor(DIGITS.target)


class Digits(L.LightningModule):
    """A classifier that notes what its training steps are given."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((self.current_epoch, x.detach().clone(), y.clone()))
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader(part: slice, size: int = 32) -> DataLoader:
    return DataLoader(TensorDataset(X[part], Y[part]), size)


def fit(callbacks, *, model=None, train=slice(0, 96), validation=slice(1000, 1200), **options):
    ckpt = options.pop("ckpt_path", None)
    options = {"max_epochs": 3, "logger": False, "enable_checkpointing": False} | options
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    model = Digits() if model is None else model
    trainer.fit(
        model, loader(train), None if validation is None else loader(validation), ckpt_path=ckpt
    )
    return trainer, model


def pruner(epoch: int = 0) -> SaliencyPruningCallback:
    return SaliencyPruningCallback({epoch: 0.5})


def test_samples_stand_behind_the_batch_once_there_is_a_teacher() -> None:
    callback = VAEAugmentCallback(inject=("train",), train_by="batch", adapt=False, warmup=1)
    before = Digits()
    _, model = fit([pruner(), callback], model=before)
    real = X[:96].split(32)
    for number, (epoch, x, y) in enumerate(model.seen):
        index = number % 3
        assert torch.equal(x[:32], real[index])
        assert torch.equal(y[:32], Y[:96].split(32)[index])
        assert len(x) == len(y) == (32 if epoch == 0 else 48)
    last = model.seen[-1]
    assert not any(torch.equal(last[1][32 + i], other) for i in range(16) for other in X[:96])


def test_joined_samples_carry_the_dense_models_labels() -> None:
    class Spying(Digits):
        """Keeps the weights that it has when training begins."""

        def on_train_start(self):
            self.first = copy.deepcopy(self.net)

    model = Spying()
    callback = VAEAugmentCallback(
        inject=("train",), train_by="batch", adapt=False, warmup=1, teacher=model
    )
    fit([callback], model=model, max_epochs=2)
    joined = [(x[32:], y[32:]) for _, x, y in model.seen if len(x) > 32]
    assert len(joined) == 5  # all but the first step, before which there is no VAE
    for x, y in joined:
        assert torch.equal(model.first(x).argmax(1), y)
    assert not torch.equal(model.first[1].weight, model.net[1].weight)


def test_a_conditional_vae_labels_what_it_makes_in_batch_and_scoring() -> None:
    made = []

    class Noting(DenseVAE):
        """Keeps its samples beside the classes that the decoder was asked for."""

        def __init__(self) -> None:
            super().__init__((8, 8), classes=10)
            self.decoder.register_forward_pre_hook(self._note)

        def _note(self, decoder, args):
            self.asked = args[0][:, -10:].argmax(1)

        def sample_labelled(self, n, labels=None):
            samples, labels = super().sample_labelled(n, labels)
            made.append((samples, self.asked))
            return samples, labels

    callback = VAEAugmentCallback(Noting(), train_by="batch", adapt=False, warmup=1, share=1.0)
    scoring = []

    class Scoring(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                scoring.extend(callback.scoring_batches(trainer, pl_module, 400))

    _, model = fit([pruner(), callback, Scoring()])
    training = [(x[32:], y[32:]) for _, x, y in model.seen if len(x) > 32]
    assert len(training) == 6
    assert len(scoring) == 3 * 13  # 400 samples in batches of 32
    for x, y in training + scoring:
        (asked,) = (asked for samples, asked in made if torch.equal(samples, x))
        assert torch.equal(y, asked)
        assert len(y.unique()) > 4  # an untrained network would predict one or two classes


def test_the_vae_learns_from_the_real_part_only() -> None:
    class Noting(DenseVAE):
        def terms(self, x, y=None):
            sizes.append(len(x))
            return super().terms(x, y)

    sizes: list[int] = []
    callback = VAEAugmentCallback(
        Noting((8, 8)), inject=("train",), train_by="batch", adapt=False, warmup=1
    )
    fit([pruner(), callback])
    assert set(sizes) == {32}


def test_a_fault_in_a_sample_comes_before_the_step_and_leaves_nothing_joined() -> None:
    class Breaking(DenseVAE):
        def sample(self, n, labels=None):
            samples = super().sample(n, labels)
            return samples if int(self.steps) < 5 else samples * float("nan")

    model = Digits()
    callback = VAEAugmentCallback(
        Breaking((8, 8)), inject=("train",), train_by="batch", adapt=False, warmup=1
    )
    trainer = None
    with pytest.raises(GeneratorError, match="NaN or infinite"):
        trainer, _ = fit([pruner(), callback], model=model)
    assert trainer is None
    assert len(model.seen) == 5
    follow_up, other = fit([], max_epochs=1)
    assert {len(x) for _, x, _ in other.seen} == {32}
    assert "batch_to_device" not in vars(follow_up.strategy)


@pytest.mark.parametrize("train_by", ["distill", "batch"])
def test_the_factor_is_logged_and_falls_where_there_is_no_gap(train_by: str) -> None:
    values = []

    class Reading(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            values.append(trainer.callback_metrics.get("vae/mix"))

    callback = VAEAugmentCallback(inject=("train",), train_by=train_by, warmup=1)
    small = Digits(width=2)  # learns nothing by heart
    fit([pruner(), callback, Reading()], model=small, train=slice(0, 640), max_epochs=4)
    assert values[0] is None  # no teacher, nothing to weigh
    assert float(values[-1]) == 0.0
    sizes = [len(x) for epoch, x, _ in small.seen if epoch == 3]
    assert set(sizes) == {32}


def test_the_factor_stays_where_few_digits_are_learnt_by_heart() -> None:
    model = Digits(width=64)
    callback = VAEAugmentCallback(inject=("train",), warmup=1)
    trainer, _ = fit([pruner(), callback], model=model, train=slice(0, 64), max_epochs=30)
    assert float(trainer.callback_metrics["vae/mix"]) > 0.5


def test_without_adapting_the_factor_is_one_and_not_logged() -> None:
    trainer, _ = fit([pruner(), VAEAugmentCallback(adapt=False, warmup=1)])
    assert "vae/mix" not in trainer.callback_metrics
    assert trainer.callback_metrics["vae/distillation"] >= 0


def test_a_given_teacher_is_followed_from_the_start_and_survives_training() -> None:
    model = Digits()
    fit([], model=model, max_epochs=5)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    callback = VAEAugmentCallback(inject=("train",), teacher=model, warmup=1, adapt=False)
    trainer, _ = fit([callback], model=model, max_epochs=1)
    assert "vae/distillation" in trainer.callback_metrics
    assert all(torch.equal(callback._joining.teacher.weights[n], dense[n]) for n in dense)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_given_teacher_answers_in_the_precision_of_the_model(precision: str) -> None:
    model = Digits()
    callback = VAEAugmentCallback(
        inject=("train",), teacher=copy.deepcopy(model), warmup=1, adapt=False
    )
    trainer, _ = fit([callback], model=model, max_epochs=1, precision=precision)
    assert "vae/distillation" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_pruned_teacher_is_said_to_be_one(tmp_path) -> None:
    trainer, _ = fit([pruner()])
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    callback = VAEAugmentCallback(inject=("train",), warmup=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            [SaliencyPruningCallback({0: 0.5, 3: 0.8}), callback],
            ckpt_path=tmp_path / "pruned.ckpt",
            max_epochs=5,
        )
    assert any("teacher is the pruned model" in str(warning.message) for warning in caught)


def test_another_model_has_a_factor_of_its_own() -> None:
    factors: list[float] = []

    class Factor(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            factors.append(callback._joining.mix)

    callback = VAEAugmentCallback(inject=("train",), warmup=1)
    for _ in range(2):
        fit([pruner(), callback, Factor()], train=slice(0, 960), max_epochs=4)
    assert callback._joining.mix != factors[0]  # what the first model has come to
    assert factors[0] == factors[1]


def test_a_teacher_of_another_shape_is_refused_before_the_first_step() -> None:
    model = Digits()
    callback = VAEAugmentCallback(teacher=Digits(width=5))
    with pytest.raises(MisconfigurationException, match="`teacher`"):
        fit([callback], model=model)
    assert not model.seen


@pytest.mark.parametrize("select", ["starved", "reconstructions", "interpolations"])
def test_other_samples_are_used_in_both_places(select: str) -> None:
    drawn = {}
    for kind in ("prior", select):
        callback = VAEAugmentCallback(select=kind, adapt=False, warmup=1)
        trainer, model = fit([pruner(), callback])
        assert trainer.callback_metrics["vae/distillation"] >= 0
        drawn[kind] = model.state_dict()
    assert any(not torch.equal(drawn["prior"][n], drawn[select][n]) for n in drawn[select])


def test_a_generator_that_cannot_interpolate_is_refused_before_the_fit() -> None:
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(8, 8))

        def loss(self, x):
            return (x - self.mean).square().mean()

        def sample(self, n):
            return self.mean.detach().expand(n, 8, 8).clone()

    model = Digits()
    with pytest.raises(TypeError, match="interpolate"):
        fit([VAEAugmentCallback(Prior(), select="interpolations")], model=model)
    assert not model.seen


@pytest.mark.parametrize("train_by", ["distill", "batch"])
@pytest.mark.parametrize("select", ["prior", "interpolations"])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(
    tmp_path, train_by: str, select: str
) -> None:
    def run(epochs: int, **options):
        callbacks = [pruner(), VAEAugmentCallback(train_by=train_by, select=select, warmup=1)]
        return fit(callbacks, max_epochs=epochs, **options)

    _, whole = run(4)
    trainer, _ = run(2)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    _, resumed = run(4, ckpt_path=tmp_path / "c.ckpt")
    state = whole.state_dict()
    assert all(torch.equal(state[n], v) for n, v in resumed.state_dict().items())


def test_faults_of_the_arguments_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"train_by") as caught:
        VAEAugmentCallback(
            train_by="both",  # type: ignore[arg-type]
            encode=lambda x: x.float(),
        )
    assert "`encode`" in str(caught.value)
    with pytest.raises(ValueError, match="train_by='distill' with encode"):
        VAEAugmentCallback(train_by="batch", encode=lambda x: x, forward=lambda m, b: m(b))
    with pytest.raises(ValueError, match="select"):
        VAEAugmentCallback(select="best")  # type: ignore[arg-type]


def test_accumulated_batches_and_a_last_short_one() -> None:
    callback = VAEAugmentCallback(train_by="batch", adapt=False, warmup=1, share=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, model = fit([pruner(), callback], train=slice(0, 81), accumulate_grad_batches=2)
    assert [len(x) for epoch, x, _ in model.seen if epoch == 1] == [40, 40, 21]


def test_two_processes_join_samples_of_one_conditional_vae(tmp_path) -> None:
    """DDP over gloo: one VAE and one model, each process with samples of its own in its batch."""
    torch.multiprocessing.spawn(_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in ("vae", "model"):
        assert all(torch.equal(a, b) for a, b in zip(first[kind], second[kind], strict=True))
    assert len(first["x"]) == len(second["x"]) == 48
    assert not torch.equal(first["x"][32:], second["x"][32:])


def _process(rank: int, store: str, folder: str) -> None:
    strategy = join_group(rank, store)
    callback = VAEAugmentCallback("conv", classes=10, train_by="batch", adapt=False, warmup=1)
    _, model = fit(
        [pruner(), callback],
        max_epochs=2,
        devices=2,
        strategy=strategy,
    )
    torch.save(
        {
            "vae": [p.detach() for p in callback.vae.parameters()],
            "model": [p.detach() for p in model.parameters()],
            "x": model.seen[-2][1],  # the last one is short
        },
        f"{folder}/{rank}.pt",
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("options", [{}, {"criterion": "obs", "refit": "layers"}])
def test_a_run_resumed_before_its_event_calibrates_by_generated_inputs_too(
    tmp_path, monkeypatch, options
) -> None:
    """The event comes before any batch has shown in what form the model takes its inputs."""
    asked: list[int] = []
    original = VAEAugmentCallback.scoring_batches

    def counting(self, *args):
        batches = list(original(self, *args))
        asked.append(sum(len(x) for x, _ in batches))
        return iter(batches)

    monkeypatch.setattr(VAEAugmentCallback, "scoring_batches", counting)

    def run(**more):
        pruner = SaliencyPruningCallback({1: 0.9}, **options)
        folder = tmp_path / ("resumed" if more else "straight")
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        vae = VAEAugmentCallback(inject=("saliency",), warmup=1)
        return fit([vae, pruner, keep], enable_checkpointing=True, **more)

    _, whole = run()
    straight, asked[:] = list(asked), []
    _, resumed = run(ckpt_path=tmp_path / "straight" / "epoch=1.ckpt")
    if options:  # scores are in the checkpoint, what is fitted to is not
        assert straight == asked == [100, 100]
    state = whole.state_dict()
    assert all(torch.equal(state[n], v) for n, v in resumed.state_dict().items())


def test_scoring_batches_are_as_large_as_the_largest_batch_not_as_the_last() -> None:
    sizes: list[int] = []

    class Counting(VAEAugmentCallback):
        def scoring_batches(self, trainer, pl_module, samples):
            for batch in super().scoring_batches(trainer, pl_module, samples):
                sizes.append(len(batch[0]))
                yield batch

    fit([pruner(), Counting(inject=("saliency",), warmup=1)], train=slice(0, 97))
    assert sizes == [32, 32, 32, 4]  # half as many as the 200 that are scored


def test_several_inputs_are_refused_in_one_voice() -> None:
    class Two(Digits):
        def forward(self, a, b):
            return self.net(a + b)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["a"], batch["b"]), batch["y"])

        def validation_step(self, batch, batch_idx):
            self(batch["a"], batch["b"])

    items = [{"a": X[i], "b": X[i], "y": Y[i]} for i in range(32)]
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[VAEAugmentCallback()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(BatchFormatError, match=r"keys \['a', 'b', 'y'\]") as caught:
        trainer.fit(Two(), DataLoader(items, 8), DataLoader(items, 8))
    assert "Pass `forward=" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{}, {"criterion": "obc"}, {"criterion": "magnitude", "refit": "layers"}],
    ids=["scores", "prices", "refit"],
)
def test_a_forward_that_reads_another_form_than_the_trainings_is_told(options) -> None:
    real = [{"x": X[1000:1100], "y": Y[1000:1100]}]

    def dicts(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module(batch["x"])

    def both(module: nn.Module, batch) -> Tensor:
        return module(batch["x"] if isinstance(batch, dict) else batch[0])

    def run(forward, inject=("saliency",)) -> tuple[SaliencyPruningCallback, Digits]:
        cutting = SaliencyPruningCallback({0: 0.5}, forward=forward, scoring_loader=real, **options)
        vae = VAEAugmentCallback(inject=inject, warmup=1)
        model.append(Digits())
        fit([cutting, vae], model=model[-1])
        return cutting, model[-1]

    model: list[Digits] = []
    told = r"read the batches of VAEAugmentCallback.*a list of Tensor, Tensor.*leave 'saliency' out"
    with pytest.raises(BatchFormatError, match=told):
        run(dicts)
    assert not any((p == 0).any() for n, p in model[0].named_parameters() if n.endswith("weight"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model[0].modules())
    for forward, inject in ((both, ("saliency",)), (dicts, ())):
        cutting, _ = run(forward, inject)
        assert cutting.sparsity == pytest.approx(0.5, abs=1e-3)
