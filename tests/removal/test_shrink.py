"""What a model is besides its function: flags, modes, dtypes, a caller's contexts, errors."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune.removal import RemovalError, shrink, shrink_with_report
from tests.cases import Scaled
from tests.removal.shrink_cases import Mapped, made, scattered


def pruned_mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[5].weight[:, 2:] = 0
    return model


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def same(a: nn.Module, b: nn.Module, x: Any = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(a).eval()(x), copy.deepcopy(b).eval()(x))


def test_the_original_is_left_as_it_was() -> None:
    model = pruned_mlp()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model(X).sum().backward()
    model[2].register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    shrink(model, example_inputs=X, masks=scattered(model, 0.5))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for old, parameter in zip(grads, model.parameters(), strict=True):
        assert (old is None) == (parameter.grad is None)
        assert old is None or torch.equal(old, parameter.grad)


def test_the_random_state_is_left_as_it_was() -> None:
    model = pruned_mlp()
    before = torch.get_rng_state()
    shrink(model, example_inputs=X)
    assert torch.equal(before, torch.get_rng_state())


def test_modes_flags_and_statistics_follow() -> None:
    model = pruned_mlp()
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    model[1].eval()
    small = shrink(model, example_inputs=X)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert all(p.grad is None for p in small.parameters())
    assert (small[0].out_features, small[1].num_features, small[3].in_features) == (5, 5, 5)
    assert torch.equal(small[1].running_var, model[1].running_var[3:])
    assert small[1].num_batches_tracked == model[1].num_batches_tracked
    same(model, small)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
)
def test_the_caller_may_have_gradients_off(context: Any) -> None:
    with context():
        model = pruned_mlp()
        small = shrink(model, example_inputs=torch.randn(5, 4))
    assert small[0].out_features == 5
    assert not any(p.is_inference() for p in small.parameters())
    assert all(p.dtype == torch.float32 for p in small.parameters())


def test_frozen_layers_are_cut_too() -> None:
    model = pruned_mlp().requires_grad_(False)
    small = shrink(model, example_inputs=X)
    assert small[0].out_features == 5
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model = pruned_mlp().to(dtype)
    small = shrink(model, example_inputs=X.to(dtype))
    assert small[0].out_features == 5
    floats = [t for t in small.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {dtype}


def test_a_forward_that_wants_float32_is_compared_in_float32() -> None:
    model = Mapped({"net": pruned_mlp()}, lambda m, x: m.net(x.float()))
    small, report = shrink_with_report(model, example_inputs=X)
    assert not report.exact
    assert small.net[0].out_features == 5
    same(model, small)


def test_it_trains_on() -> None:
    model = pruned_mlp()
    small, report = shrink_with_report(model, example_inputs=X)
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in small.named_parameters() if p.dim() > 1}
    F.cross_entropy(small(X), torch.tensor([0, 1, 0, 1, 0])).backward()
    optimizer.step()
    assert all(not torch.equal(old, small.get_parameter(name)) for name, old in before.items())
    momentum = torch.arange(32.0).view(8, 4)
    assert torch.equal(report.take("0.weight", momentum), momentum[3:])
    assert torch.equal(report.take("5.bias", momentum), momentum)


def test_hooks_and_own_weights_keep_a_layer_whole() -> None:
    for spoil, why in (
        (lambda m: m[3].register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: parametrizations.weight_norm(m[3]), "computed from other parameters"),
    ):
        model = pruned_mlp()
        spoil(model)
        _, report = shrink_with_report(model, example_inputs=X)
        assert why in report.whole["3"]
    model = pruned_mlp()
    model[0] = Scaled(4, 8)
    with torch.no_grad():
        model[0].weight[:3] = 0  # its zeros are no zeros
    small, report = shrink_with_report(model, example_inputs=X)
    assert "forward of its own" in report.whole["0"]
    same(model, small)


def test_a_hidden_layer_that_is_an_output_is_not_cut() -> None:
    def how(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.a(x)
        return hidden, m.b(hidden)

    model = Mapped({"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)}, how)
    with torch.no_grad():
        model.b.weight[:, :3] = 0
        model.a.weight[:2] = 0
    _, report = shrink_with_report(model, example_inputs=X)
    assert report.parameters_after == report.parameters_before
    assert report.whole["a"] == "its units are outputs of the model"


def test_what_is_read_behind_autograds_back_keeps_a_layer_whole() -> None:
    model = Mapped(
        {"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)},
        lambda m, x: m.b(h := m.a(x).relu()) * h.detach().mean(1, keepdim=True),
    )
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    small, report = shrink_with_report(model, example_inputs=X)
    assert "not the same" in report.whole["a"]
    same(model, small)


class Gate(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "number" and x.mean():
            return x * 2
        if self.kind == "item":
            return x * x.sum().item()
        while self.kind == "loop" and x.abs().max() > 1.0:
            x = x / 2
        if self.kind == "harmless" and (x == 0.125).all():
            return x + 0.5
        if self.kind == "fails" and x.isnan().any():
            raise ValueError("not a number")
        if self.kind == "nan" and (x < 0).any():
            return x / 0.0 * 0.0
        if self.kind == "infinite" and (x < 0).any():
            return x + float("inf")
        if self.kind == "state":
            self.calls = getattr(self, "calls", 0) + 1
            return x * self.calls
        if self.kind == "random elsewhere" and (x < 0).any():
            return F.dropout(x, 0.5, training=True)
        return F.dropout(x, 0.5, training=True) if self.kind == "random" else x


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("number", r"'2' \(Gate\) reads a number"),
        ("item", r"'2' \(Gate\) reads a number"),
        ("loop", r"at most 8 ways, but '2' \(Gate\) asks"),
        ("fails", r"'2' \(Gate\) asks its tensors .* fails: ValueError: not a number"),
        ("nan", r"'2' \(Gate\) asks its tensors .* fails: it returns NaN"),
        ("infinite", r"'2' \(Gate\) asks its tensors .* fails: it returns NaN, or nothing finite"),
        ("random", "draws random numbers"),
        ("random elsewhere", "draws random numbers"),
        ("state", "keeps a state"),
    ],
)
def test_a_forward_that_depends_on_the_data_is_refused(kind: str, why: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Gate(kind), nn.Linear(6, 2))
    with pytest.raises(RemovalError, match=why):
        shrink(model, example_inputs=X)


def test_a_loop_that_another_answer_would_make_endless_is_refused() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            steps = torch.zeros(())
            while steps != 2.0:
                steps = steps + 1
            return x * steps

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Counting(), nn.Linear(6, 2))
    with pytest.raises(RemovalError, match=r"at most 8 ways, but '2' \(Counting\) asks"):
        shrink(model, example_inputs=X)


def test_the_module_whose_answer_was_another_is_named() -> None:
    parts = [nn.Linear(4, 6), Gate("harmless"), nn.ReLU(), Gate("fails"), nn.Linear(6, 2)]
    with pytest.raises(RemovalError, match=r"'3' \(Gate\) asks"):
        shrink(nn.Sequential(*parts), example_inputs=X)


def test_a_model_that_keeps_what_it_computed() -> None:
    class Keeping(Gate):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = x
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Keeping("harmless"), nn.Linear(6, 2))
    nn.init.zeros_(model[3].weight[:, :3])
    assert shrink(model, example_inputs=X)[0].out_features == 3


@pytest.mark.parametrize("ones", [True, False])
def test_what_another_way_may_mix_is_not_cut(ones: bool) -> None:
    """Which hidden unit is the largest cannot be proved by any number of samples."""

    def largest(m: Any, x: Tensor, weights: Tensor) -> Tensor:
        hidden = m.a(x).relu()
        if (weights == 1).all():
            return m.b(hidden)
        return m.b(hidden) * hidden.amax(1, keepdim=True)

    model = Mapped({"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)}, largest)
    with torch.no_grad():
        model.b.weight[:, :3] = 0
        model.a.bias[:3], model.a.bias[3:] = 0.0, 100.0  # never the largest here
    weights = torch.ones(5, 1) if ones else torch.arange(5.0)[:, None]
    small, report = shrink_with_report(model, example_inputs=(X, weights))
    assert small.a.out_features == 6
    assert "may mix channels (AmaxBackward0)" in report.whole["a"]


def asking(m: Any, x: Tensor, weights: Tensor) -> Tensor:
    """Take the short way where all weights are 1, as models with a padding mask do."""
    hidden = m.a(x).relu()
    if (weights == 1).all():
        return m.b(hidden)
    hidden = m.c(hidden).relu() if "c" in m._modules else hidden
    return m.b(hidden) * (weights > 0).any() * weights


@pytest.mark.parametrize("ones", [True, False])
def test_all_ways_that_a_forward_takes_by_asking_are_proved(ones: bool) -> None:
    model = Mapped({"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)}, asking)
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    weights = torch.ones(5, 1) if ones else torch.arange(5.0)[:, None]
    small = shrink(model, example_inputs=(X, weights))
    assert small.a.out_features == 3
    for some in (torch.ones(5, 1), torch.arange(5.0)[:, None], torch.zeros(5, 1)):
        torch.testing.assert_close(small(X, some), model(X, some), rtol=1e-5, atol=1e-6)


def test_a_way_that_the_example_does_not_take_leaves_nothing_behind() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if (x > 100.0).any():
                self.scale = self.scale * 2
            return x * self.scale

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Remembers(), nn.Linear(6, 2))
    nn.init.zeros_(model[3].weight[:, :3])
    small, report = shrink_with_report(model, example_inputs=X)
    assert report.parameters_after < report.parameters_before
    assert model[2].scale == small[2].scale == 1.0
    same(model, small)


@pytest.mark.parametrize("ones", [True, False])
def test_what_another_way_needs_is_not_cut(ones: bool) -> None:
    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 2), "c": nn.Linear(6, 6)}
    model = Mapped(parts, asking)
    with torch.no_grad():
        model.b.weight[:, :3] = 0  # what the long way reads by c all the same
    weights = torch.ones(5, 1) if ones else torch.arange(5.0)[:, None]
    small, _ = shrink_with_report(model, example_inputs=(X, weights))
    assert small.a.out_features == 6
    for some in (torch.ones(5, 1), torch.arange(5.0)[:, None]):
        torch.testing.assert_close(small(X, some), model(X, some), rtol=1e-5, atol=1e-6)


def test_a_way_that_another_input_takes_is_named() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if x.detach().numpy().max() > 2.0 else F.elu(x)

    model = nn.Sequential(Hidden(), nn.Linear(4, 6), nn.Linear(6, 2))
    with pytest.raises(RemovalError, match=r"'0' \(Hidden\) took another way"):
        shrink(model, example_inputs=X * 0.5)


def test_inputs_of_any_form() -> None:
    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)}
    nn.init.zeros_(parts["b"].weight[:, :3])
    model = Mapped(parts, lambda m, x, scale=1.0: m.b(m.a(x).relu()) * scale)
    for inputs in (X, (X,), [X, torch.ones(5, 1)], {"x": X, "scale": torch.ones(5, 1)}, (X, 2.0)):
        assert shrink(model, example_inputs=inputs).a.out_features == 3
    batch = {"pixels": X, "labels": torch.zeros(5)}
    small = shrink(model, example_inputs=batch, forward=lambda m, b: m(b["pixels"]))
    assert small.a.out_features == 3


def test_wrong_arguments_are_named() -> None:
    model = pruned_mlp()
    with pytest.raises(ValueError, match="round_to"):
        shrink(model, example_inputs=X, round_to=0)
    masks = {"nothing": torch.ones(1, dtype=torch.bool), "0.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"nothing(.|\n)*0\.weight"):
        shrink(model, example_inputs=X, masks=masks)
    with pytest.raises(RemovalError, match="return tensors"):
        shrink(Mapped({"a": nn.Linear(4, 2)}, lambda m, x: "text"), example_inputs=X)


def test_nothing_removed_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.warns(UserWarning, match="Nothing was removed"):
        small = shrink(model, example_inputs=X)
    assert small is not model


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_a_lightning_module_stays_one() -> None:
    torch.manual_seed(0)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 128, num_workers=0)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    model = Digits()
    trainer = L.Trainer(max_epochs=3, **quiet)
    trainer.fit(model, loader)
    scores = model.net[0].weight.abs().sum(1)
    kept = scores > scores.median()
    masks = {
        "net.0.weight": kept[:, None].expand(48, 64),
        "net.1.weight": kept,
        "net.1.bias": kept,
    }
    small = shrink(model, example_inputs=x[:16], masks=masks)
    assert isinstance(small, Digits)
    assert small._trainer is None
    assert model.trainer is not None
    assert small.net[0].out_features == int(kept.sum())
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    results = [L.Trainer(**quiet).test(m, loader, verbose=False)[0] for m in (model, small)]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=1e-3)
    L.Trainer(max_epochs=1, **quiet).fit(small, loader)  # and it trains on


def test_a_sparse_network_of_real_digits_answers_the_same() -> None:
    torch.manual_seed(0)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
    model.append(nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    bar = torch.cat([p.detach().abs().flatten() for p in weights.values()]).quantile(0.98)
    masks = {name: p.detach().abs() > bar for name, p in weights.items()}
    small, report = shrink_with_report(model, example_inputs=x[:8], masks=masks)
    with torch.no_grad():
        for name, p in weights.items():
            p.mul_(masks[name])
        want, got = model(x), small(x)
    torch.testing.assert_close(got, want)
    assert torch.equal(got.argmax(1), want.argmax(1))
    assert report.parameters_after < 0.5 * report.parameters_before


def test_the_report_says_what_fell_and_what_did_not() -> None:
    model, inputs = made("transformer", 0)
    _, report = shrink_with_report(model, example_inputs=inputs, masks=scattered(model, 0.95))
    text = str(report)
    for part in (
        "layer.linear1: 32 ->",
        "layer.self_attn: 2 -> 1 heads",
        "kept whole, its units are outputs of the model: head",
        "a LayerNorm is not cut: layer.linear2, into",
        "rounds",
        "parameters",
    ):
        assert part in text


class Beside(nn.Module):
    """A feature map and what a pooling or a flattening makes of it, side by side."""

    def __init__(self, flattened_first: bool) -> None:
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36 + 4, 6)
        self.head, self.flattened_first = nn.Linear(6, 5), flattened_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        parts = [y.flatten(1), y.mean((2, 3))]
        parts = parts if self.flattened_first else parts[::-1]
        return self.head(self.hidden(torch.cat(parts, 1)).relu())


class Unshuffled(nn.Module):
    """Channels made of positions, behind an operation that mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.LocalResponseNorm(2)
        self.fold, self.head = nn.PixelUnshuffle(2), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fold(self.norm(self.conv(x)))).mean((2, 3))


@pytest.mark.parametrize("build", [lambda: Beside(True), lambda: Beside(False), Unshuffled])
def test_a_coupling_that_has_no_end_is_kept_whole(build) -> None:
    """torch-pruning followed these for ever, with lists that filled the memory."""
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.conv.weight[1] = 0
        if isinstance(model, Beside):
            model.head.weight[:, 2] = 0
    small, report = shrink_with_report(model, example_inputs=x)
    assert "conv" in report.whole
    torch.testing.assert_close(small.eval()(x), model.eval()(x))
    if isinstance(model, Beside):  # the others are cut all the same
        assert small.hidden.out_features == 5


@pytest.mark.parametrize("dims", [2, 3])
def test_the_memory_format_stays(dims: int) -> None:
    kind, last = ((nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d))[dims - 2]
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 4, 3), nn.Flatten()).eval()
    model = model.to(memory_format=last)
    with torch.no_grad():
        model[0].weight[:3] = 0
    x = torch.randn(2, 3, *[6] * dims)
    small = shrink(model, example_inputs=x)
    assert small[0].weight.shape[0] == 5
    for layer in (small[0], small[2]):
        assert layer.weight.is_contiguous(memory_format=last)
        assert not layer.weight.is_contiguous()
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_module_is_refused() -> None:
    with pytest.raises(RemovalError, match="got a ScriptModule"):
        shrink(torch.jit.trace(pruned_mlp().eval(), X), example_inputs=X)
