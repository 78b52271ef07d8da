"""Second-order prices: against the formula written out, and against what they promise."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune._types import Masks
from lightning_prune.exceptions import NonFiniteScoresError, SaliencyError
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import obs as obs_module
from lightning_prune.refit import output_saliency as output_saliency_module
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.layerwise import refit_layers
from lightning_prune.refit.obs import obs_prices
from tests.cases import Lambda, Scaled, Tied, Transformer, Twice


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


NETWORKS = {"mlp": (mlp, (12, 6)), "conv": (convnet, (9, 2, 4, 4))}


def masked(model: nn.Module, density: float) -> Masks:
    masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters() if p.ndim > 1}
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    return masks


def probabilities(logits: Tensor, likelihood: str) -> Tensor:
    """Return (N, outcomes) whose squared gradients are summed."""
    if likelihood == "categorical":
        return logits.softmax(1).flatten(1)
    if likelihood == "bernoulli":
        p = logits.sigmoid().flatten(1)
        return torch.cat([p, 1 - p], 1)
    return logits.flatten(1)


def slow_saliency(model: nn.Sequential, i: int, x: Tensor, likelihood: str) -> Tensor:
    """Return s (D): one backward pass for each sample and outcome."""
    total, positions = torch.zeros(model[i].weight.shape[0]).to(x), 1
    for sample in x.split(1):
        z = model[: i + 1](sample).detach().requires_grad_()
        for p in probabilities(model[i + 1 :](z * 1.0), likelihood)[0]:
            (g,) = torch.autograd.grad(p, z, retain_graph=True)
            positions = g[0].numel() // g.shape[1]
            total += g[0].square().reshape(g.shape[1], -1).sum(1)
    return total / positions


def slow_prices(
    model: nn.Sequential, masks: Masks, x: Tensor, likelihood: str, ridge: float
) -> dict[str, Tensor]:
    """Write the formula out, row by row, with explicit inverses."""
    prices = {}
    for i, module in enumerate(model):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        s = slow_saliency(model, i, x, likelihood) / len(x)
        w = module.weight.detach()
        found = torch.zeros_like(w).flatten(1)
        groups = getattr(module, "groups", 1)
        for r in range(len(w)):
            part = model[:i](x).detach().chunk(groups, 1)[r // (len(w) // groups)]
            if isinstance(module, nn.Conv2d):
                a = F.unfold(part, module.kernel_size, padding=module.padding, stride=module.stride)
                part = a.transpose(1, 2).flatten(0, 1)
            gram = part.T @ part
            gram += ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
            keep = masks.get(f"{i}.weight", torch.ones_like(w))[r].flatten().nonzero()[:, 0]
            inverse = torch.linalg.inv(gram[keep][:, keep])
            found[r, keep] = w[r].flatten()[keep].square() / inverse.diagonal() * s[r]
        prices[f"{i}.weight"] = found.reshape(w.shape)
    return prices


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("density", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("kind", NETWORKS)
def test_prices_are_those_of_the_formula(kind: str, density: float, likelihood: str) -> None:
    make, shape = NETWORKS[kind]
    model, x = make().double(), torch.randn(shape).double()
    masks = {} if density == 1 else masked(model, density)
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    found = obs_prices(
        model, masks, names, list(x.split(5)), likelihood=likelihood, ridge=1e-2, temperature=1.0
    )
    expected = slow_prices(model, masks, x, likelihood, 1e-2)
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-16)
        if masks:
            assert bool((found[name][~masks[name]] == 0).all())


def test_the_price_is_what_the_removal_costs_after_the_refit() -> None:
    # In a linear network with squared error the second order is all there is.
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    x = torch.randn(40, 2).double() @ torch.randn(2, 5).double() + 0.3 * torch.randn(40, 5)
    prices = obs_prices(model, {}, ["0.weight"], [x], likelihood="gaussian", ridge=1e-12)
    dense = model(x).detach()
    for r in range(3):
        for i in range(5):
            others = [j for j in range(5) if j != i]
            solution = torch.linalg.lstsq(x[:, others], dense[:, r : r + 1])
            cost = float((x[:, others] @ solution.solution - dense[:, r : r + 1]).square().sum())
            assert float(prices["0.weight"][r, i]) == pytest.approx(cost, rel=1e-6)


def accuracy_in_stages(model: nn.Sequential, x: Tensor, y: Tensor, *, by_price: bool) -> float:
    """Prune to 6 % in five stages with a refit, by price or by magnitude; return the accuracy."""
    names = ["0.weight", "2.weight"]
    calibration = Calibration(Teacher.of(model), list(x[:1200].split(200)), [])
    pruned, masks = copy.deepcopy(model), {}
    for stage in range(1, 6):  # one by one is what a price is about; all at once it is not
        scores = {name: pruned.get_parameter(name).detach().abs() for name in names}
        if by_price:
            scores = obs_prices(pruned, masks, names, calibration.batches)
        limit = torch.cat([s.flatten() for s in scores.values()]).quantile(1 - 0.06 ** (stage / 5))
        masks = {name: scores[name] > limit for name in names}
        for name, mask in masks.items():
            pruned.get_parameter(name).data.mul_(mask)
        refit_layers(pruned, masks, calibration)
    return float((pruned(x[1200:]).argmax(1) == y[1200:]).float().mean())


def test_in_stages_with_a_refit_the_cheapest_are_missed_less_than_the_smallest() -> None:
    data = load_digits()
    x = torch.from_numpy(data.data).float().div(16)
    y = torch.from_numpy(data.target).long()
    gains = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(10):
            for index in torch.randperm(1200).split(60):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
        by_price, by_size = (accuracy_in_stages(model, x, y, by_price=p) for p in (True, False))
        gains.append(by_price - by_size)
    assert sum(gains) / len(gains) > 0.04


def test_softer_probabilities_are_those_of_smaller_logits() -> None:
    model, x = mlp().double(), torch.randn(12, 6).double()
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    soft = obs_prices(model, {}, names, [x], temperature=3.0)
    last = obs_prices(model, {}, names, [x], temperature=1.0, forward=lambda m, b: m(b) / 3)
    for name in names:
        torch.testing.assert_close(soft[name], last[name], rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="Expected argument `temperature` to be > 0"):
        obs_prices(model, {}, names, [x], temperature=0.0)


def test_few_inputs_bring_a_larger_ridge() -> None:
    model, x = mlp().double(), torch.randn(12, 6).double()
    few = obs_prices(model, {}, ["0.weight"], [x])["0.weight"]
    torch.testing.assert_close(
        few, obs_prices(model, {}, ["0.weight"], [x], ridge=0.25)["0.weight"]
    )
    many = obs_prices(model, {}, ["0.weight"], [x.repeat(500, 1)])["0.weight"]
    expected = obs_prices(model, {}, ["0.weight"], [x.repeat(500, 1)], ridge=1e-3)["0.weight"]
    torch.testing.assert_close(many, expected)


def test_a_module_called_twice_counts_both_calls() -> None:
    model, x = Twice().double(), torch.randn(11, 5).double()
    found = obs_prices(model, {}, ["shared.weight"], [x], temperature=1.0, ridge=1e-2)
    found = found["shared.weight"]
    first = model.shared(x)
    a = torch.cat([x, first.tanh()]).detach()
    gram = a.T @ a
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(5)
    # by hand: the gradient at each of the two outputs
    z1 = first.detach().requires_grad_()
    z2 = model.shared(z1.tanh())
    s = torch.zeros(5).double()
    for p in model.head(z2.relu()).softmax(1).sum(0):
        g1, g2 = torch.autograd.grad(p, [z1, z2], retain_graph=True)
        s += g1.square().sum(0) + g2.square().sum(0)
    w = model.shared.weight.detach()
    expected = w.square() / torch.linalg.inv(gram).diagonal() * (s / 2 / len(x))[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_dead_inputs_and_dead_layers_are_cheap_and_finite() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(20, 6)
    x[:, 2] = 0
    model[0].bias.data.fill_(0)
    prices = obs_prices(model, {}, ["0.weight", "2.weight"], [x], ridge=1e-3)
    assert bool(torch.isfinite(prices["0.weight"]).all())
    assert float(prices["0.weight"][:, 2].sum()) < 0.1 * float(prices["0.weight"].sum(0).mean())
    model[0].bias.data.fill_(-100)
    prices = obs_prices(model, {}, ["0.weight", "2.weight"], [x])
    assert all(bool((price == 0).all()) for price in prices.values())
    empty = {"0.weight": torch.zeros(5, 6, dtype=torch.bool)}
    assert bool((obs_prices(model, empty, ["0.weight"], [x])["0.weight"] == 0).all())


def test_many_classes_are_those_likeliest_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4, 6).double(), torch.randn(8, 4).double()
    model.bias.data = torch.tensor([0.0, 0.0, 20.0, 0.0, 20.0, 0.0]).double()
    whole = obs_prices(model, {}, ["weight"], [x])["weight"]
    monkeypatch.setattr(output_saliency_module, "MOST_CLASSES", 2)
    likeliest = obs_prices(model, {}, ["weight"], [x])["weight"]
    torch.testing.assert_close(likeliest[[2, 4]], whole[[2, 4]], rtol=1e-3, atol=0)
    assert bool((likeliest <= whole * (1 + 1e-12)).all())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_many_outputs_enter_with_random_signs(
    likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 80)).double()
    x = torch.randn(400, 3).double()
    rough = obs_prices(model, {}, ["0.weight"], [x], likelihood=likelihood)["0.weight"]
    monkeypatch.setattr(output_saliency_module, "MOST_CLASSES", 80)
    exact = obs_prices(model, {}, ["0.weight"], [x], likelihood=likelihood)["0.weight"]
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
    assert not torch.equal(rough, exact)


def test_positions_of_dense_predictions_enter_with_random_signs() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 4, 3)).double()
    x = torch.randn(600, 2, 12).double()
    found = obs_prices(model, {}, ["0.weight"], [x], temperature=1.0)["0.weight"]
    s = slow_saliency(model, 0, x[:60], "categorical") / 60
    shares = found.sum([1, 2]) / found.sum()
    a = x.unfold(2, 3, 1).transpose(1, 2).flatten(2).flatten(0, 1)
    gram = a.T @ a
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(6)
    w = model[0].weight.detach().flatten(1)
    expected = w.square() / torch.linalg.inv(gram).diagonal() * s[:, None]
    torch.testing.assert_close(shares, expected.sum(1) / expected.sum(), rtol=0.15, atol=0)


def test_what_has_no_price_is_refused_all_at_once() -> None:
    model = nn.ModuleDict(
        {"tied": Tied(), "scaled": Scaled(9, 3), "rest": Transformer(), "free": nn.Linear(3, 3)}
    ).float()
    names = [name for name, p in model.named_parameters() if p.ndim > 1]

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return m["scaled"](m["tied"](x % 9)) + m["rest"](x)[:, :3]

    with pytest.raises(ValueError, match="criterion='taylor'") as caught:
        obs_prices(model, {}, names, [torch.randint(0, 20, (8, 5))], forward=forward)
    message = str(caught.value)
    for name in ("tied.table.weight", "scaled.weight", "rest.table.weight", "free.weight"):
        assert repr(name) in message
    assert "self_attn.in_proj_weight" in message
    assert "linear1" not in message


class Cut(nn.Module):
    """The first layer is a fixed feature extractor, one way or the other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                h = self.first(x).relu()
        else:
            h = self.first(x).relu().detach()
        return self.last(h)


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_layer_without_a_gradient_path_is_named(how: str) -> None:
    model, x = Cut(how), torch.randn(30, 6)
    with pytest.raises(SaliencyError, match=r"\['first.weight'\] have none"):
        obs_prices(model, {}, ["first.weight", "last.weight"], [x])
    assert float(obs_prices(model, {}, ["last.weight"], [x])["last.weight"].sum()) > 0


def test_a_submodule_that_was_compiled_and_run_has_the_same_prices() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = [torch.randn(20, 10) for _ in range(3)]
    plain = nn.Sequential(net)
    names = [name for name, p in plain.named_parameters() if p.ndim > 1]
    expected = obs_prices(plain, {}, names, x)
    compiled = nn.Sequential(torch.compile(net, backend="eager"))
    compiled(x[0])  # the graph is captured before the hooks come
    names = [name for name, p in compiled.named_parameters() if p.ndim > 1]
    found = obs_prices(compiled, {}, names, x)
    for one, other in zip(expected.values(), found.values(), strict=True):
        assert float(one.sum()) > 0
        assert torch.equal(one, other)


def test_arguments_that_fit_nothing_are_refused() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    with pytest.raises(ValueError, match="no parameter of this name"):
        obs_prices(model, {}, ["heavy"], [x])
    with pytest.raises(ValueError, match="at least one batch"):
        obs_prices(model, {}, ["weight"], [])
    with pytest.raises(ValueError, match=r"expected a bool tensor of shape \(2, 4\)"):
        obs_prices(model, {"weight": torch.ones(2, 4)}, ["weight"], [x])
    with pytest.raises(ValueError, match="Expected argument `ridge`"):
        obs_prices(model, {}, ["weight"], [x], ridge=0)
    with pytest.raises(ValueError, match=r"Expected logits of shape \(N, C\)"):
        obs_prices(model, {}, ["weight"], [x], forward=lambda m, b: m(b)[:, 0])
    with pytest.raises(NonFiniteScoresError, match="finite logits"):
        obs_prices(model, {}, ["weight"], [x * float("nan")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_is_left_as_it_was_and_prices_repeat(dtype: torch.dtype) -> None:
    model = convnet().to(dtype).train()
    model.append(Lambda(lambda z: F.dropout(z, 0.2, training=True)))
    model[0].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x = torch.randn(9, 2, 4, 4, dtype=dtype)
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    names = ["0.weight", "3.weight"]
    with torch.inference_mode():
        first = obs_prices(model, {}, names, [x.clone()])
    second = obs_prices(model, {}, names, [x])
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert all(price.dtype == dtype and not price.requires_grad for price in first.values())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert next(p.requires_grad for p in model.parameters()) is False
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_frozen_network_has_prices_too() -> None:
    model, x = convnet().double(), torch.randn(9, 2, 4, 4).double()
    names = ["0.weight", "3.weight", "5.weight"]
    free = obs_prices(model, {}, names, [x])
    frozen = obs_prices(model.requires_grad_(False), {}, names, [x])
    assert all(torch.equal(free[name], frozen[name]) for name in names)


def test_layers_that_do_not_fit_at_once_get_the_same_prices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, passes = convnet(), torch.randn(9, 2, 4, 4), []
    names = [name for name, p in model.named_parameters() if p.ndim > 1]

    def forward(m: nn.Module, batch: Tensor) -> Tensor:
        passes.append(len(batch))
        return m(batch)

    at_once = obs_prices(model, {}, names, [x[:5], x[5:]], forward=forward)
    count = len(passes)
    monkeypatch.setattr(obs_module, "GRAM_BYTES", 1)
    apart = obs_prices(model, {}, names, [x[:5], x[5:]], forward=forward)
    assert len(passes) - count == count + 4  # two more layers, two batches
    for name in names:
        assert torch.equal(at_once[name], apart[name])


def test_one_logit_has_no_probability_that_could_move() -> None:
    with pytest.raises(ValueError, match=r"at least 2 classes.*\(5, 1\).*'bernoulli'"):
        obs_prices(nn.Linear(3, 1), {}, ["weight"], [torch.randn(5, 3)])


def test_small_output_saliencies_survive_half_precision() -> None:
    model = convnet().double()
    model[-1].weight.data.mul_(1e-4)  # squares of its gradients are below what float16 can hold
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    x = torch.randn(9, 2, 4, 4, dtype=torch.float64)
    exact = obs_prices(model, {}, names, [x], ridge=0.1)
    half = obs_prices(copy.deepcopy(model).half(), {}, names, [x.half()], ridge=0.1)
    for name in names:
        limit = 1e-3 * float(exact[name].max())
        torch.testing.assert_close(half[name].double(), exact[name], rtol=0.1, atol=limit)


class Padded(nn.Module):
    """Half of the samples have padding, which torch packs away in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[::2, 3:] = True
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches_reach_the_layers_as_they_are() -> None:
    model, x = Padded().eval(), torch.randn(12, 5, 8)
    names = [n for n, p in model.named_parameters() if p.ndim > 1 and "self_attn" not in n]
    prices = obs_prices(model, {}, names, [x])
    assert torch.backends.mha.get_fastpath_enabled()
    layers = [name for name in names if float(prices[name].sum()) > 0]
    assert layers == names
    masks = {n: torch.rand(model.get_parameter(n).shape) > 0.5 for n in names}
    calibration = Calibration(Teacher.of(model), [x], [])
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    assert refit_layers(model, masks, calibration).refitted


def test_a_model_that_autocasts_itself_has_prices() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x).float()

    model, x = Casting().eval(), torch.randn(40, 6)
    names = ["net.0.weight", "net.2.weight"]
    found = obs_prices(model, {}, names, [x])
    plain = obs_prices(model.net, {}, ["0.weight", "2.weight"], [x])
    for name in names:
        torch.testing.assert_close(found[name], plain[name[4:]], rtol=0.1, atol=1e-3)


class Experts(nn.Module):
    """The sign of its first input chooses the layer of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        logits = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            if (mine := (x[:, 0] > 0) == bool(i)).any():
                logits = logits.masked_scatter(mine[:, None], expert(x[mine]))
        return logits


def test_layers_that_the_first_samples_do_not_choose_have_prices() -> None:
    model, x = Experts(), torch.randn(60, 6)
    x = x[x[:, 0].argsort()]
    batches, names = list(x.split(10)), ["experts.0.weight", "experts.1.weight"]
    assert obs_module.check_priced(
        model, names, batches[0], forward=lambda m, b: m(b), likelihood="categorical"
    ) == ["experts.1.weight"]
    found = obs_prices(model, {}, names, batches)
    for name, mine in zip(names, (x[:, 0] <= 0, x[:, 0] > 0), strict=True):
        expert = model.get_submodule(name.rpartition(".")[0])
        # Alone it has fewer samples, so another temperature and ridge, and its own mean over them.
        settings = {"temperature": 4 - 60 / 1000, "ridge": 3 / int(mine.sum())}
        alone = obs_prices(expert, {}, ["weight"], [x[mine]], **settings)["weight"]
        torch.testing.assert_close(found[name] * 60, alone * int(mine.sum()), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"experts.1.weight': its layer was not called"):
        obs_prices(model, {}, names, [batches[0]])


def test_a_first_look_at_samples_that_call_nothing_says_so() -> None:
    model, x = Experts(), torch.randn(6, 6)
    x[:, 0] = -x[:, 0].abs()
    look = {"forward": lambda m, b: m(b), "likelihood": "categorical"}
    name = "experts.1.weight"
    assert obs_module.check_priced(model, [name], x, **look) == [name]


def test_the_first_look_makes_no_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs_module.Moments, "empty", lambda *_, **__: pytest.fail("a matrix"))
    look = {"forward": lambda m, b: m(b), "likelihood": "categorical"}
    assert obs_module.check_priced(mlp(), ["0.weight"], torch.randn(2, 6), **look) == []
    with pytest.raises(NonFiniteScoresError):
        obs_module.check_priced(mlp(), ["0.weight"], torch.full((2, 6), torch.nan), **look)
