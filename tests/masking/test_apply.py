"""Masked weights are +0.0 after every step of real optimizers, and nothing is left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_prune.masking import MaskKeeper

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
}


@pytest.fixture
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:256] / 16, dtype=torch.float32), torch.tensor(y[:256])


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def train(model, optimizer, digits, steps=5) -> None:
    x, y = digits
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def random_masks(model, density=0.3):
    return {n: torch.rand(p.shape) < density for n, p in model.named_parameters() if p.ndim > 1}


def assert_masked(tensor, mask) -> None:
    removed = tensor.detach()[~mask]
    assert torch.equal(removed, torch.zeros_like(removed))
    assert not torch.signbit(removed).any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_and_optimizer_state_stay_zero(kind, digits) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, digits)  # fills the state before there are masks
    parameters, masks = dict(model.named_parameters()), random_masks(model)
    keeper = MaskKeeper().attach(parameters, [optimizer])
    keeper.update(masks)
    for step in range(6):
        if step:
            train(model, optimizer, digits, steps=1)
        for name, mask in masks.items():
            assert_masked(parameters[name], mask)
            state = optimizer.state[parameters[name]].values()
            moments = [s for s in state if isinstance(s, torch.Tensor) and s.shape == mask.shape]
            assert moments
            for moment in moments:
                assert_masked(moment, mask)
            assert parameters[name].detach()[mask].ne(0).all()  # the others live on
    keeper.release()


def test_an_optimizer_that_moves_weights_without_gradient_is_followed_too(digits) -> None:
    class Langevin(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)

    model = make_model()
    optimizer = Langevin(model.parameters(), lr=0.1)
    masks = random_masks(model)
    with MaskKeeper(masks).attach(dict(model.named_parameters()), [optimizer]):
        for _ in range(3):
            train(model, optimizer, digits, steps=1)
            for name, mask in masks.items():
                assert_masked(model.get_parameter(name), mask)


def test_without_the_hooks_momentum_would_revive_them(digits) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, digits)
    parameters, masks = dict(model.named_parameters()), random_masks(model)
    with MaskKeeper(masks).attach(parameters, [optimizer]):
        assert_masked(parameters["0.weight"], masks["0.weight"])
    train(model, optimizer, digits, steps=1)
    assert parameters["0.weight"].detach()[~masks["0.weight"]].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_width_becomes_plus_zero_also_from_nan_and_below(dtype) -> None:
    weight = nn.Parameter(torch.tensor([-1.0, torch.nan, torch.inf, -torch.inf, 2.0], dtype=dtype))
    mask = torch.tensor([False, False, False, False, True])
    MaskKeeper({"w": mask}).attach({"w": weight}, [])
    assert_masked(weight, mask)
    assert weight[-1] == 2.0


def test_weights_need_not_be_contiguous() -> None:
    weight = nn.Parameter(torch.rand(6, 4).t() + 1)
    mask = torch.rand(4, 6) < 0.5
    MaskKeeper({"w": mask}).attach({"w": weight}, [])
    assert torch.equal(weight != 0, mask)


def test_gradients_of_masked_weights_do_not_count_in_a_norm(digits) -> None:
    model = make_model()
    parameters, masks = dict(model.named_parameters()), random_masks(model)
    keeper = MaskKeeper(masks).attach(parameters, [])
    nn.functional.cross_entropy(model(digits[0]), digits[1]).backward()
    full = {name: p.grad.clone() for name, p in parameters.items()}
    keeper.zero_gradients()
    for name, parameter in parameters.items():
        kept = masks.get(name, torch.ones_like(parameter).bool())
        assert torch.equal(parameter.grad, torch.where(kept, full[name], 0.0))


def test_sparse_gradients() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    mask = torch.rand(10, 4) < 0.5
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    with MaskKeeper({"weight": mask}).attach(dict(model.named_parameters()), [optimizer]):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 1, 7])).square().sum().backward()
            optimizer.step()
            assert_masked(model.weight, mask)
            for state in optimizer.state[model.weight].values():
                if isinstance(state, torch.Tensor) and state.shape == mask.shape:
                    assert_masked(state, mask)


def closure_of(model, optimizer, digits):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(digits[0]), digits[1])
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_momenta_stay_zero_in_a_step_with_a_closure(kind, by_name, digits) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    masks = random_masks(model)
    closure = closure_of(model, optimizer, digits)
    with MaskKeeper(masks).attach(dict(model.named_parameters()), [optimizer]):
        for _ in range(3):
            loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            assert loss > 0  # the closure's own result comes through
            for name, mask in masks.items():
                assert_masked(model.get_parameter(name), mask)
                for state in optimizer.state[model.get_parameter(name)].values():
                    if isinstance(state, torch.Tensor) and state.shape == mask.shape:
                        assert state[~mask].eq(0).all()


def test_every_evaluation_of_lbfgs_is_of_masked_weights(digits) -> None:
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    masks, parameters = random_masks(model), dict(model.named_parameters())
    closure = closure_of(model, optimizer, digits)

    def watched():
        for name, mask in masks.items():
            assert parameters[name].detach()[~mask].eq(0).all()
        return closure()

    optimizer.step(closure)  # a history of steps that moved every weight
    keeper = MaskKeeper().attach(parameters, [optimizer])
    keeper.update(masks)
    for _ in range(3):
        optimizer.step(watched)
    history = optimizer.state[model[0].weight]
    assert len(history["old_dirs"]) > 1
    keeper.update(masks)
    assert optimizer.state[model[0].weight] is history
    assert len(history["old_dirs"]) > 1  # nothing new: nothing forgotten
    keeper.update(random_masks(model, density=0.1))
    assert not optimizer.state[model[0].weight]
    keeper.release()


def test_an_optimizer_that_joins_brings_no_momentum_along(digits) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, digits)
    masks = random_masks(model)
    with MaskKeeper(masks).attach(dict(model.named_parameters()), []) as keeper:
        keeper.follow([optimizer])
        for name, mask in masks.items():
            assert_masked(optimizer.state[model.get_parameter(name)]["exp_avg"], mask)


def test_frozen_parameters_are_masked_and_stay_frozen(digits) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    masks = random_masks(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with MaskKeeper(masks).attach(dict(model.named_parameters()), [optimizer]):
        train(model, optimizer, digits)
        assert_masked(model[0].weight, masks["0.weight"])
        assert not model[0].weight.requires_grad
        assert model[2].weight.requires_grad


def test_nothing_is_left_behind_also_after_an_exception(digits) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    identities = {name: id(p) for name, p in model.named_parameters()}
    keys, attributes = list(model.state_dict()), {m: set(vars(m)) for m in model.modules()}
    keeper = MaskKeeper(random_masks(model))

    def interrupted() -> None:
        with keeper.attach(dict(model.named_parameters()), [optimizer]):
            train(model, optimizer, digits)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not keeper.attached
    assert keeper.masks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == keys
    assert {m: set(vars(m)) for m in model.modules()} == attributes
    assert all(type(p) is nn.Parameter and not p._backward_hooks for p in model.parameters())


def test_optimizers_can_join_later_and_are_hooked_once(digits) -> None:
    model = make_model()
    first, second = (OPTIMIZERS["sgd"](model.parameters()) for _ in range(2))
    with MaskKeeper(random_masks(model)).attach(dict(model.named_parameters()), [first]) as keeper:
        keeper.follow([first, second])
        keeper.follow([first, second])
        assert len(first._optimizer_step_post_hooks) == len(second._optimizer_step_post_hooks) == 1
        train(model, second, digits)
        for name, mask in keeper.masks.items():
            assert_masked(model.get_parameter(name), mask)


def test_masks_are_the_keepers_own() -> None:
    mask = torch.tensor([True, False])
    keeper = MaskKeeper({"w": mask})
    mask.fill_(False)
    keeper.masks["w"].fill_(False)
    assert keeper.masks["w"].tolist() == [True, False]
    held = keeper.in_force
    assert keeper.in_force["w"] is held["w"]  # no copy
    keeper.update({"w": torch.tensor([False, False])})
    held.clear()
    assert keeper.masks["w"].tolist() == [False, False]


def test_masks_that_were_read_stay_what_they_were() -> None:
    keeper = MaskKeeper({"w": torch.tensor([True, False])})
    before = keeper.in_force
    parameters = {"w": nn.Parameter(torch.ones(2))}
    with keeper.attach(parameters, [torch.optim.SGD(parameters.values(), lr=0.1)]):
        keeper.update({"w": torch.tensor([False, False])})
        keeper.enforce()
    assert before["w"].tolist() == [True, False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
def test_a_copy_takes_the_masks_and_not_the_model(copied) -> None:
    model = make_model()
    keeper = MaskKeeper(random_masks(model))
    keeper.attach(dict(model.named_parameters()), [OPTIMIZERS["sgd"](model.parameters())])
    other = copied(keeper)
    assert keeper.attached
    assert not other.attached
    assert all(torch.equal(other.masks[name], mask) for name, mask in keeper.masks.items())
    other.update({})
    assert keeper.masks
    other.release()


def test_masks_of_another_model_are_refused() -> None:
    weights = {"w": nn.Parameter(torch.ones(2, 3))}
    masks = {"w": torch.ones(3, 2).bool(), "v": torch.ones(1).bool()}
    with pytest.raises(ValueError, match=r"another model:\n.*'w'.*\(3, 2\).*\n.*'v'"):
        MaskKeeper(masks).attach(weights, [])
    keeper = MaskKeeper().attach(weights, [])
    with pytest.raises(ValueError, match="'v'"):
        keeper.update(masks)
    assert weights["w"].ne(0).all()
