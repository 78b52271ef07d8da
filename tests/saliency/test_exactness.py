"""Scores against their definition, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from lightning_prune.saliency import SaliencyAccumulator, Target, squared_gradients
from tests import reference
from tests.cases import CASES, make


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_agrees_with_the_one_sample_loop(name: str) -> None:
    model, batch = make(name)
    expected = reference.squared_gradients(model, batch)
    assert reference.largest_error(squared_gradients(model, [batch]), expected) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_splitting_and_reordering_the_data_changes_nothing(name: str) -> None:
    model, batch = make(name)
    whole = squared_gradients(model, [batch])
    parts = squared_gradients(model, [batch[2:].flip(0), batch[:2]])
    assert reference.largest_error(parts, whole) < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "conv2d strided, padded, dilated, grouped",
        "conv1d same padding",
        "batch norm",
        "layer norm",
        "embedding with padding",
    ],
)
def test_scores_equal_the_jacobian_of_the_softmax(name: str) -> None:
    model, batch = make(name)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def probability(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, weights, (x[None],))[0].softmax(-1)

    jacobian = vmap(jacrev(probability), in_dims=(None, 0))(parameters, batch)
    expected = {k: j.square().sum((0, 1)) for k, j in jacobian.items()}
    found = squared_gradients(model, [batch])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10 * float(value.max()))


@pytest.mark.parametrize(
    "target", ["probability", "label_probability", "fisher", "empirical_fisher"]
)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "dense prediction", "lstm"])
def test_every_target_with_classes(name: str, target: str) -> None:
    model, x = make(name)
    with torch.no_grad():
        logits = model(x)
    y = torch.randint(0, logits.shape[1], (len(x), *logits.shape[2:]))
    expected = reference.squared_gradients(model, (x, y), target=target)
    assert (
        reference.largest_error(squared_gradients(model, [(x, y)], target=target), expected) < 1e-9
    )


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(
    "target", ["probability", "label_probability", "fisher", "empirical_fisher"]
)
def test_other_likelihoods(likelihood: str, target: str) -> None:
    if (likelihood, target) == ("gaussian", "label_probability"):
        pytest.skip("a density has no probability; refused, see test_errors")
    model, x = make("mlp")
    y = torch.randint(0, 2, (len(x), 4)).double()
    options = {"target": target, "likelihood": likelihood}
    expected = reference.squared_gradients(model, (x, y), **options)
    assert reference.largest_error(squared_gradients(model, [(x, y)], **options), expected) < 1e-9


def test_one_output_a_sample_without_a_class_axis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    x = torch.randn(5, 4).double()
    expected = reference.squared_gradients(model, x, likelihood="bernoulli")
    assert (
        reference.largest_error(squared_gradients(model, [x], likelihood="bernoulli"), expected)
        < 1e-9
    )


@pytest.mark.parametrize("target", get_args(Target))
def test_ignored_labels_are_no_predictions(target: Target) -> None:
    model, x = make("dense prediction")
    y = torch.randint(0, 3, (3, 3, 3))
    y[0, 1:] = y[2, :, 0] = -100
    expected = reference.squared_gradients(model, (x, y), target=target)
    found = squared_gradients(model, [(x, y)], target=target)
    assert reference.largest_error(found, expected) < 1e-9
    y[0] = -100
    less = squared_gradients(model, [(x, y)], target=target)
    assert sum(map(torch.sum, less.values())) < sum(map(torch.sum, found.values()))


def test_a_sample_without_a_label_predicts_all_the_same() -> None:
    model, x = make("mlp")
    found = squared_gradients(model, [(x, torch.full((len(x),), -100))])
    assert reference.largest_error(found, squared_gradients(model, [x])) == 0.0


def test_it_is_not_the_square_of_the_batch_gradient() -> None:
    model, x = make("mlp")
    p = model(x).softmax(-1)
    wrong = sum(
        torch.autograd.grad(p[:, c].sum(), model[0].weight, retain_graph=True)[0].square()
        for c in range(p.shape[1])
    )
    right = squared_gradients(model, [x])["0.weight"]
    assert (wrong - right).abs().max() > 0.05 * right.max()


def test_named_parameters_only_and_frozen_ones_too() -> None:
    model, x = make("mlp")
    model[0].weight.requires_grad_(False)
    found = squared_gradients(model, [x], parameters=["0.weight"])
    assert list(found) == ["0.weight"]
    assert not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)
    torch.testing.assert_close(found["0.weight"], squared_gradients(model, [x])["0.weight"])


def test_a_tied_parameter_answers_to_either_name() -> None:
    model, x = make("tied weights")
    first = squared_gradients(model, [x], parameters=["table.weight"])["table.weight"]
    second = squared_gradients(model, [x], parameters=["head.weight"])["head.weight"]
    torch.testing.assert_close(first, second)


def test_known_logits_change_nothing() -> None:
    model, x = make("conv2d strided, padded, dilated, grouped")
    with torch.no_grad():
        logits = model(x)
    with_logits, without = SaliencyAccumulator(model), SaliencyAccumulator(model)
    with_logits.update(x, logits)
    without.update(x)
    assert reference.largest_error(with_logits.compute(), without.compute()) < 1e-10


class Overlapping(nn.Module):
    """A unit may be the largest of two neighbourhoods, which two samples need not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.max_pool1d(self.first(x)[:, None], 2, stride=1)[:, 0]
        return self.head(pooled)


HEADS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "linear": (lambda: nn.Linear(4, 3), True),
    "one hidden layer": (lambda: mlp(nn.ReLU()), True),
    "in place": (lambda: mlp(nn.ReLU(inplace=True)), True),
    "tanh, dropout, gelu": (lambda: mlp(nn.Tanh(), nn.Dropout(), nn.GELU()), True),
    "two hidden layers": (lambda: mlp(nn.ReLU(), nn.Linear(6, 6), nn.ReLU()), False),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(6), nn.ReLU()), False),
    "overlapping maxima": (Overlapping, False),
    "softmax inside": (lambda: mlp(nn.Softmax(-1)), False),
}


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 3))


@pytest.mark.parametrize("target", ["probability", "fisher"])
@pytest.mark.parametrize("name", HEADS)
def test_all_class_rows_at_once_where_squares_are_enough(name: str, target: str) -> None:
    build, expected_head = HEADS[name]
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(40, 4).double()
    accumulator = SaliencyAccumulator(model, target=target)
    accumulator.update(x)
    assert accumulator._engine._plans.latest.head is expected_head
    exact = reference.squared_gradients(model, x, target=target)
    assert reference.largest_error(accumulator.compute(), exact) < 1e-9


def test_the_head_keeps_its_digits_where_every_sample_is_sure() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(40, 4)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([12.0, 0.0, -1.0]))
    exact = reference.squared_gradients(copy.deepcopy(model).double(), x.double())
    assert reference.largest_error(squared_gradients(model, [x]), exact) < 1e-4


@pytest.mark.parametrize("wrong", [lambda z: z + 1.0, lambda z: z[:, :2], lambda z: z.flip(0)])
def test_logits_that_are_not_this_batchs_are_not_believed(
    wrong: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model, x = make("transformer")
    accumulator = SaliencyAccumulator(model, tolerance=1e-2)
    with torch.no_grad():
        accumulator.update(x, wrong(model(x)))
    expected = squared_gradients(model, [x], tolerance=1e-2)
    assert reference.largest_error(accumulator.compute(), expected) < 1e-10


def test_a_layer_without_gradient_on_the_first_batch_is_proved_later() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(0.1)
        model[0].weight.fill_(1.0)
    batches = [-torch.ones(3, 4).double(), torch.rand(5, 4).double()]
    accumulator = SaliencyAccumulator(model)
    accumulator.update(batches[0])
    (plan,) = accumulator._engine._plans._plans.values()
    assert plan.unproved == {"0.weight", "0.bias", "2.weight"}
    accumulator.update(batches[1])
    assert not plan.unproved
    expected = reference.squared_gradients(model, torch.cat(batches))
    assert reference.largest_error(accumulator.compute(), expected) < 1e-9


@pytest.mark.parametrize("workspace", [1, 10_000, 2**28])
@pytest.mark.parametrize(
    "name",
    ["conv2d", "transformer", "transposed conv2d, grouped", "tied weights", "dense prediction"],
)
def test_a_small_workspace_changes_nothing(name: str, workspace: int) -> None:
    model, batch = make(name)
    expected = squared_gradients(model, [batch])
    assert (
        reference.largest_error(squared_gradients(model, [batch], workspace=workspace), expected)
        < 1e-10
    )
