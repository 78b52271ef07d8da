"""What the logits' gradients become: a mixture, scaled, shared out, kept over a resume."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.augment.mixing import distillation_loss
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from lightning_prune.callbacks.vae_augment import VAEAugmentCallback
from tests.callbacks.pruning_cases import (
    QUIET,
    digits,
    fit,
    loaders,
    make_model,
    trainer,
    warnings_of,
)

WEIGHT, TEMPERATURE, BATCH = 0.3, 3.0, 24


class Model(L.LightningModule):
    """64-16-10 with dropout, which the teacher must not draw."""

    def __init__(self, automatic: bool = True, calls: str = "model", optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        self.automatic_optimization, self.calls = automatic, calls
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self(x) if self.calls == "model" else self.net(x)

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.logits(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Recorder(L.Callback):
    """Moves the model away from its teacher; notes weights and gradients at each step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            pl_module.net[0].weight[:8] = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.weights.append({n: p.detach().clone() for n, p in named.items()})
        self.gradients.append({n: p.grad.clone() for n, p in named.items()})


def run(model: Any, callback: DistillationCallback, *more: Any, samples: int = 96, **kwargs: Any):
    recorder = Recorder()
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 1, **kwargs}, callbacks=[callback, *more, recorder]
    )
    x, y = digits()
    trainer.fit(model, DataLoader(TensorDataset(x[:samples], y[:samples]), BATCH))
    return recorder


def callback(**kwargs: Any) -> DistillationCallback:
    return DistillationCallback(WEIGHT, TEMPERATURE, **kwargs)


def expected(weights: dict[str, torch.Tensor], batch: Any, dtype: Any = torch.float64):
    """The mixture's gradients in double precision, with the divergence written out."""
    student, teacher = Model().to(dtype), Model().to(dtype)
    student.load_state_dict(weights)
    x, y = batch[0].to(dtype), batch[1]
    z, t = student.net(x), teacher.net(x).detach()
    loss, n = F.cross_entropy(z, y), len(z)
    p, q = (t / TEMPERATURE).softmax(1), (z / TEMPERATURE).softmax(1)
    kd = TEMPERATURE**2 * (p * (p.log() - q.log())).sum() / n
    (at_logits,) = torch.autograd.grad(kd, z, retain_graph=True)
    torch.testing.assert_close(at_logits, TEMPERATURE * (q - p) / n)  # the closed form
    total = (1 - WEIGHT) * loss + WEIGHT * kd
    names = [name for name, _ in student.named_parameters()]
    return dict(zip(names, torch.autograd.grad(total, list(student.parameters())), strict=True))


def check(recorder: Recorder, step: int, batches: list[Any], rtol: float = 1e-4, **how: Any):
    parts = [expected(recorder.weights[step], batch) for batch in batches]
    for name, got in recorder.gradients[step].items():
        mean = sum(part[name] for part in parts) / len(parts)
        torch.testing.assert_close(got.double(), mean, rtol=rtol, atol=how.get("atol", 1e-6))


@pytest.mark.parametrize("automatic", [True, False])
def test_gradients_are_those_of_the_mixture(automatic) -> None:
    recorder = run(Model(automatic), callback())
    for step in (0, 3):
        check(recorder, step, [recorder.batches[step]])


def test_accumulated_batches_share_the_term_as_the_loss() -> None:
    recorder = run(Model(), callback(), accumulate_grad_batches=4)
    assert len(recorder.gradients) == 1
    check(recorder, 0, recorder.batches)


def test_half_precision() -> None:
    recorder = run(Model(), callback(), precision="bf16-mixed")
    check(recorder, 1, [recorder.batches[1]], rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("automatic", [True, False])
def test_the_scale_of_mixed_precision_comes_and_goes(automatic) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4096.0))
    recorder = run(Model(automatic), callback(), plugins=[plugin])
    check(recorder, 1, [recorder.batches[1]], rtol=5e-2, atol=5e-4)


def test_a_wrapped_model_is_called_once(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        recorder = run(Model(), callback(), strategy=DDPStrategy(process_group_backend="gloo"))
    finally:
        torch.distributed.destroy_process_group()
    check(recorder, 1, [recorder.batches[1]])


def test_a_named_submodule() -> None:
    recorder = run(Model(calls="net"), callback(module="net"))
    check(recorder, 2, [recorder.batches[2]])


def test_every_call_of_a_step_has_its_term() -> None:
    class Twice(Model):
        def loss(self, batch: Any) -> torch.Tensor:
            with torch.no_grad():
                self(batch[0])  # has none
            halves = [(batch[0][:12], batch[1][:12]), (batch[0][12:], batch[1][12:])]
            return sum(super(Twice, self).loss(half) for half in halves)

    recorder = run(Twice(), callback())
    parts = [
        expected(recorder.weights[0], [part[index] for part in recorder.batches[0]])
        for index in (slice(0, 12), slice(12, 24))
    ]
    for name, got in recorder.gradients[0].items():
        torch.testing.assert_close(
            got.double(), sum(part[name] for part in parts), rtol=1e-4, atol=1e-6
        )


def test_gradients_that_the_step_takes_for_itself_are_its_own() -> None:
    class Penalty(Model):
        """Adds nothing to the loss, but would see a term in what it asks for."""

        def loss(self, batch: Any) -> torch.Tensor:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            (own,) = torch.autograd.grad(loss, logits, retain_graph=True)
            hot = F.one_hot(batch[1], 10)
            torch.testing.assert_close(own, (logits.softmax(1) - hot).detach() / len(logits))
            return loss

    recorder = run(Penalty(), callback())
    check(recorder, 1, [recorder.batches[1]])


def test_lbfgs_has_the_term_in_every_evaluation() -> None:
    model = Model(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3))
    recorder = run(model, callback(), samples=BATCH)
    assert len(recorder.gradients) > 2
    for step in range(len(recorder.gradients)):
        check(recorder, step, [recorder.batches[0]], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_logits_of_other_kinds_and_shapes(likelihood) -> None:
    """(N, T, C) in an object with `logits` under Hugging Face's convention, and plain ones."""

    class Output(SimpleNamespace):
        pass

    class Other(Model):
        def forward(self, x: torch.Tensor) -> Any:
            logits = self.net(x)
            if likelihood != "categorical":
                return logits
            return Output(logits=logits.reshape(len(x), 2, 5))

        def loss(self, batch: Any) -> torch.Tensor:
            self.output = output = self(batch[0])
            logits = output if isinstance(output, torch.Tensor) else output.logits
            logits.retain_grad()
            self.kept = logits
            return 0.0 * logits.sum()

    model = Other()
    teacher = Model()
    recorder = run(model, callback(likelihood=likelihood), samples=BATCH)
    student = Model()
    student.load_state_dict(recorder.weights[0])
    x = recorder.batches[0][0]
    z, t = student.net(x).detach().requires_grad_(), teacher.net(x).detach()
    if likelihood == "categorical":
        a, b = (v.reshape(len(x), 2, 5).transpose(1, 2) for v in (z, t))
    else:
        a, b = z, t
    distillation_loss(a, b, likelihood, TEMPERATURE).backward()
    torch.testing.assert_close(
        model.kept.grad.reshape(len(x), 10), WEIGHT * z.grad, rtol=1e-4, atol=1e-7
    )


def test_positions_that_labels_leave_out_have_no_term() -> None:
    class Tokens(Model):
        """Two predictions of five classes a sample; its loss is their sum, and keeps the logits."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).reshape(-1, 5, 2)

        def loss(self, batch: Any) -> torch.Tensor:
            self.kept = self(batch[0])
            self.kept.retain_grad()
            return self.kept.sum()

    x = digits()[0][:BATCH]
    labels = torch.full((BATCH, 2), -100)
    model = Tokens()
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1}, callbacks=[callback(), Recorder()])
    trainer.fit(model, DataLoader(TensorDataset(x, labels), BATCH))
    # The user's loss keeps its share all the same, and all of its gradient is 1 here.
    torch.testing.assert_close(model.kept.grad, torch.full((BATCH, 5, 2), 1 - WEIGHT))
    labels[:] = 0
    labels[::3, 1] = labels[5] = -100
    model, recorder = Tokens(), Recorder()
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1}, callbacks=[callback(), recorder])
    trainer.fit(model, DataLoader(TensorDataset(x, labels), BATCH))
    student, teacher = Model(), Model()
    student.load_state_dict(recorder.weights[0])
    z, t = (net.net(x).detach().double().reshape(-1, 5, 2) for net in (student, teacher))
    p, q = (t / TEMPERATURE).softmax(1), (z / TEMPERATURE).softmax(1)
    counted = (labels != -100)[:, None]
    expected = counted * TEMPERATURE * (q - p) / counted.sum()  # the closed form
    mixed = (1 - WEIGHT) + WEIGHT * expected
    torch.testing.assert_close(model.kept.grad.double(), mixed, rtol=1e-6, atol=1e-7)
    kd = TEMPERATURE**2 * (counted * p * (p.log() - q.log())).sum() / counted.sum()
    assert trainer.callback_metrics["distill/loss"] == pytest.approx(float(kd), rel=1e-4)


def test_a_weight_of_zero_leaves_the_training_as_it_is() -> None:
    class Dropping(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))

    states = []
    for weight in (0.0, None):
        torch.manual_seed(3)
        model = Dropping()
        trained = DistillationCallback(weight) if weight is not None else L.Callback()
        run(model, trained)  # type: ignore[arg-type]
        states.append(model.state_dict())
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        assert torch.equal(a, b)


class Remembering(Model):
    """Has a second loss on activations that ``forward`` leaves behind, and changes its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sub_(0.5)
        self.hidden = self.net[:2](x)
        return self.net[2](self.hidden)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch[0].clone(), batch[1]
        return F.cross_entropy(self(x), y) + 0.5 * self.hidden.square().mean()


def test_what_forward_leaves_behind_and_does_to_its_input_is_the_students() -> None:
    x, y = digits()
    alone, observed = Remembering(), Remembering()
    for model, callbacks in ((alone, []), (observed, [DistillationCallback(weight=0.0)])):
        trainer = L.Trainer(**{**QUIET, "max_epochs": 2}, callbacks=callbacks)
        trainer.fit(model, DataLoader(TensorDataset(x[:96], y[:96]), BATCH))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(observed.state_dict()[name], value)


def test_the_dense_network_is_that_before_the_first_event() -> None:
    pruner, learning = SaliencyPruningCallback({1: 0.5, 3: 0.8}), DistillationCallback(0.5)
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.setdefault(trainer.current_epoch, learning._teacher is not None)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and not trainer.sanity_checking:
                seen["weight"] = pl_module.net[0].weight.detach().clone()
            logged = trainer.callback_metrics
            seen["logged"] = float(logged.get("distill/loss", torch.nan))

    model = fit(pruner, learning, Watch(), max_epochs=5)
    assert [seen[epoch] for epoch in range(5)] == [False, False, True, True, True]
    assert torch.equal(learning._teacher.weights["net.0.weight"], seen["weight"])
    assert 0 < seen["logged"] < 10
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)


def test_a_resumed_run_learns_from_the_dense_network(tmp_path) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    def callbacks() -> list[Any]:
        return [SaliencyPruningCallback({1: 0.8, 3: 0.9}), DistillationCallback(0.5)]

    whole = fit(*callbacks(), Save(), max_epochs=5)
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]
    assert any(s.get("teacher") for s in state.values())
    resumed, again = make_model(), callbacks()
    trainer(*again, max_epochs=5).fit(resumed, *loaders(), ckpt_path=tmp_path / "c.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_step_that_calls_something_else_is_refused() -> None:
    with pytest.raises(PruningSetupError, match=r"expected training_step to call the model.*net"):
        run(Model(calls="net"), callback())
    with pytest.raises(PruningSetupError, match=r"no 'body'.*'net'"):
        run(Model(), callback(module="body"))


def test_an_output_without_logits_is_refused_in_the_first_step() -> None:
    class Pair(Model):
        def forward(self, x: torch.Tensor) -> Any:
            return self.net(x), x

        def logits(self, x: torch.Tensor) -> torch.Tensor:
            return self(x)[0]

    model, pruner = Pair(), SaliencyPruningCallback({5: 0.5}, criterion="magnitude")
    with pytest.raises(PruningSetupError, match="got a tuple"):
        run(model, callback(), pruner, max_epochs=6)
    assert not model._forward_hooks  # nothing is left behind after an exception
    run(Pair(), callback(module="net"))


def test_one_logit_is_no_distribution_to_learn_from() -> None:
    class Single(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)[:, :1]

        def loss(self, batch: Any) -> torch.Tensor:
            return self(batch[0]).square().mean()

    with pytest.raises(ValueError, match=r"at least 2 classes.*\(\d+, 1\).*'bernoulli'"):
        run(Single(), callback())
    run(Single(), callback(likelihood="gaussian"))


def test_a_loss_that_passes_lightning_by_is_noticed() -> None:
    class Raw(Model):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()

    with warnings_of("nothing was learnt from the dense network"):
        run(Raw(automatic=False), callback())


def test_generated_inputs_keep_a_term_of_their_own() -> None:
    """The other distillation, in after-backward hooks, is not touched."""
    recorded = []
    for with_real in (False, True):
        torch.manual_seed(0)
        vae = VAEAugmentCallback(inject=("train",), warmup=1)
        first = [DistillationCallback(0.0)] if with_real else []
        vae._teacher = None

        class Keep(L.Callback):
            def __init__(self, vae: Any) -> None:
                self.vae = vae

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.vae.before_pruning(trainer, pl_module)

        recorded.append(run(Model(), vae, *first, Keep(vae)))  # type: ignore[arg-type]
    for a, b in zip(recorded[0].gradients, recorded[1].gradients, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_a_model_pruned_before_is_its_own_teacher_with_a_warning() -> None:
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="magnitude")
    model = fit(pruner, max_epochs=2)
    with warnings_of("pruned already .* no weights of this model from before"):
        fit(pruner, DistillationCallback(), model=model, max_epochs=1)


def test_a_second_model_has_a_second_teacher() -> None:
    learning = DistillationCallback()
    first, second = Model(), Model()
    run(first, learning)
    kept = learning._teacher
    run(first, learning)
    assert learning._teacher is kept
    run(second, learning)
    assert learning._teacher is not kept


def test_a_dense_training_before_the_first_pruning_is_learnt_from() -> None:
    learning, model = DistillationCallback(), make_model()
    fit(learning, model=model, max_epochs=2)  # no pruner yet: the teacher is the first start
    trained = model.net[0].weight.detach().clone()
    pruner = SaliencyPruningCallback({0: 0.5}, criterion="magnitude")
    fit(learning, pruner, model=model, max_epochs=1)
    kept = learning._teacher
    assert int((kept.weights["net.0.weight"] == 0).sum()) == 0
    first = torch.nn.utils.parameters_to_vector(make_model().parameters())
    assert not torch.equal(kept.weights["net.0.weight"].flatten(), first[: 64 * 24])
    distance = (kept.weights["net.0.weight"] - trained).norm()
    assert distance < (trained - first[: 64 * 24].view(24, 64)).norm()
    fit(learning, pruner, model=model, max_epochs=1)
    assert learning._teacher.weights["net.0.weight"].equal(kept.weights["net.0.weight"])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(precision: str) -> None:
    learning, model = DistillationCallback(), make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(learning, model=model, max_epochs=1, precision=precision)
    assert learning._teacher.weights["net.0.weight"].dtype == model.net[0].weight.dtype


def test_two_of_them_have_names_of_their_own() -> None:
    losses: list[dict[str, float]] = []

    class Noted(L.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            losses.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    first = DistillationCallback(module="net")
    second = DistillationCallback(module="net.0", likelihood="gaussian")
    run(Model(), first, second, Noted())
    assert losses[0]["distill/loss"] != losses[0]["distill_2/loss"]


def test_copies_and_short_runs() -> None:
    learning = DistillationCallback()
    run(Model(), learning, fast_dev_run=True)
    copied = copy.deepcopy(learning)
    assert torch.equal(
        copied._teacher.weights["net.0.weight"], learning._teacher.weights["net.0.weight"]
    )
    assert copied.state_key == "DistillationCallback{'module': None}"


def test_arguments_out_of_range_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"(?s)`weight`.*`temperature`.*`likelihood`"):
        DistillationCallback(1.5, 0.0, likelihood="poisson")  # type: ignore[arg-type]


def test_arguments_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="`weight`: expected") as caught:
        DistillationCallback(weight="half", temperature=None)
    assert "`temperature`: expected" in str(caught.value)


class Net(nn.Module):
    """A network that logs in its ``forward``, through the model that it is part of."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        self.owner = (owner,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layers(x)
        self.owner[0].log("inner", z.abs().mean(), on_step=False, on_epoch=True, batch_size=len(x))
        return z


class LoggingModel(Model):
    def __init__(self, calls: str = "model") -> None:
        super().__init__(calls=calls)
        self.net = Net(self)
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        self.log_dict({"outer": z.abs().mean()}, on_step=False, on_epoch=True, batch_size=len(x))
        return z

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        z = super().logits(x)
        self.seen.append(float(z.detach().abs().mean()))
        return z


@pytest.mark.parametrize("module", [None, "net"])
def test_what_forward_logs_is_the_students(module: str | None) -> None:
    x, y = digits()
    model = LoggingModel(calls="model" if module is None else "net")
    with torch.no_grad():
        model.net.layers[2].weight.mul_(3.0)
    dense = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.net.layers[2].weight.div_(9.0)
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 1}, callbacks=[callback(module=module, teacher=dense)]
    )
    trainer.fit(model, DataLoader(TensorDataset(x[:96], y[:96]), BATCH))
    mean = sum(model.seen) / len(model.seen)
    names = ["inner"] if module else ["inner", "outer"]
    for name in names:
        assert float(trainer.callback_metrics[name]) == pytest.approx(mean, rel=1e-5)
    assert "log" not in vars(model)


class Checkpointed(Model):
    """Calls its network again on the way back instead of keeping its activations."""

    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if self.reentrant else x
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("module", [None, "net"])
def test_a_checkpointed_network(module: str | None) -> None:
    recorder = run(Checkpointed(), callback(module=module))
    check(recorder, 2, [recorder.batches[2]])


def test_a_reentrant_checkpoint_around_the_named_submodule_hides_it() -> None:
    model = Checkpointed()
    model.reentrant = True
    with pytest.raises(PruningSetupError, match=r"use_reentrant=False"):
        run(model, callback(module="net"))


def test_a_deep_networks_modules_are_not_walked_through_in_every_step() -> None:
    class Counting(Model):
        walks = 0

        def modules(self) -> Any:
            Counting.walks += 1
            return super().modules()

    def walks(epochs: int) -> int:
        before = Counting.walks
        trainer(callback(module="net"), max_epochs=epochs).fit(
            Counting(calls="net"), DataLoader(TensorDataset(*digits()), 16, drop_last=True)
        )
        return Counting.walks - before

    assert walks(3) - walks(2) < 20  # an epoch has 112 steps
