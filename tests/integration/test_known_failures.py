"""What has gone wrong with other pruning callbacks, in Lightning's and others' trackers.

Each test is a complaint that users have made elsewhere. Complaints that a room's own tests answer
are not repeated: a resume that loses masks or fails on keys, exactly resumed runs
(callbacks/test_saliency_pruning_state.py); momentum and weight decay that revive weights
(masking/test_apply.py); loggers that see nothing (callbacks/test_saliency_pruning_logging.py);
things left on the model (callbacks/test_saliency_pruning.py).
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import io
import pickle
import weakref

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SaliencyPruningCallback, sparsity
from tests.callbacks.pruning_cases import (
    TOTAL,
    WEIGHTS,
    Digits,
    Witness,
    digits,
    loaders,
    make_model,
    removed,
    same,
    trainer,
    warnings_of,
    weights,
    zeros,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def load(path):
    return torch.load(path, weights_only=True)


def zeros_in(state_dict) -> int:
    return sum(int((state_dict[name] == 0).sum()) for name in WEIGHTS)


# --------------------------------------------------------------------------- checkpoints


class Attending(Digits):
    """Has buffers whose names look like those of torch.nn.utils.prune."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("attn_mask", torch.arange(10.0) / 10)
        self.net[0].register_buffer("weight_mask", torch.full((24, 64), 0.5))
        self.net[0].register_buffer("weight_orig", torch.zeros(3))

    def forward(self, x):
        return self.net(x) * self.attn_mask


def test_buffers_that_are_called_masks_are_the_users_own(tmp_path) -> None:
    model, save = Attending(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    buffers = {name: b.clone() for name, b in model.named_buffers() if "weight_" in name}
    keys = set(model.state_dict())
    pruner = SaliencyPruningCallback({0: 0.5, 2: 0.8})
    trainer(pruner, save, enable_checkpointing=True).fit(model, *loaders())
    assert set(pruner.masks) == set(WEIGHTS)
    for epoch in range(3):
        stored = load(tmp_path / f"epoch={epoch}.ckpt")["state_dict"]
        assert set(stored) == keys
        assert all(torch.equal(stored[name], value) for name, value in buffers.items())
        Attending().load_state_dict(stored)
    again = SaliencyPruningCallback({0: 0.5, 2: 0.8})
    t, resumed = trainer(again, max_epochs=4), Attending()
    t.fit(resumed, *loaders(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert zeros(resumed) == removed(again.masks) == round(0.8 * TOTAL)


class Saver(L.Callback):
    """Write checkpoints wherever a user's callback might."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def _save(self, trainer, where) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:03}-{where}.ckpt")

    def on_train_epoch_start(self, trainer, pl_module):
        self._save(trainer, "epoch-start")

    def on_train_batch_start(self, trainer, *_):
        self._save(trainer, "batch-start")

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "batch-end")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, "validation-end")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, "epoch-end")

    def on_train_end(self, trainer, pl_module):
        self._save(trainer, "train-end")


@pytest.mark.parametrize("saver_first", [True, False])
def test_every_checkpoint_is_as_sparse_as_its_masks_say(tmp_path, saver_first) -> None:
    pruner, saver = SaliencyPruningCallback({0: 0.5, 1: 0.8}), Saver(tmp_path)
    order = [saver, pruner] if saver_first else [pruner, saver]
    trainer(*order).fit(make_model(), *loaders())
    seen = set()
    for path in sorted(tmp_path.glob("*.ckpt")):
        stored = load(path)
        copied = SaliencyPruningCallback({})
        copied.load_state_dict(stored["callbacks"][pruner.state_key])
        for name, mask in copied.masks.items():
            assert not stored["state_dict"][name][~mask].any(), path.name
        assert zeros_in(stored["state_dict"]) == removed(copied.masks), path.name
        for state in stored["optimizer_states"][0]["state"].values():
            if state["momentum_buffer"].shape in {(24, 64), (10, 24)}:
                index = 0 if state["momentum_buffer"].shape == (24, 64) else 1
                mask = copied.masks.get(WEIGHTS[index])
                assert mask is None or not state["momentum_buffer"][~mask].any(), path.name
        seen.add(removed(copied.masks))
    assert seen == {0, round(0.5 * TOTAL), round(0.8 * TOTAL)}


def test_the_same_share_each_epoch_does_not_compound_and_is_logged_as_it_is(tmp_path) -> None:
    pruner = SaliencyPruningCallback(lambda epoch: 0.5)
    logger = CSVLogger(tmp_path)
    save = ModelCheckpoint(tmp_path / "c", save_top_k=-1, filename="{epoch}")
    t = trainer(pruner, save, max_epochs=5, logger=logger, enable_checkpointing=True)
    t.fit(make_model(), *loaders())
    assert pruner.sparsity == round(0.5 * TOTAL) / TOTAL
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    head = lines[0].split(",")
    rows = [dict(zip(head, line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row["prune/sparsity"] and row["epoch"]]
    logged = {int(row["epoch"]): float(row["prune/sparsity"]) for row in rows}
    for epoch in range(5):
        recount = zeros_in(load(tmp_path / "c" / f"epoch={epoch}.ckpt")["state_dict"])
        assert recount == (round(0.5 * TOTAL) if epoch else 0)
        assert logged[epoch] == pytest.approx(recount / TOTAL)


# --------------------------------------------------------------------------- what is pruned


class Everything(Digits):
    """Pixels as tokens: an embedding, a norm, an output layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.embedding = nn.Embedding(17, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(256, 16)
        self.output = nn.Linear(16, 10)

    def forward(self, x):
        tokens = self.norm(self.embedding((16 * x).long()))
        return self.output(self.hidden(tokens.flatten(1)).relu())


def test_norms_and_biases_stay_and_so_does_what_is_excluded() -> None:
    model, pruner = Everything(), SaliencyPruningCallback({0: 0.9}, exclude=["embedding*", "out*"])
    trainer(pruner, max_epochs=2).fit(model, *loaders())
    assert set(pruner.masks) == {"hidden.weight"}
    assert sparsity(pruner.masks) == pytest.approx(0.9, abs=1e-3)
    for name, parameter in model.named_parameters():
        if name != "hidden.weight":
            assert (parameter != 0).all(), name


class Convolving(Digits):
    """Digits as pictures of two channels, in float64: rounding must not tell masks apart."""

    def __init__(self) -> None:
        super().__init__()
        body = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
        self.net = nn.Sequential(*body, nn.Flatten(), nn.Linear(72, 10)).double()

    def forward(self, x):
        image = x.double().reshape(-1, 1, 8, 8)
        return self.net(torch.cat([image, 1 - image], 1))


@pytest.mark.parametrize(
    "options",
    [{"criterion": "obs", "refit": "layers"}, {"refit": "outputs"}],
    ids=["obs and layers", "taylor and outputs"],
)
def test_weights_with_channels_last(options) -> None:
    """Lightning's ModelPruning ends with torch's "view size is not compatible"."""
    nets, masks = {}, {}
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        model = Convolving().to(memory_format=layout)
        pruner = SaliencyPruningCallback({0: 0.8}, **options)
        trainer(pruner, max_epochs=1).fit(model, *loaders(64, 64))
        nets[layout], masks[layout] = model.net, pruner.masks
    last = nets[torch.channels_last]
    assert last[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert same(masks[torch.channels_last], masks[torch.contiguous_format])
    assert sparsity(masks[torch.channels_last]) == pytest.approx(0.8, abs=1e-3)
    torch.testing.assert_close(last.state_dict(), nets[torch.contiguous_format].state_dict())


def test_frozen_parameters_are_pruned_and_stay_frozen() -> None:
    model = make_model()
    model.net[0].weight.requires_grad_(False)
    before = model.net[0].weight.clone()
    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.8})
    trainer(pruner, Witness(pruner)).fit(model, *loaders())
    assert zeros(model) == round(0.8 * TOTAL)
    assert not pruner.masks[WEIGHTS[0]].all()
    assert torch.equal(model.net[0].weight, before * pruner.masks[WEIGHTS[0]])
    assert [p.requires_grad for p in model.parameters()] == [False] + 5 * [True]


def test_a_whole_number_is_no_number_of_weights() -> None:
    # ModelPruning takes 1 for a single weight, and 1.0 for all of them.
    for target in (1, 100):
        with pytest.raises(ValueError, match=rf"expected a share .* but got {target}"):
            SaliencyPruningCallback({0: target})
    pruner = SaliencyPruningCallback({0: 0})
    model = make_model()
    trainer(pruner, max_epochs=2).fit(model, *loaders())
    assert zeros(model) == pruner.sparsity == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_whole_number_type(dtype) -> None:
    class Narrow(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1].long()), batch_idx)

    x, y = digits()
    loader = DataLoader(TensorDataset(x[:256], y[:256].to(dtype)), batch_size=64)
    for target in ("probability", "label_probability"):
        model, pruner = Narrow(), SaliencyPruningCallback({0: 0.5}, target=target)
        trainer(pruner, max_epochs=1).fit(model, loader, loader)
        assert zeros(model) == round(0.5 * TOTAL)


def test_no_trainer_is_pruned_unasked() -> None:
    installed = importlib.metadata.entry_points(group="lightning.pytorch.callbacks_factory")
    assert not [e for e in installed if e.value.startswith("lightning_prune")]
    assert not any(isinstance(c, SaliencyPruningCallback) for c in trainer().callbacks)


# --------------------------------------------------------------------------- used again


def test_the_same_model_and_callback_in_one_fit_after_another() -> None:
    model, pruner = make_model(), SaliencyPruningCallback({0: 0.5})
    trainer(pruner, max_epochs=2).fit(model, *loaders())
    masks, trained = pruner.masks, weights(model)
    for _ in range(2):
        witness = Witness(pruner)
        trainer(pruner, witness, max_epochs=2).fit(model, *loaders())
        assert witness.steps_checked
        assert same(pruner.masks, masks)
        assert zeros(model) == round(0.5 * TOTAL)
    assert not torch.equal(weights(model)[WEIGHTS[0]], trained[WEIGHTS[0]])  # it went on learning
    # The model may be given to another pruner, which finds the zeros there as scores of nothing.
    other = SaliencyPruningCallback({0: 0.8})
    with warnings_of(r"50\.0 % of the weights .* no mask holds them"):
        trainer(other, max_epochs=2).fit(model, *loaders())
    assert zeros(model) == round(0.8 * TOTAL)
    assert all(not (other.masks[name] & ~masks[name]).any() for name in masks)


def test_a_callback_that_lives_on_keeps_no_model_alive() -> None:
    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.8})
    models = []
    for _ in range(2):
        model = make_model()
        t = trainer(pruner, max_epochs=2)
        t.fit(model, *loaders())
        models += [weakref.ref(model), weakref.ref(model.net[0].weight), weakref.ref(t)]
        del model, t
    # Lightning hangs its model's log methods on every callback, and leaves them there.
    assert not {"log", "log_dict"} & set(vars(pruner))
    gc.collect()
    assert [ref() for ref in models] == [None] * 6


class Copier(L.Callback):
    """Copy another callback at a point of the fit, as strategies and tools do."""

    def __init__(self, pruner, hook) -> None:
        self.pruner, self.copies = pruner, []
        setattr(self, hook, self._copy)

    def _copy(self, trainer, *_) -> None:
        if not trainer.sanity_checking and trainer.current_epoch > 0:
            self.copies.append(self.copied(self.pruner))

    def copied(self, pruner) -> object:
        return copy.deepcopy(pruner)


HOOKS = ["on_train_batch_start", "on_validation_batch_end", "on_validation_end", "on_fit_end"]


@pytest.mark.parametrize("hook", HOOKS)
def test_copies_made_during_a_fit(hook) -> None:
    expected = make_model()
    trainer(SaliencyPruningCallback({0: 0.5, 1: 0.8})).fit(expected, *loaders())
    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.8})
    model, copier = make_model(), Copier(pruner, hook)
    t = trainer(copier, pruner)
    t.fit(model, *loaders())
    assert copier.copies
    assert same(model.state_dict(), expected.state_dict())  # nothing has happened to the original
    for copied in copier.copies[-3:]:
        other = make_model()
        trainer(copied).fit(other, *loaders())
        assert zeros(other) == round(0.8 * TOTAL)
    assert same(model.state_dict(), expected.state_dict())


class WithoutModel(pickle.Pickler):
    """Refuse to store what belongs to the run."""

    def persistent_id(self, thing) -> None:
        assert not isinstance(thing, (nn.Module, nn.Parameter, L.Trainer, torch.optim.Optimizer))


@pytest.mark.parametrize("hook", HOOKS)
def test_a_copy_takes_nothing_of_the_run_along(hook) -> None:
    class Storing(Copier):
        def copied(self, pruner) -> object:
            return WithoutModel(io.BytesIO()).dump(pruner)

    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.8})
    storing = Storing(pruner, hook)
    trainer(storing, pruner, max_epochs=2).fit(make_model(), *loaders())
    assert storing.copies


# --------------------------------------------------------------------------- beside Lightning's own


@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler])
def test_profilers(profiler, tmp_path) -> None:
    pruner = SaliencyPruningCallback({0: 0.5})
    t = trainer(pruner, max_epochs=2, profiler=profiler(dirpath=tmp_path, filename="profile"))
    model = make_model()
    t.fit(model, *loaders())
    assert zeros(model) == round(0.5 * TOTAL)
    (report,) = tmp_path.glob("*profile*")
    assert "SaliencyPruningCallback" in report.read_text()


class Tuned(Digits):
    """Has what Lightning's tuners turn."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.05, 16

    def train_dataloader(self):
        return DataLoader(loaders()[0].dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return loaders()[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def make_tuned() -> Tuned:
    torch.manual_seed(1)
    return Tuned()


@pytest.mark.parametrize("tool", ["lr_find", "scale_batch_size"])
def test_the_tuner_before_a_fit_prunes_nothing(tool, tmp_path) -> None:
    pruner, model = SaliencyPruningCallback({0: 0.5, 1: 0.8}), make_tuned()
    start = copy.deepcopy(model.state_dict())
    t = trainer(pruner, Witness(pruner), default_root_dir=tmp_path)
    if tool == "lr_find":
        Tuner(t).lr_find(model, num_training=20)
        assert model.lr != 0.05
    else:
        Tuner(t).scale_batch_size(model, max_trials=2, steps_per_trial=2)
        assert model.batch_size == 4  # two trials: 2, 4
    assert pruner.history == []
    assert same(model.state_dict(), start)
    t.fit(model)
    assert [(r["epoch"], r["target"]) for r in pruner.history] == [(0, 0.5), (1, 0.8)]
    assert zeros(model) == round(0.8 * TOTAL)


@pytest.mark.parametrize("finder", ["lr", "batch_size"])
def test_the_finders_as_callbacks(finder, tmp_path) -> None:
    callback = (
        LearningRateFinder(num_training_steps=20)
        if finder == "lr"
        else BatchSizeFinder(max_trials=2, steps_per_trial=2)
    )
    pruner, model = SaliencyPruningCallback({0: 0.5, 1: 0.8}), make_tuned()
    t = trainer(callback, pruner, Witness(pruner), default_root_dir=tmp_path)
    t.fit(model)
    assert (model.lr != 0.05) == (finder == "lr")
    assert [(r["epoch"], r["target"]) for r in pruner.history] == [(0, 0.5), (1, 0.8)]
    assert zeros(model) == round(0.8 * TOTAL)


def test_validation_alone_changes_nothing_after_a_fit() -> None:
    pruner, model = SaliencyPruningCallback({0: 0.5}), make_model()
    t = trainer(pruner, max_epochs=2)
    t.fit(model, *loaders())
    before, history, masks = copy.deepcopy(model.state_dict()), pruner.history, pruner.masks
    for again in (t, trainer(pruner)):  # both under inference mode
        again.validate(model, loaders()[1], verbose=False)
        assert same(model.state_dict(), before)
        assert same(pruner.masks, masks)
        assert pruner.history == history
        assert not any(parameter.is_inference() for parameter in model.parameters())
    t.fit_loop.max_epochs = 3
    t.fit(model, *loaders())  # and training goes on
    assert zeros(model) == round(0.5 * TOTAL)


# --------------------------------------------------------------------------- failures


class Failing(Digits):
    """Its forward pass fails while it is being scored in epoch 2, the third time it is called."""

    calls = 0
    fails = True

    def forward(self, x):
        if self.fails and not self.training and self.trainer.current_epoch == 2:
            type(self).calls += 1
            if type(self).calls > 2:
                raise RuntimeError("no memory left")
        return super().forward(x)


def test_a_failure_while_scoring_leaves_the_weights_and_a_run_to_resume(tmp_path) -> None:
    schedule = {0: 0.5, 2: 0.8}
    whole, expected = SaliencyPruningCallback(schedule), make_model()
    trainer(whole, max_epochs=4).fit(expected, *loaders())

    class Before(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.weights, self.mode = copy.deepcopy(pl_module.state_dict()), pl_module.training

    torch.manual_seed(1)
    pruner, model, before = SaliencyPruningCallback(schedule), Failing(), Before()
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    t = trainer(pruner, before, save, max_epochs=4, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="no memory left"):
        t.fit(model, *loaders())
    assert same(model.state_dict(), before.weights)
    assert zeros(model) == removed(pruner.masks) == round(0.5 * TOTAL)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    resumed = SaliencyPruningCallback(schedule)
    path = tmp_path / "epoch=1.ckpt"
    for again, start in ((resumed, make_model()), (pruner, model)):  # also with the same objects
        Failing.fails = False
        t = trainer(again, max_epochs=4)
        start.train()  # Lightning's validation has left its mode
        t.fit(start, *loaders(), ckpt_path=path, weights_only=True)
        assert same(start.state_dict(), expected.state_dict())
        assert same(again.masks, whole.masks)
