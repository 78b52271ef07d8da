"""The refit, layer by layer: what it gives, what it leaves alone, and what it never does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune._types import Masks
from lightning_prune.passes.batches import default_forward
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import layers as layers_module
from lightning_prune.refit import layerwise
from lightning_prune.refit.borrowing import borrowed
from lightning_prune.refit.calibration import Calibration, hold_out
from lightning_prune.refit.layerwise import refit_layers
from tests.cases import Functional, Lambda, Residual, Scaled, Tied, Transformer, Twice


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().div(16)[:, None]
    return images[order], torch.from_numpy(data.target).long()[order]


def network(kind: str = "mlp") -> nn.Sequential:
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


@pytest.fixture(scope="module", params=["mlp", "conv"])
def trained(request: pytest.FixtureRequest) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network(request.param)
        x, y = digits()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(8):
            for index in torch.randperm(1200).split(60):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
        optimizer.zero_grad()
    return model


def prune(model: nn.Module, share: float, names: list[str] | None = None) -> Masks:
    """Remove the smallest weights of each matrix or kernel."""
    masks = {}
    for name, p in model.named_parameters():
        if p.ndim > 1 and (names is None or name in names):
            limit = p.detach().abs().flatten().kthvalue(max(1, int(share * p.numel()))).values
            masks[name] = p.detach().abs() > limit
            p.data.mul_(masks[name])
    return masks


def features(n: int, k: int) -> Tensor:
    """Return inputs that can stand in for one another, as those of real data can."""
    return torch.randn(n, max(1, k // 2)) @ torch.randn(max(1, k // 2), k) + 0.1 * torch.randn(n, k)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    for name, value in model.state_dict().items():
        if name not in but:
            assert torch.equal(value, before[name]), name


def prepared(
    model: nn.Module, x: Tensor, share: float = 0.5, names: list[str] | None = None
) -> tuple[Masks, Calibration]:
    dense = Teacher.of(model)
    fit, held_out = hold_out(list(x.split(64)))
    return prune(model, share, names), Calibration(dense, fit, held_out)


def accuracy(model: nn.Module, part: slice = slice(1200, None)) -> float:
    x, y = digits()
    model.eval()
    with torch.no_grad():
        return float((model(x[part]).argmax(1) == y[part]).float().mean())


def columns_of(module: nn.Module, x: Tensor) -> Tensor:
    """Unfold one group by torch's own unfold, (M, K + 1)."""
    if isinstance(module, nn.Linear):
        a = x.flatten(0, -2)
    else:
        a = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
        a = a.transpose(1, 2).flatten(0, 1)
    return a if module.bias is None else torch.cat([a, torch.ones(len(a), 1).to(a)], 1)


def slow_refit(
    model: nn.Sequential, dense: nn.Sequential, masks: Masks, x: Tensor, ridge: float | None = None
) -> None:
    """Refit the plain way: layer after layer, group after group, row after row, by lstsq."""
    for i, module in enumerate(model):
        mask = masks.get(f"{i}.weight")
        if mask is None:
            continue
        inputs, targets = model[:i](x).detach(), dense[: i + 1](x).detach()
        targets = targets.movedim(1, -1).flatten(0, -2) if targets.ndim == 4 else targets
        groups = getattr(module, "groups", 1)
        for g, part in enumerate(inputs.chunk(groups, 1)):
            a = columns_of(module, part).double()
            share = max(1e-3, 3 / len(a)) if ridge is None else ridge
            pull = share * float((a.T @ a).diagonal().mean())
            for r in torch.arange(len(mask)).chunk(groups)[g].tolist():
                keep = mask[r].flatten()
                now = module.weight.data[r].flatten().double()
                if module.bias is not None:
                    keep = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
                    now = torch.cat([now, module.bias.data[r : r + 1].double()])
                s = keep.nonzero()[:, 0]
                left = torch.cat([a[:, s], pull**0.5 * torch.eye(len(s)).double()])
                right = torch.cat([targets[:, r].double(), pull**0.5 * now[s]])
                row = torch.zeros_like(now)
                row[s] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
                size = mask[r].numel()
                module.weight.data[r] = row[:size].reshape(mask[r].shape)
                if module.bias is not None:
                    module.bias.data[r] = row[size]


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_all_layers_are_those_of_the_slow_twin(trained: nn.Sequential, share: float) -> None:
    dense = copy.deepcopy(trained).double().eval()
    model = copy.deepcopy(dense)
    x = digits()[0][:300].double()
    masks, calibration = prepared(model, x, share)
    twin = copy.deepcopy(model)
    report = refit_layers(model, masks, calibration)
    assert report.refitted == list(masks)
    assert report.left == {}
    slow_refit(twin, dense, masks, torch.cat(calibration.batches))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_comes_back_and_removed_weights_stay_zero(
    trained: nn.Sequential, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(trained).to(dtype)
    masks, calibration = prepared(model, digits()[0][:1200].to(dtype), 0.85)
    before = accuracy(model.float())
    refit_layers(model.to(dtype), masks, calibration)
    assert all(bool((model.get_parameter(n)[~mask] == 0).all()) for n, mask in masks.items())
    assert all(p.dtype == dtype for p in model.parameters())
    assert accuracy(model.float()) > before + 0.03


def test_results_repeat_exactly_and_batches_do_not_matter(trained: nn.Sequential) -> None:
    found = []
    for size in (64, 64, 17):
        model = copy.deepcopy(trained).double()
        dense = Teacher.of(model)
        masks = prune(model, 0.7)
        fit = list(digits()[0][:300].double().split(size))
        refit_layers(model, masks, Calibration(dense, fit, []))
        found.append(state(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[2][name], rtol=1e-9, atol=1e-11)


def test_each_layer_is_fitted_on_what_the_refitted_ones_before_it_feed_it(
    trained: nn.Sequential,
) -> None:
    # Fitted on the dense network's inputs instead, the last layer answers for inputs it never gets.
    x = digits()[0][:600]
    model = copy.deepcopy(trained).eval()
    dense = copy.deepcopy(model)
    masks, calibration = prepared(model, x, 0.8)
    last = f"{len(model) - 1}.weight"
    start = copy.deepcopy(model)
    refit_layers(model, masks, calibration)
    other = copy.deepcopy(dense)
    other[-1].load_state_dict(start[-1].state_dict())
    refit_layers(other, {last: masks[last]}, calibration)
    mixed = copy.deepcopy(model)
    mixed[-1].load_state_dict(other[-1].state_dict())
    test = digits()[0][1200:]
    with torch.no_grad():
        errors = [float((net(test) - dense(test)).square().mean()) for net in (model, mixed, start)]
    assert errors[0] < 0.9 * errors[1]
    assert errors[0] < 0.5 * errors[2]


def test_fewer_samples_than_survivors_and_collinear_inputs_stay_finite_and_no_worse(
    trained: nn.Sequential,
) -> None:
    x = digits()[0]
    for few in (x[:10], x[:1].repeat(50, 1, 1, 1), torch.zeros(10, 1, 8, 8)):
        model = copy.deepcopy(trained)
        dense = copy.deepcopy(model).eval()
        masks, calibration = prepared(model, few, 0.5)
        calibration = Calibration(calibration.dense, [few], [x[1200:]])
        before = copy.deepcopy(model).eval()
        refit_layers(model, masks, calibration)
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        # the first layer's own error on the samples checked on has not risen
        with torch.no_grad():
            after, then, target = (net[:2](x[1200:]) for net in (model.eval(), before, dense))
        assert float((after - target).square().sum()) <= float((then - target).square().sum())


def test_a_layer_that_gets_worse_on_held_out_samples_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(20, 4), nn.Linear(4, 3))
    dense = Teacher.of(model)
    masks = prune(model, 0.5)
    before = state(model)
    far, near = torch.randn(8, 20), torch.randn(200, 20) + 5
    report = refit_layers(model, masks, Calibration(dense, [far], [near]), ridge=1e-6)
    assert "0.weight" in report.left
    assert "no better on the samples checked on" in report.left["0.weight"]
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])
    report = refit_layers(model, masks, Calibration(dense, [near], [near]), ridge=1e-6)
    assert report.refitted == ["0.weight", "1.weight"]


def test_nothing_removed_is_nothing_to_correct(trained: nn.Sequential) -> None:
    model = copy.deepcopy(trained)
    masks, calibration = prepared(model, digits()[0][:100])
    masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    model.load_state_dict(calibration.dense.weights)
    before = state(model)
    report = refit_layers(model, masks, calibration)
    assert report.refitted == []
    assert_same(model, before)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dead_layer_keeps_its_bias_only(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(50, 6).double()
    dense, z = Teacher.of(model), model[0](x).detach()
    masks = {"0.weight": torch.zeros(4, 6, dtype=torch.bool), "2.weight": torch.rand(3, 4) < 0.5}
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    report = refit_layers(model, masks, Calibration(dense, [x], []), ridge=1e-12)
    assert bool((model[0].weight == 0).all())
    if bias:
        torch.testing.assert_close(model[0].bias.data, z.mean(0))
        assert report.refitted == ["0.weight", "2.weight"]
    else:
        assert report.left["0.weight"] == "nothing of its layer is left"


def test_a_pruned_bias_stays_pruned() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x = features(50, 6)
    masks, calibration = prepared(model, x, names=["0.weight"])
    masks["0.bias"] = torch.tensor([True, False, True, False])
    masks["2.bias"] = torch.tensor([True, False, True])
    model[0].bias.data.mul_(masks["0.bias"])
    report = refit_layers(model, masks, calibration)
    assert bool((model[0].bias[1::2] == 0).all())
    assert bool((model[0].bias[::2] != 0).all())
    assert report.refitted == ["0.weight", "0.bias"]
    assert report.left == {"2.bias": "a bias: corrected only along with a pruned weight"}


class TwiceInPlace(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh_()).relu_())


@pytest.mark.parametrize("kind", [Twice, TwiceInPlace])
def test_a_module_called_twice_is_fitted_to_both_calls(kind: type[Twice]) -> None:
    model = kind().double()
    x = features(80, 5).double()
    dense = copy.deepcopy(model)
    masks, calibration = prepared(model, x, names=["shared.weight"])
    calibration = Calibration(calibration.dense, list(x.split(30)), [])
    before = copy.deepcopy(model)
    refit_layers(model, masks, calibration, ridge=1e-3)
    a = torch.cat([x, before.shared(x).tanh()]).detach()
    z = torch.cat([dense.shared(x), dense.shared(dense.shared(x).tanh())]).detach()
    a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
    pull = 1e-3 * float((a.T @ a).diagonal().mean())
    for r in range(5):
        s = torch.cat([masks["shared.weight"][r].nonzero()[:, 0], torch.tensor([5])])
        now = torch.cat([before.shared.weight[r], before.shared.bias[r : r + 1]]).detach()[s]
        left = torch.cat([a[:, s], pull**0.5 * torch.eye(len(s)).double()])
        right = torch.cat([z[:, r], pull**0.5 * now])
        expected = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        found = torch.cat([model.shared.weight[r], model.shared.bias[r : r + 1]]).detach()[s]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


class Borrowing(nn.Module):
    """Uses a layer's weight outside of the layer's forward as well."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x), self.encoder.weight.t())


LEFT: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str]]] = {
    "tied": (Tied, torch.randint(0, 9, (30, 4)), {"table.weight": "tied"}),
    "own forward": (lambda: Scaled(4, 4), torch.randn(30, 4), {"weight": "is not its inputs"}),
    "borrowed": (Borrowing, torch.randn(30, 6), {"encoder.weight": "outside of its forward"}),
    "no layer": (Functional, torch.randn(30, 5), {"w": "no linear layer"}),
    "parametrised": (
        lambda: parametrizations.weight_norm(nn.Linear(5, 3)),
        torch.randn(30, 5),
        {"parametrizations.weight.original1": "no linear layer"},
    ),
    "transposed": (
        lambda: nn.ConvTranspose1d(3, 4, 3),
        torch.randn(30, 3, 5),
        {"weight": "no linear layer"},
    ),
    "transformer": (
        Transformer,
        torch.randint(1, 20, (30, 5)),
        {
            "table.weight": "part of a Embedding",
            "encoder.layers.0.self_attn.in_proj_weight": "part of a MultiheadAttention",
            "encoder.layers.0.self_attn.out_proj.weight": "outside of its forward",
        },
    ),
    "never called": (
        lambda: nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]),
        torch.randn(30, 3),
        {"1.weight": "not called"},
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_least_squares_cannot_read_is_left_with_a_reason(kind: str) -> None:
    make, x, expected = LEFT[kind]
    model = make()
    if kind == "transformer":
        model = model.float()
    dense = Teacher.of(model)
    masks = prune(model, 0.4)
    before = state(model)
    forward = (lambda m, b: m[0](b)) if kind == "never called" else default_forward
    report = refit_layers(model, masks, Calibration(dense, [x], [], forward=forward))
    assert set(report.refitted) | set(report.left) == set(masks)
    for name, reason in expected.items():
        assert reason in report.left[name]
    changed = {
        n.removesuffix("weight") + leaf for n in report.refitted for leaf in ("weight", "bias")
    }
    assert_same(model, before, tuple(changed))


def test_the_layers_of_a_transformer_that_can_be_read_are_refitted() -> None:
    model = Transformer().float()
    masks, calibration = prepared(model, torch.randint(1, 20, (120, 5)))
    report = refit_layers(model, masks, calibration)
    assert "encoder.layers.0.linear1.weight" in report.refitted
    assert "encoder.layers.1.linear2.weight" in report.refitted


def test_residual_branches_frozen_weights_and_keyword_calls_are_refitted() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = nn.Sequential(Residual(nn.Linear(8, 8), nn.ReLU(inplace=True)), Keywords())
    model.requires_grad_(False)
    masks, calibration = prepared(model, features(200, 8))
    assert len(refit_layers(model, masks, calibration).refitted) == 2
    assert not any(p.requires_grad for p in model.parameters())


def test_the_model_is_left_as_it_was(trained: nn.Sequential) -> None:
    model = copy.deepcopy(trained).train()
    model[1].eval()
    model.append(nn.Dropout(0.5))
    noisy = nn.Sequential(model, Lambda(lambda z: F.dropout(z, 0.1, training=True)))
    masks, calibration = prepared(noisy, digits()[0][:200], 0.8)
    for p in noisy.parameters():
        p.grad = torch.ones_like(p)
    modes = [m.training for m in noisy.modules()]
    buffers = {name: b.clone() for name, b in noisy.named_buffers()}
    random = torch.get_rng_state()
    with torch.inference_mode():
        report = refit_layers(noisy, masks, calibration)
    assert report.refitted
    assert [m.training for m in noisy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(b, buffers[name]) for name, b in noisy.named_buffers())
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in noisy.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in noisy.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_is_raised_nothing_is_half_applied(
    trained: nn.Sequential, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(trained)
    masks, calibration = prepared(model, digits()[0][:200], 0.8)
    before, solve, written = state(model), layerwise._write, []

    def write(layer: Any, rows: Tensor) -> None:
        solve(layer, rows)
        written.append(layer)
        if len(written) == len(masks):
            raise error("in the middle")

    monkeypatch.setattr(layerwise, "_write", write)
    with pytest.raises(error, match="in the middle"):
        refit_layers(model, masks, calibration)
    assert_same(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_that_are_not_finite_are_no_ground_to_fit_on() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    masks, calibration = prepared(model, torch.randn(20, 4))
    calibration.batches[0][0, 0] = float("nan")
    before = state(model)
    report = refit_layers(model, masks, calibration)
    assert all("not finite" in reason for reason in report.left.values())
    assert report.refitted == []
    assert_same(model, before)


def test_the_forward_pass_ends_at_the_layer(trained: nn.Sequential) -> None:
    model = nn.Sequential(*copy.deepcopy(trained))
    passes = {"first": 0, "last": 0}

    def counting(name: str) -> Callable[[Tensor], Tensor]:
        def count(z: Tensor) -> Tensor:
            passes[name] += 1
            return z

        return count

    model = nn.Sequential(Lambda(counting("first")), model, Lambda(counting("last")))
    masks, calibration = prepared(model, digits()[0][:64])
    refit_layers(model, masks, calibration)
    # one complete pass finds the layers; fit and check, dense and pruned, for each layer end early
    assert passes == {"first": 1 + 4 * len(masks), "last": 1}


def test_a_users_forward_that_catches_everything_does_not_catch_the_end() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        try:
            return module(batch["features"])
        except Exception:  # noqa: BLE001
            pytest.fail("the end of a pass is no error of the model's")

    dense, masks = Teacher.of(model), prune(model, 0.5)
    batch = {"features": torch.randn(40, 4)}
    report = refit_layers(model, masks, Calibration(dense, [batch], [], forward=forward))
    assert report.refitted == ["0.weight", "2.weight"]


def test_faults_are_told_all_at_once() -> None:
    model = nn.Linear(4, 2)
    calibration = Calibration(Teacher.of(nn.Linear(3, 2)), [], [])
    masks = {"weight": torch.ones(2, 4), "nothing": torch.ones(2, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="The refit's arguments cannot be used") as caught:
        refit_layers(model, masks, calibration)
    message = str(caught.value)
    assert "masks['weight']: expected a bool tensor of shape (2, 4)" in message
    assert "masks['nothing']: there is no parameter" in message
    assert "at least one batch" in message
    assert "another's" in message


def test_the_pass_that_finds_the_layers_sees_their_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Backwards()
    with borrowed(model):
        names = ["second.weight", "first.weight"]
        found, left = layers_module.find_layers(model, names, [lambda: model(torch.ones(2, 4))])
    assert [layer.name for layer in found] == ["first.weight", "second.weight"]
    assert left == {}


def unread(dtype: torch.dtype) -> tuple[nn.Module, Masks, Calibration]:
    """Return a network that has lost only weights of inputs that are always 0."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(400, 8, dtype=dtype)
    x[:, 5:] = 0
    dense = Teacher.of(model)
    masks = {
        name: torch.ones_like(model.get_parameter(name)) > 0 for name in ("0.weight", "2.weight")
    }
    masks["0.weight"][:, 5:] = False
    model[0].weight.data.mul_(masks["0.weight"])
    return model, masks, Calibration(dense, [x[:300]], [x[300:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_nothing_was_lost_nothing_is_said(dtype: torch.dtype) -> None:
    model, masks, calibration = unread(dtype)
    before = state(model)
    report = refit_layers(model, masks, calibration)
    assert (report.refitted, report.left) == ([], {})
    assert_same(model, before)


def test_a_small_error_is_still_corrected_and_a_hopeless_one_said() -> None:
    model, masks, calibration = unread(torch.float32)
    calibration.batches[0][:, 5] = 1e-2
    calibration.held_out[0][:, 5] = 1e-2
    assert refit_layers(model, masks, calibration).refitted == ["0.weight", "2.weight"]
    model, masks, calibration = unread(torch.float32)
    calibration.batches[0][:, 5] = torch.randn(300)  # which those held out know nothing of
    assert "no better" in refit_layers(model, masks, calibration).left["0.weight"]
