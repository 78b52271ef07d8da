"""Pruning without a Trainer: exact counts, stages, generators, and nothing half-applied."""

from __future__ import annotations

import copy
import math
import warnings
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune
from lightning_prune import SaliencyAccumulator, Selection, prune, sparsity, squared_gradients
from lightning_prune.exceptions import BatchFormatError, NonFiniteScoresError
from lightning_prune.offline import descent
from lightning_prune.passes.batches import batch_size, take_samples
from lightning_prune.refit import method


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float().div(16), torch.from_numpy(y).long()


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    x, y = digits[0][:1200], digits[1][:1200]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(20):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


@pytest.fixture
def batches(digits: tuple[Tensor, Tensor]) -> list[Any]:
    return [(digits[0][i : i + 200], digits[1][i : i + 200]) for i in range(0, 1000, 200)]


def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(digits[0][1200:]).argmax(1) == digits[1][1200:]).float().mean())


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for n, p in model.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("refit", [False, True, "layers", "outputs"])
@pytest.mark.parametrize("criterion", ["taylor", "obs", "magnitude"])
def test_the_number_removed_is_exact(model, batches, criterion, refit) -> None:
    masks = prune(model, batches, sparsity=0.9, stages=3, criterion=criterion, refit=refit)
    total = 64 * 48 + 48 * 10
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.9 * total)
    assert zeros(model) == round(0.9 * total)
    for name, mask in masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all())
    assert sparsity(masks) == sparsity(model) == pytest.approx(0.9, abs=1e-3)


def test_one_stage_is_the_criterion_itself(model, batches) -> None:
    scores = squared_gradients(model, batches, tolerance=1e-3, parameters=["0.weight", "2.weight"])
    price = {n: model.get_parameter(n).detach() ** 2 * r for n, r in scores.items()}
    expected = Selection()(price, 0.7).masks
    masks = prune(model, batches, sparsity=0.7)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_stages_and_refit_are_worth_what_they_cost(model, trained, batches, digits) -> None:
    once = copy.deepcopy(model)
    prune(once, batches, sparsity=0.9)
    prune(model, batches, sparsity=0.9, stages=8, criterion="obs", refit=True)
    assert accuracy(model, digits) > accuracy(once, digits) + 0.02
    assert accuracy(model, digits) > accuracy(trained, digits) - 0.03


def test_a_later_call_goes_on_from_the_masks(model, batches) -> None:
    first = prune(model, batches, sparsity=0.5, refit="layers")
    second = prune(model, batches, sparsity=0.8, stages=3, refit="layers", masks=first)
    assert all(bool((~second[name][~first[name]]).all()) for name in first)
    assert sparsity(second) == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(ValueError, match="what `masks` remove already"):
        prune(model, batches, sparsity=0.4, masks=second)


def test_results_repeat(trained, batches) -> None:
    found = []
    for _ in range(2):
        model = copy.deepcopy(trained)
        prune(model, batches, sparsity=0.9, stages=2, criterion="obs", refit=True)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_model_is_left_as_it_was_but_for_its_weights(model, batches) -> None:
    model.train()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    state = torch.get_rng_state()
    prune(model, batches, sparsity=0.5, refit=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad
    assert bool((model[2].weight.grad == 1).all())
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_half_applied(model, batches) -> None:
    before = copy.deepcopy(model.state_dict())
    calls = []

    def criterion(scores: Any, parameters: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return {name: p.abs() for name, p in parameters.items()}

    with pytest.raises(RuntimeError, match="out of luck"):
        prune(model, batches, sparsity=0.5, stages=2, criterion=criterion, refit="layers")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Shapes:
    """A generator that remembers what it was asked for."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.asked = shape, 0

    def sample(self, n: int) -> Tensor:
        self.asked += n
        return torch.rand(n, *self.shape)


@pytest.mark.filterwarnings("ignore:The refit left some parameters")  # on the few real inputs
@pytest.mark.parametrize("criterion", ["taylor", "obs"])
def test_generated_inputs_join_scoring_and_refit(model, trained, batches, criterion) -> None:
    few = [(batches[0][0][:20], batches[0][1][:20])]
    generator = Shapes(64)
    state = torch.get_rng_state()
    with_them = prune(
        model, few, sparsity=0.8, criterion=criterion, refit="layers", generator=generator
    )
    assert generator.asked == 1000
    assert torch.equal(state, torch.get_rng_state())
    without = prune(copy.deepcopy(trained), few, sparsity=0.8, criterion=criterion, refit="layers")
    assert any(not torch.equal(with_them[name], without[name]) for name in without)


def test_how_many_are_generated(model, batches) -> None:
    generator = Shapes(64)
    prune(model, batches, sparsity=0.5, generator=generator, generated=70)
    assert generator.asked == 70
    with pytest.raises(ValueError, match=r"generator\.sample\(n\) to return a tensor"):
        prune(model, batches, sparsity=0.5, generator=Shapes(8, 8))


def test_all_faults_come_at_once(model, batches) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)stages.*sparsity"):
        prune(model, batches, sparsity=1.0, stages=0)
    with pytest.raises(ValueError, match="at least one batch"):
        prune(model, [], sparsity=0.5)
    with pytest.raises(ValueError, match="`refit` to be True, False, or one of"):
        prune(model, batches, sparsity=0.5, refit="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Did you mean 'taylor'"):
        prune(model, batches, sparsity=0.5, criterion="tailor")
    with pytest.raises(ValueError, match="compares weights by R"):
        prune(model, batches, sparsity=0.5, criterion="obs", selection=Selection(regrow=0.1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_guard_says_what_it_has_kept(model, batches) -> None:
    def last_layer_worthless(scores: Any, parameters: Any) -> Any:
        return {
            n: torch.rand_like(p) * (1 if n == "0.weight" else 1e-9) for n, p in parameters.items()
        }

    with pytest.warns(UserWarning, match=r"2\.weight would have lost too much"):
        masks = prune(model, batches, sparsity=0.9, criterion=last_layer_worthless)
    assert bool(masks["2.weight"].any())


def test_convolutions_and_dicts(digits) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    batches = [{"x": digits[0][:300].reshape(-1, 1, 8, 8), "y": digits[1][:300]}]
    masks = prune(model, batches, sparsity=0.75, stages=2, criterion="obs", refit=True)
    assert set(masks) == {"0.weight", "4.weight"}
    assert sparsity(masks) == pytest.approx(0.75, abs=1e-3)
    assert all(math.isfinite(float(p.detach().sum())) for p in model.parameters())


def test_it_is_at_the_front_door() -> None:
    assert "prune" in lightning_prune.__all__


@pytest.mark.parametrize("share", [0.17, 0.58])  # round to 2 and 6, which is more
def test_the_same_share_again_removes_nothing_more(share) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))  # 10 weights
    masks = prune(model, [torch.rand(16, 3)], sparsity=share)
    weights = copy.deepcopy(model.state_dict())
    again = prune(model, [torch.rand(16, 3)], sparsity=share, stages=3, masks=masks)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    assert all(torch.equal(model.state_dict()[name], w) for name, w in weights.items())


def test_all_that_cannot_be_used_is_said_at_once(model, batches) -> None:
    with pytest.raises(ValueError, match="sparsity: expected a share") as caught:
        prune(
            model,
            batches,
            sparsity=1.5,
            masks={
                "0.bias": torch.zeros(48, dtype=torch.bool),
                "2.weight": torch.zeros(3, dtype=torch.bool),
            },
        )
    assert "masks['0.bias']" in str(caught.value)
    assert "masks['2.weight']" in str(caught.value)
    with pytest.raises(ValueError, match="likelihood: expected one of") as caught:
        prune(
            model,
            batches,
            sparsity=0.5,
            criterion="magnitude",
            refit="layers",
            likelihood="poisson",
            generator=object(),
        )
    assert "generator: expected something with a method sample(n)" in str(caught.value)


def test_a_generator_of_nothing_is_refused(model, batches) -> None:
    class Dry:
        def sample(self, n: int) -> Tensor:
            return torch.empty(0, 64)

    with pytest.raises(ValueError, match=r"but got \(0, 64\)"):
        prune(model, batches, sparsity=0.5, generator=Dry())


def test_what_no_refit_could_correct_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, 3))
    batch = torch.randint(0, 20, (64, 4))
    with pytest.warns(UserWarning, match=r"left some parameters as they were\. 0\.weight: part of"):
        prune(model, [batch], sparsity=0.5, stages=2, refit="layers")


@pytest.mark.parametrize("refit", ["layers", "outputs"])
def test_nothing_removed_is_nothing_refitted(model, trained, batches, refit) -> None:
    prune(model, batches, sparsity=0.0, refit=refit)
    for name, weight in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize("criterion", ["taylor", "saliency", "obs", "magnitude"])
@pytest.mark.parametrize("refit", [False, "layers", "outputs"])
def test_under_inference_mode(trained, batches, criterion, refit) -> None:
    expected, model = copy.deepcopy(trained), copy.deepcopy(trained)
    options: dict[str, Any] = {"sparsity": 0.7, "criterion": criterion, "refit": refit}
    prune(expected, batches, **options)
    with torch.inference_mode():
        prune(model, [(x * 1, y * 1) for x, y in batches], **options)
    for name, p in model.named_parameters():
        assert torch.equal(p, expected.get_parameter(name))
        assert not p.is_inference()


def test_scores_under_inference_mode(trained, batches) -> None:
    expected = squared_gradients(trained, batches)
    with torch.inference_mode():
        inside = squared_gradients(trained, [(x * 1, y * 1) for x, y in batches])
        accumulator = SaliencyAccumulator(trained)
        for batch in batches:
            accumulator.update(batch)
        accumulator.reset()
        accumulator.update(batches[0])
    accumulator.update(batches[1])  # and again outside of it
    assert all(torch.equal(inside[name], score) for name, score in expected.items())
    first = squared_gradients(trained, batches[:2])
    assert all(torch.equal(score, first[n]) for n, score in accumulator.compute().items())


@pytest.mark.parametrize("criterion", ["taylor", "saliency", "obs"])
def test_batch_norm_in_train_mode_is_used_in_eval_mode(batches, criterion) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    for x, _ in batches:
        model(x)  # statistics
    expected = copy.deepcopy(model).eval()
    masks = prune(expected, batches, sparsity=0.6, criterion=criterion)
    assert all(
        torch.equal(mask, masks[name])
        for name, mask in prune(model, batches, sparsity=0.6, criterion=criterion).items()
    )
    assert all(module.training for module in model.modules())


def test_a_number_of_generated_inputs_needs_a_generator(model, batches) -> None:
    with pytest.raises(ValueError, match=r"generated=5.*give `generator`"):
        prune(model, batches, sparsity=0.5, generated=5)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_a_generator_that_returns_nan_is_named(model, batches, criterion) -> None:
    class Broken:
        def sample(self, n: int) -> Tensor:
            return torch.full((n, 64), math.nan)

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Broken to return finite"):
        prune(model, batches, sparsity=0.5, criterion=criterion, refit=True, generator=Broken())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("enough", "expected"), [(1000, "outputs"), (1001, "layers")])
def test_the_number_of_samples_decides_between_the_refits(
    trained, batches, monkeypatch, enough, expected
) -> None:
    monkeypatch.setattr(method, "ENOUGH", enough)
    found = {}
    for refit in (True, "auto", "layers", "outputs"):
        model = copy.deepcopy(trained)
        prune(model, batches, sparsity=0.8, refit=refit)  # 1,000 samples, a tenth held out
        found[refit] = model.state_dict()
    other = {"layers": "outputs", "outputs": "layers"}[expected]
    for name, value in found[expected].items():
        assert torch.equal(found[True][name], value)
        assert torch.equal(found["auto"][name], value)
    assert any(not torch.equal(found[other][n], v) for n, v in found[expected].items())


def test_generated_inputs_are_no_real_ones_for_a_refit(trained, batches, monkeypatch) -> None:
    """They are not counted where that decides, and no limit on real ones leaves them out."""

    class Noise:
        def sample(self, n: int) -> Tensor:
            return torch.rand(n, 64)

    seen: list[tuple[int, int, int]] = []

    def noting(model, masks, calibration, *args):
        parts = calibration.batches, calibration.held_out, calibration.generated
        seen.append(tuple(sum(map(batch_size, part)) for part in parts))
        return method.refit_survivors(model, masks, calibration, *args)

    monkeypatch.setattr(descent, "refit_survivors", noting)
    monkeypatch.setattr(method, "ENOUGH", 1200)  # 1,000 real ones, 600 generated
    options: dict[str, Any] = {"sparsity": 0.8, "generator": Noise(), "generated": 600}
    one, other = copy.deepcopy(trained), copy.deepcopy(trained)
    prune(one, batches, refit=True, **options)
    prune(other, batches, refit="layers", **options)
    assert seen == [(900, 100, 600)] * 2
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_draws_nothing_from_the_users_random_state(trained, digits, shuffle) -> None:
    loader = DataLoader(TensorDataset(*(d[:200] for d in digits)), 50, shuffle=shuffle)
    models = [copy.deepcopy(trained) for _ in range(2)]
    before = torch.get_rng_state()
    for model in models:
        prune(model, loader, sparsity=0.5, refit="layers")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(*models)


def test_a_warning_that_is_an_error_takes_everything_back(model, batches) -> None:
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="guard against collapse"):
            prune(model, batches, sparsity=0.998)
    assert same(model, before)


def test_masks_made_under_inference_mode_can_be_changed(model, batches) -> None:
    with torch.inference_mode():
        masks = prune(model, batches, sparsity=0.5)
    for mask in masks.values():
        mask[0] = True
        assert not mask.is_inference()


@dataclass
class Pair:
    """A batch as an object, which Lightning moves between devices too."""

    x: Tensor
    y: Tensor


class Row(UserDict):
    """A mapping that is no dict, as Hugging Face's BatchEncoding is none."""

    @property
    def x(self) -> Tensor:
        return self["x"]


@pytest.mark.parametrize("kind", [Pair, lambda x, y: Row(x=x, labels=y)], ids=["object", "mapping"])
@pytest.mark.parametrize(
    ("criterion", "refit"), [("taylor", False), ("obs", "layers"), ("magnitude", "outputs")]
)
def test_batches_of_a_class_of_their_own(trained, batches, kind, criterion, refit) -> None:
    options = {"sparsity": 0.5, "criterion": criterion, "refit": refit}
    plain, other = copy.deepcopy(trained), copy.deepcopy(trained)
    prune(plain, batches, **options)
    own = [kind(x, y) for x, y in batches]
    prune(other, own, forward=lambda model, batch: model(batch.x), **options)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)  # not summed in the same order
        assert torch.equal(a == 0, b == 0)
    assert isinstance(take_samples(own[0], torch.tensor([1])), type(own[0]))


class Experts(nn.Module):
    """Each sample goes to the expert that its gate prefers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.out = nn.Linear(64, 32), nn.Linear(32, 3), nn.Linear(32, 10)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).relu()
        weight, chosen = self.gate(h).softmax(1).max(1)
        y = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(h[rows]) * weight[rows, None])
        return self.out(y.relu())


def test_a_layer_that_other_samples_reach_is_left_and_said(batches) -> None:
    torch.manual_seed(0)
    model = Experts()
    with pytest.warns(
        UserWarning, match=r"experts.0.weight: its layer's inputs are of other shapes"
    ):
        masks = prune(model, batches, sparsity=0.7, criterion="magnitude", refit="layers")
    assert sparsity(masks) == pytest.approx(0.7, abs=1e-3)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_masks_of_a_compiled_model_have_the_models_names() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    masks = prune(torch.compile(model, backend="eager"), [torch.randn(64, 8)], sparsity=0.5)
    assert list(masks) == ["0.weight", "2.weight"]
    assert sparsity(model) == sparsity(masks) == pytest.approx(0.5)


def test_one_batch_in_place_of_a_list_is_told(model, trained, batches) -> None:
    x, y = batches[0]
    with pytest.raises(
        TypeError, match=r"iterable of batches, but got one tensor of shape \(200, 64"
    ):
        prune(model, x, sparsity=0.5, criterion="magnitude")
    with pytest.raises(TypeError, match=r"one dict with the keys \['x', 'y'\].*`\[batch\]`"):
        prune(model, {"x": x, "y": y}, sparsity=0.5)
    for one in ((x, y), [x, y]):
        for forward in (None, lambda m, b: m(b[0])):
            with pytest.raises(BatchFormatError, match=r"\(200, 64\), \(200,\).*`\[\(x, y\)\]`"):
                prune(model, one, sparsity=0.5, refit="layers", forward=forward)
    assert same(model, trained)


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: torch.cat([x, x], 1)[:, :64]])
def test_tensors_that_are_batches_stay_batches(model, batches, batch) -> None:
    x = batches[0][0]
    prune(model, (x, batch(x)), sparsity=0.5)
    assert zeros(model) == 1776


def test_an_error_that_has_nothing_to_do_with_the_form_stays_itself(model, batches) -> None:
    x = batches[0][0]
    with pytest.raises(NonFiniteScoresError):
        prune(model, [x * math.nan, x], sparsity=0.5)
    with pytest.raises(BatchFormatError, match="Expected Sequential to accept"):
        prune(model, [x[:, :5], x[:50, :5]], sparsity=0.5)


def test_weights_that_no_input_reaches_are_no_failure_of_a_refit(batches) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    read = (batches[0][0] != 0).any(0)
    model[0].weight.data[:, read] += 1  # so that what no input reaches goes first
    model[2].weight.data += 1
    dead = 16 * int((~read).sum())
    assert dead > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unread = [(x * read, y) for x, y in batches]
        options = {"sparsity": dead / 1184, "criterion": "magnitude", "refit": "layers"}
        masks = prune(model, unread, **options)
    assert not masks["0.weight"][:, ~read].any()


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
@pytest.mark.parametrize("refit", [False, "outputs"])
def test_positions_that_labels_leave_out_count_for_nothing(criterion, refit) -> None:
    """As if they were not there: of 1x1 convolutions every position is on its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(5, 16, 1), nn.ReLU(), nn.Conv1d(16, 4, 1))
    x, y = torch.randn(64, 5, 9), torch.randint(0, 4, (64, 9))
    padded, labels = torch.cat([x, 9 * torch.randn(64, 5, 6)], 2), F.pad(y, (0, 6), value=-100)
    found = []
    for batch in ((x, y), (padded, labels), (padded, F.pad(y, (0, 6)))):
        net = copy.deepcopy(model)
        prune(net, [batch], sparsity=0.6, stages=2, criterion=criterion, refit=refit)
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    real, with_padding, misled = found
    assert torch.equal(real == 0, with_padding == 0)
    assert (real - with_padding).abs().max() < 1e-3
    assert criterion == "magnitude" or not torch.equal(real == 0, misled == 0)
    assert not refit or (real - misled).abs().max() > 0.01


def test_scores_can_be_estimated(model, batches) -> None:
    signs = lightning_prune.RandomSigns(draws=2, seed=3)
    scores = squared_gradients(
        copy.deepcopy(model).eval(), batches, parameters=["0.weight", "2.weight"], signs=signs
    )
    masks = prune(model, batches, sparsity=0.5, criterion="saliency", signs=signs)
    expected = Selection()(scores, 0.5).masks
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    with pytest.raises(TypeError, match="RandomSigns"):
        prune(model, batches, sparsity=0.5, signs=8)
