"""In real fits, masked weights, their momenta and their averages are zero after every step."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import SaliencyPruningCallback, squared_gradients
from lightning_prune.callbacks.averages import averaged_copies, mask_averages
from tests.callbacks.pruning_cases import (
    TOTAL,
    WEIGHTS,
    Digits,
    Witness,
    fit,
    loaders,
    make_model,
    trainer,
    zeros,
)

SCHEDULE = {0: 0.5, 1: 0.8}  # a first epoch without masks fills the momenta

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.01),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


class Inspector(L.Callback):
    """After every training batch: weights, momenta and averages of masked weights are zero."""

    def __init__(self, pruner: SaliencyPruningCallback) -> None:
        self.pruner = pruner
        self.weights = self.momenta = self.averages = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        for name, mask in self.pruner.masks.items():
            parameter = pl_module.get_parameter(name)
            assert_zero(parameter, mask)
            self.weights += 1
            for optimizer in trainer.optimizers:
                for moment in moments(optimizer, parameter):
                    assert moment[~mask].eq(0).all(), f"momentum of {name}"
                    self.momenta += 1
            for average in averaged_copies(trainer):
                assert average.get_parameter(name).detach()[~mask].eq(0).all()
                self.averages += 1


def assert_zero(tensor: Tensor, mask: Tensor) -> None:
    masked = tensor.detach()[~mask]
    assert torch.equal(masked, torch.zeros_like(masked))
    assert not torch.signbit(masked).any()


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [s for s in state.values() if isinstance(s, Tensor) and s.shape == parameter.shape]


def inspected_fit(*others: L.Callback, model: Digits, fitted: Any = None, **kwargs: Any):
    """Fit, and return who inspected each step; the model is 80 % sparse at the end, exactly."""
    pruner = SaliencyPruningCallback(SCHEDULE)
    inspector = Inspector(pruner)
    fitted = model if fitted is None else fitted
    fit(*others, pruner, inspector, model=fitted, **{"max_epochs": 4, **kwargs})
    assert zeros(model) == round(0.8 * TOTAL) == sum(int((~m).sum()) for m in pruner.masks.values())
    assert inspector.weights == 2 * 5 * 3  # two masks, five batches, three epochs with masks
    return inspector


# ---------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer(kind) -> None:
    inspector = inspected_fit(model=make_model(optimizer=OPTIMIZERS[kind]))
    assert inspector.momenta > 0 or kind == "lbfgs"


def test_a_flat_history_from_before_the_event_moves_no_masked_weight() -> None:
    class Watched(torch.optim.LBFGS):
        seen = 0.0

        def step(self, closure):
            def watched():
                for name, mask in pruner.masks.items():  # within the step, at every evaluation
                    weight = model.get_parameter(name).detach()
                    self.seen = max(self.seen, weight[~mask].abs().max().item())
                return closure()

            return super().step(watched)

    made = []
    model = make_model(optimizer=lambda p: made.append(Watched(p, lr=0.1, max_iter=3)) or made[-1])
    pruner = SaliencyPruningCallback(SCHEDULE)
    fit(pruner, model=model, max_epochs=4)
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)
    assert made[0].seen == 0.0


class Manual(Digits):
    """One optimizer a layer; steps with or without a closure, raw or through Lightning."""

    def __init__(self, *, raw: bool, closure: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw, self.closure = raw, closure

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9)
        return sgd, torch.optim.Adam(self.net[1:].parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        for optimizer in self.optimizers(use_pl_optimizer=not self.raw):

            def closure(optimizer=optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                # Raw is raw: no hook of Lightning's runs between the gradients and the step.
                loss.backward() if self.raw else self.manual_backward(loss)
                return loss

            if self.closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_several_optimizers_and_manual_optimization(raw, closure) -> None:
    torch.manual_seed(1)
    inspector = inspected_fit(model=Manual(raw=raw, closure=closure))
    assert (
        inspector.momenta == 2 * inspector.weights - inspector.weights // 2
    )  # 1 of SGD, 2 of Adam


class NewOptimizer(L.Callback):
    """Puts another optimizer in the place of the first, in the middle of the fit."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            self.made = torch.optim.Adam(pl_module.parameters(), lr=0.01)
            trainer.strategy.optimizers = [self.made]


class SecondStep(torch.optim.SGD):
    """Steps an optimizer inside of it and not itself, as the second half of SAM."""

    def second_step(self) -> None:
        self.inner.step()


@pytest.mark.parametrize("known_to_lightning", [True, False])
def test_steps_past_lightnings_optimizers(known_to_lightning) -> None:
    class PastThem(Digits):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            self.own = SecondStep(self.parameters(), 0.1, momentum=0.9)
            self.own.inner = torch.optim.SGD(self.own.param_groups, 0.1, momentum=0.9)
            return self.own if known_to_lightning else None

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.own.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.own.second_step()

    pruner, model = SaliencyPruningCallback(SCHEDULE), PastThem()
    with warnings.catch_warnings():  # of Lightning's: no optimizer
        warnings.simplefilter("ignore")
        fit(pruner, Witness(pruner), model=model)
    assert zeros(model) == round(0.8 * TOTAL)


def test_an_optimizer_created_during_fit() -> None:
    other = NewOptimizer()
    model = make_model()
    inspected_fit(other, model=model)
    assert all(moments(other.made, model.get_parameter(name)) for name in WEIGHTS)
    assert not other.made._optimizer_step_post_hooks


class Finetuned(Digits):
    @property
    def backbone(self) -> nn.Module:
        return self.net[0]

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=0.1, momentum=0.9)


def test_layers_that_are_unfrozen_during_fit() -> None:
    torch.manual_seed(1)
    model = Finetuned()
    at_first = model.net[0].weight.detach().clone()
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01)
    inspector = inspected_fit(tuning, model=model)
    assert inspector.momenta == 5 * 3 + 5 * 2  # the last layer's, then the backbone's as well
    kept = model.net[0].weight.detach() != 0
    assert (model.net[0].weight.detach() != at_first)[kept].any()


# ---------------------------------------------------------------------- how a step is made


def test_gradient_accumulation() -> None:
    model = make_model()
    inspector = inspected_fit(model=model, accumulate_grad_batches=3)
    assert inspector.momenta == inspector.weights


class Clipped(Digits):
    """Looks at the gradients after they were clipped, before the step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.seen.append({n: p.grad.clone() for n, p in self.named_parameters()})


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_of_masked_weights_do_not_count_in_clipping(algorithm) -> None:
    torch.manual_seed(1)
    model = Clipped()
    pruner = SaliencyPruningCallback({0: 0.8})
    fit(
        pruner,
        Inspector(pruner),
        model=model,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
    )
    with_masks = model.seen[5:]
    assert len(with_masks) == 10
    for gradients in with_masks:
        for name, mask in pruner.masks.items():
            assert gradients[name][~mask].eq(0).all()
        kept = torch.cat([g.flatten() for g in gradients.values()])
        size = kept.norm() if algorithm == "norm" else kept.abs().max()
        assert size.item() == pytest.approx(1e-3, rel=2e-3)  # all of it is of the kept ones


def test_clipping_in_manual_optimization() -> None:
    class ManuallyClipped(Clipped):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.configure_gradient_clipping(optimizer, 1e-3, "norm")
            optimizer.step()

    torch.manual_seed(1)
    model = ManuallyClipped()
    model.automatic_optimization = False
    fit(SaliencyPruningCallback({0: 0.8}), model=model)
    for gradients in model.seen[5:]:
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        assert norm == pytest.approx(1e-3, rel=2e-3)
        zero = sum(int((gradients[name] == 0).sum()) for name in WEIGHTS)
        assert zero >= round(0.8 * TOTAL)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw-fused"])
def test_bf16_mixed(kind) -> None:
    model = make_model(optimizer=OPTIMIZERS[kind])
    assert inspected_fit(model=model, precision="bf16-mixed").momenta > 0


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_16_mixed_with_a_gradient_scaler(kind) -> None:
    # precision="16-mixed" is turned into bf16 on a CPU by Lightning; the plugin itself is not.
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    model = make_model(optimizer=OPTIMIZERS[kind])
    assert inspected_fit(model=model, plugins=[plugin]).momenta > 0
    assert scaler.get_scale() == 256.0  # it was in use, and no step was skipped


def test_a_compiled_module() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    assert inspected_fit(model=model, fitted=compiled).momenta > 0
    assert list(model.state_dict()) == list(make_model().state_dict())


# ---------------------------------------------------------------------- averaged weights


def averaging(kind: str) -> L.Callback:
    if kind == "mean":
        return WeightAveraging()
    if kind == "ema":
        return EMAWeightAveraging(decay=0.9)
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)


def sparse_to(state: dict[str, Tensor]) -> int:
    return sum(int((state[name] == 0).sum()) for name in WEIGHTS)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["mean", "ema", "swa"])
def test_averages_and_their_checkpoints_are_sparse(kind, first, tmp_path) -> None:
    average, pruner, model = averaging(kind), SaliencyPruningCallback(SCHEDULE), make_model()
    inspector = Inspector(pruner)
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    order = [average, pruner] if first else [pruner, average]
    fit(*order, inspector, saved, model=model, max_epochs=4, enable_checkpointing=True)
    assert zeros(model) == round(0.8 * TOTAL)
    assert inspector.averages == inspector.weights >= 30
    for epoch, share in {0: 0.0, 1: 0.5, 2: 0.8, 3: 0.8}.items():
        checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert sparse_to(checkpoint["state_dict"]) == round(share * TOTAL), epoch
        if kind != "swa":
            assert sparse_to(checkpoint["current_model_state"]) == round(share * TOTAL), epoch


@pytest.mark.parametrize("kind", ["mean", "ema", "swa"])
def test_an_event_after_the_last_epoch(kind) -> None:
    model, pruner = make_model(), SaliencyPruningCallback({2: 0.6})
    fit(averaging(kind), pruner, model=model, max_epochs=3)
    assert pruner.history[-1]["epoch"] == 2
    assert zeros(model) == round(0.6 * TOTAL)


@pytest.mark.parametrize("kind", ["mean", "ema", "swa"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_averages_stay_sparse_in_a_resumed_run(kind, tmp_path) -> None:
    def parts():
        pruner = SaliencyPruningCallback(SCHEDULE)
        saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        return [averaging(kind), pruner, Inspector(pruner), saved]

    whole = fit(*parts(), max_epochs=4, enable_checkpointing=True)
    resumed, model = parts(), make_model()
    trainer(*resumed, max_epochs=4, enable_checkpointing=True).fit(
        model, *loaders(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True
    )
    assert resumed[2].averages >= 2 * 5 * 2
    assert zeros(model) == round(0.8 * TOTAL)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_scores_are_those_of_the_weights_that_were_validated() -> None:
    class Validated(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            self.state = {n: t.detach().clone() for n, t in pl_module.state_dict().items()}

        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.in_training = pl_module.net[0].weight.detach().clone()

    validated, averaged = Validated(), make_model()
    pruner = SaliencyPruningCallback({1: 0.5}, criterion="saliency", tolerance=0.0)
    fit(WeightAveraging(), validated, pruner, max_epochs=2)
    averaged.load_state_dict(validated.state)
    assert not torch.equal(averaged.net[0].weight, validated.in_training)  # or nothing is shown
    expected = squared_gradients(averaged.eval(), loaders()[1], parameters=WEIGHTS)
    for name in WEIGHTS:
        torch.testing.assert_close(pruner.scores[name], expected[name])


def test_only_masked_weights_of_an_average_are_touched() -> None:
    machine = trainer(EMAWeightAveraging(decay=0.9), max_epochs=1)
    machine.fit(make_model(), *loaders())
    (copy,) = averaged_copies(machine)
    before = {name: p.detach().clone() for name, p in copy.named_parameters()}
    masks = {name: torch.rand(before[name].shape) < 0.5 for name in WEIGHTS}
    assert mask_averages(machine, masks) == 1
    for name, parameter in copy.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter).bool())
        assert_zero(parameter, mask)
        assert torch.equal(parameter[mask], before[name][mask])
        assert before[name][~mask].ne(0).all()


def test_averages_of_other_callbacks_are_found_and_parts_left_alone() -> None:
    class Own(L.Callback):
        def __init__(self, model: nn.Module) -> None:
            self.whole = AveragedModel(model)
            self.part = AveragedModel(model.net[0])

    model = make_model()
    own = Own(model)
    machine = trainer(own)
    mask = torch.rand(24, 64) < 0.5
    assert mask_averages(machine, {"net.0.weight": mask}) == 1
    assert_zero(own.whole.module.net[0].weight, mask)
    assert own.part.module.weight.detach()[~mask].ne(0).all()
