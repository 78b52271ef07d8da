"""What goes wrong elsewhere.

State left behind, inference mode, low precision, mixed samples, unseen parameters.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.saliency import SaliencyAccumulator, squared_gradients
from lightning_prune.saliency.engine import Engine
from lightning_prune.saliency.rules.generic import add_squared_gradients
from tests import reference
from tests.cases import CASES, make
from tests.device_reads import DeviceReads
from tests.two_processes import join_group


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "values": [v.clone() for v in model.state_dict().values()],
        "rng": torch.get_rng_state(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key in ("values", "grads"):
            for a, b in zip(value, after[key], strict=True):
                assert (a is None and b is None) or torch.equal(a, b), key
        elif key == "rng":
            assert torch.equal(value, after[key])
        else:
            assert value == after[key], key


def noisy_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones(3, 6)
    return model.train()


def test_the_model_is_left_as_it_was() -> None:
    model, x = noisy_model(), torch.randn(5, 4)
    before = state_of(model)
    squared_gradients(model, [x])
    assert_same_state(before, state_of(model))


def test_the_model_is_left_as_it_was_after_an_exception() -> None:
    model, x = noisy_model(), torch.randn(5, 4)
    before = state_of(model)

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        torch.rand(3)
        module(batch)
        raise KeyError("the user's own mistake")

    with pytest.raises(KeyError, match="own mistake"):
        squared_gradients(model, [x], forward=forward)
    assert_same_state(before, state_of(model))


def test_dropout_is_off() -> None:
    model = noisy_model()
    x = torch.randn(5, 4)
    assert torch.equal(
        squared_gradients(model, [x])["0.weight"], squared_gradients(model.eval(), [x])["0.weight"]
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "lstm"])
def test_scores_under_no_grad_and_inference_mode(name: str, mode: Any) -> None:
    model, batch = make(name)
    expected = squared_gradients(model, [batch])
    accumulator = SaliencyAccumulator(model)
    with mode():
        accumulator.update(batch.clone(), model(batch))
    assert reference.largest_error(accumulator.compute(), expected) < 1e-10


def test_float32_is_close_to_float64() -> None:
    for name in ("mlp", "conv2d", "transformer", "batch norm", "tied weights"):
        model, batch = make(name)
        expected = squared_gradients(model, [batch])
        single = copy.deepcopy(model).float()
        found = squared_gradients(single, [batch.float() if batch.is_floating_point() else batch])
        assert all(score.dtype == torch.float32 for score in found.values())
        # Attention's key bias has a true score of 0, where only absolute errors mean anything.
        floor = 1e-9 * max(float(score.max()) for score in expected.values())
        for key, score in expected.items():
            assert float((found[key] - score).abs().max()) < 1e-4 * float(score.max()) + floor, (
                name,
                key,
            )


def test_bfloat16_accumulates_in_float32() -> None:
    model, batch = make("mlp")
    expected = squared_gradients(model, [batch])
    half = copy.deepcopy(model).bfloat16()
    found = squared_gradients(half, [batch.bfloat16()] * 1000)
    for key, score in expected.items():
        assert found[key].dtype == torch.float32
        # bfloat16 itself has 3 digits; a bfloat16 sum over 1000 batches would stop growing at about
        # 256.
        assert float((found[key] / 1000 - score).abs().max()) < 0.1 * float(score.max())


def test_tiny_scores_do_not_underflow() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(1e-3)
        model.bias.copy_(torch.tensor([16.0, 0.0, 0.0]))
    x = torch.randn(6, 4)
    found = squared_gradients(model, [x])
    expected = squared_gradients(copy.deepcopy(model).double(), [x.double()])
    assert 0 < float(expected["weight"].max()) < 1e-10
    assert reference.largest_error(found, expected) < 1e-4


def test_autocast_does_not_touch_the_scores() -> None:
    model, x = make("mlp")
    model, x = model.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = squared_gradients(model, [x])
    assert torch.equal(inside["0.weight"], squared_gradients(model, [x])["0.weight"])


def test_channels_last() -> None:
    model, x = make("conv2d strided, padded, dilated, grouped")
    expected = squared_gradients(model, [x])
    found = squared_gradients(
        model.to(memory_format=torch.channels_last), [x.to(memory_format=torch.channels_last)]
    )
    assert reference.largest_error(found, expected) < 1e-10


def test_a_compiled_module_is_scored_through_the_original() -> None:
    model, x = make("mlp")
    expected = squared_gradients(model, [x])
    compiled = torch.compile(model, backend="eager")
    found = squared_gradients(compiled, [x])
    assert list(found) == [name for name, _ in compiled.named_parameters()]
    for (key, score), other in zip(found.items(), expected.values(), strict=True):
        torch.testing.assert_close(score, other, msg=key)


class Mixing(nn.Module):
    """The batch's mean takes part in every sample's output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0))


class MixingLater(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h - h.mean(0)


def test_mixed_samples_are_refused() -> None:
    # Centred inputs cannot be told from any other data by looking at gradients; mixed activations
    # can.
    with pytest.raises(Exception, match="depend on that sample alone"):
        squared_gradients(MixingLater().double(), [torch.randn(5, 4).double()])


class Switching(nn.Module):
    """Which layer runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.even if float(x.sum()) > 0 else self.odd
        return self.head(layer(x).tanh())


def test_control_flow_that_differs_between_batches() -> None:
    torch.manual_seed(0)
    model = Switching().double()
    up, down = torch.rand(4, 4).double(), -torch.rand(3, 4).double()
    expected = reference.squared_gradients(model, up)
    for key, score in reference.squared_gradients(model, down).items():
        expected[key] = expected[key] + score
    assert reference.largest_error(squared_gradients(model, [up, down]), expected) < 1e-9


class Routed(nn.Module):
    """Each sample goes to one of two experts, so that experts see batches of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            mine = (x[:, 0] > 0) == bool(i)
            out[mine] = expert(x[mine])
        return out


def test_routed_samples() -> None:
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(9, 4).double()
    assert (
        reference.largest_error(
            squared_gradients(model, [x]), reference.squared_gradients(model, x)
        )
        < 1e-9
    )


class Sorted(nn.Module):
    """Positions of all samples are processed in the order of their values.

    That is fine for two samples and mixes more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4).tanh() * torch.ones(4, requires_grad=True).to(x)
        order = x.reshape(-1, 4)[:, 0].argsort()
        back = order.argsort()
        return self.head(self.inner(flat[order])[back].reshape(len(x), -1, 4).tanh().sum(1))


def test_positions_sorted_across_samples() -> None:
    torch.manual_seed(0)
    model, x = Sorted().double(), torch.randn(6, 3, 4).double()
    x[0, :, 0], x[-1, :, 0] = (
        torch.tensor([-9.0, -8.0, -7.0]).double(),
        torch.tensor([7.0, 8.0, 9.0]).double(),
    )
    assert (
        reference.largest_error(
            squared_gradients(model, [x]), reference.squared_gradients(model, x)
        )
        < 1e-9
    )


def test_a_dict_batch_reaches_the_model_by_keyword_and_logits_are_unwrapped() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs: Tensor, scale: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.linear(inputs * scale[:, None]))

    model = Wrapped().double()
    batch = {
        "inputs": torch.randn(5, 4).double(),
        "scale": torch.rand(5).double(),
        "labels": torch.arange(5) % 3,
    }

    def forward(module: nn.Module, part: dict[str, Tensor]) -> Tensor:
        return module(part["inputs"], part["scale"]).logits

    expected = reference.squared_gradients(model, batch, forward=forward)
    assert reference.largest_error(squared_gradients(model, [batch]), expected) < 1e-9
    expected = reference.squared_gradients(model, batch, forward=forward, target="empirical_fisher")
    assert (
        reference.largest_error(
            squared_gradients(model, [batch], target="empirical_fisher"), expected
        )
        < 1e-9
    )


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in CASES
        if n not in ("lstm", "gru", "weight norm", "low rank", "bilinear", "cross attention")
    ],
)
def test_common_layers_do_not_fall_back_to_the_slow_route(name: str) -> None:
    slow = {
        "subclass with its own forward": {"0.weight"},  # a weight computed from the parameter
        "bare parameters": {"w"},
        "position table": {"position.weight"},
        "as many positions as samples": {"position.weight"},
    }
    model, batch = make(name)
    engine = Engine(model)
    engine.check(batch)
    (plan,) = engine._plans._plans.values()
    assert plan.generic == slow.get(name, set())


def test_the_slow_route_reads_one_number_a_sample() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    totals = {"weight": torch.zeros(3, 4)}
    rows = torch.randn(7, 5, 3)
    rows[2:4, 1] = 0.0
    expected = model(x)
    with DeviceReads() as reads:
        add_squared_gradients(model, x, rows, expected, {"weight": model.weight}, totals)
    assert reads.number == 5  # whether it is alone what it is in its batch
    exact = torch.einsum("kno,ni->oi", rows.square(), x.square())
    torch.testing.assert_close(totals["weight"], exact)


def test_an_empty_batch_adds_nothing() -> None:
    model, x = make("mlp")
    accumulator = SaliencyAccumulator(model)
    accumulator.update(x[:0])
    accumulator.update(x)
    assert accumulator.samples == len(x)
    assert torch.equal(accumulator.compute()["0.weight"], squared_gradients(model, [x])["0.weight"])


def test_the_metric_does_not_own_the_model() -> None:
    model, x = make("mlp")
    accumulator = SaliencyAccumulator(model)
    accumulator.update(x)
    assert not list(accumulator.parameters())
    assert not accumulator.state_dict()
    accumulator.reset()
    assert accumulator.samples == 0
    assert not accumulator.sums["0.weight"].any()


@pytest.mark.parametrize("wrong", [[0], [7], [3, 11], list(range(12)), "infinite", "too many"])
def test_given_logits_that_are_not_the_batchs_change_no_score(wrong: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU())
    model.append(nn.Linear(400, 8)).double()
    with torch.no_grad():
        model[4].weight.mul_(12.0)  # of all kinds: sure samples need no row, others several
    x = torch.randn(12, 64).double()
    expected = squared_gradients(model, [x])
    given = model(x).detach()
    if wrong == "infinite":
        given[5, 2] = -float("inf")
    elif wrong == "too many":
        given = torch.cat([given, given])
    else:
        given[wrong] = given[wrong].masked_fill(torch.arange(8) > 3, -50.0)
    accumulator = SaliencyAccumulator(model)
    accumulator.update(x, given)
    assert reference.largest_error(accumulator.compute(), expected) < 1e-6


@pytest.mark.parametrize("wrong", ["none", "all uniform", "all random", "half", "one", "all sure"])
def test_given_logits_do_not_loosen_the_tolerance(wrong: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.Softmax(-1))
    model.append(nn.Linear(400, 80))  # what is below a softmax has no closed head
    with torch.no_grad():
        model[4].weight.mul_(400.0)
    x = torch.randn(32, 64)
    clean = SaliencyAccumulator(model, tolerance=0.05)
    clean.update(x)
    given = model(x).detach()
    if wrong == "all random":
        given = 4 * torch.randn_like(given)
    elif wrong == "all sure":  # so sure that no row is left to see it by
        given = torch.zeros_like(given).index_fill_(1, torch.tensor([0]), 1e4)
    elif wrong != "none":
        given[: {"all uniform": 32, "half": 16, "one": 1}[wrong]] = 0.0
    accumulator = SaliencyAccumulator(model, tolerance=0.05)
    accumulator.update(x, given)
    accumulator.update(x, given)  # nor is it believed again
    assert 0 < clean.dropped_energy <= 0.05
    assert accumulator.dropped_energy == pytest.approx(clean.dropped_energy, rel=1e-4)
    assert accumulator.samples == 2 * clean.samples
    expected = {name: 2 * score for name, score in clean.compute().items()}
    assert reference.largest_error(accumulator.compute(), expected) < 1e-4


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_part_is_scored_like_the_module_it_was_made_from() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten())
    model, x = nn.Sequential(conv, nn.Linear(12, 4)).double(), torch.randn(7, 1, 4, 4).double()
    expected = reference.squared_gradients(model, x)
    scripted = nn.Sequential(torch.jit.script(conv), model[1])
    found = squared_gradients(scripted, [x])
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=0)


# Several processes


def test_a_process_scores_for_itself(tmp_path: Path) -> None:
    """Only the first calls it: nobody is waited for, and the sum is that of one process."""
    torch.multiprocessing.spawn(_score_on_the_first, (str(tmp_path / "store"),), nprocs=2)


def _score_on_the_first(rank: int, store: str) -> None:
    model, x = make("mlp")
    alone = squared_gradients(model, [x])
    join_group(rank, store)
    if rank == 0:
        found = squared_gradients(model, [x])
        assert all(torch.equal(found[name], score) for name, score in alone.items())
    torch.distributed.destroy_process_group()
