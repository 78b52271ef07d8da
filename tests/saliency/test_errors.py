"""What is refused, and what the message says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune.exceptions import BatchFormatError, NonFiniteScoresError, SaliencyError
from lightning_prune.saliency import SaliencyAccumulator, squared_gradients


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_unknown_names_are_listed_with_what_there_is(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\['0.wieght'\].*'0.weight'"):
        squared_gradients(model, [torch.randn(2, 4)], parameters=["0.wieght"])


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_tolerance_out_of_range(model: nn.Module, tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        squared_gradients(model, [torch.randn(2, 4)], tolerance=tolerance)


@pytest.mark.parametrize("argument", ["target", "likelihood"])
def test_unknown_target_or_likelihood_before_any_data(model: nn.Module, argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` to be one of"):
        SaliencyAccumulator(model, **{argument: "hinge"})


def test_no_batches(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        squared_gradients(model, [])


@pytest.mark.parametrize("batch", ["text", 3, {"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, []])
def test_a_batch_the_default_forward_cannot_read(model: nn.Module, batch: object) -> None:
    with pytest.raises(BatchFormatError, match="forward=lambda module, batch: logits"):
        squared_gradients(model, [batch])


def test_a_model_that_does_not_take_the_batch(model: nn.Module) -> None:
    with pytest.raises(BatchFormatError, match=r"(?s)shape \(2, 9\).*forward=lambda"):
        squared_gradients(model, [torch.randn(2, 9)])


def test_an_output_that_is_no_tensor() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": super().forward(x)}

    with pytest.raises(BatchFormatError, match="logits as a tensor"):
        squared_gradients(Odd(4, 3), [torch.randn(2, 4)])


def test_missing_labels(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="the batch has none"):
        squared_gradients(model, [torch.randn(2, 4)], target="empirical_fisher")


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3]), torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]])]
)
def test_labels_that_do_not_fit(model: nn.Module, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="labels"):
        squared_gradients(model, [(torch.randn(2, 4), labels)], target="label_probability")


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("target", ["probability", "fisher"])
def test_labels_that_no_target_reads_may_have_any_shape(
    model: nn.Module, likelihood: Any, target: Any
) -> None:
    x, options = torch.randn(5, 4), {"likelihood": likelihood, "target": target}
    expected = squared_gradients(model, [x], **options)
    found = squared_gradients(model, [(x, torch.arange(5))], **options)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=0, atol=0)


def test_one_column_is_not_categorical() -> None:
    with pytest.raises(ValueError, match="bernoulli"):
        squared_gradients(nn.Linear(4, 1), [torch.randn(2, 4)])


def test_a_gaussian_has_no_label_probability(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="density"):
        SaliencyAccumulator(model, target="label_probability", likelihood="gaussian")


def test_non_finite_logits_name_sample_and_layer(model: nn.Module) -> None:
    x = torch.randn(4, 4)
    x[2, 1] = float("nan")
    with pytest.raises(NonFiniteScoresError, match=r"(?s)sample 2 .*'0'"):
        squared_gradients(model, [x])


def test_a_parameter_without_gradient_path_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(SaliencyError, match=r"spare\.weight.*parameters="):
        squared_gradients(Unused(), [torch.randn(2, 4)])


def test_outputs_that_depend_on_no_parameter() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(SaliencyError, match="gradient path"):
        squared_gradients(Detached(4, 3), [torch.randn(2, 4)])


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False).eval()]
)
def test_batch_statistics_are_refused_by_name(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3))
    with pytest.raises(SaliencyError, match="layer '1'"):
        squared_gradients(model, [torch.randn(3, 4)])
    assert model.training


def test_functional_batch_statistics_are_refused() -> None:
    class Functional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(super().forward(x), None, None, training=True)

    with pytest.raises(SaliencyError, match="running statistics"):
        squared_gradients(Functional(4, 3), [torch.randn(3, 4)])


def test_logits_without_a_sample_axis(model: nn.Module) -> None:
    with pytest.raises(SaliencyError, match="one row a sample"):
        squared_gradients(
            model, [torch.randn(4, 4)], forward=lambda m, x: m(x).mean(0, keepdim=True)
        )


def test_a_constant_as_long_as_the_batch_is_named(model: nn.Module) -> None:
    def forward(module: nn.Module, batch: Any) -> Tensor:
        return module(batch["x"] * batch["scale"])

    batch = {"x": torch.randn(4, 4), "scale": torch.ones(4)}
    message = r"as on all 4 of them.*shapes \(4, 4\), \(4,\).*a buffer"
    with pytest.raises(BatchFormatError, match=message):
        squared_gradients(model, [batch], forward=forward)
    # ... and only where it is the reason.
    found = squared_gradients(model, [{**batch, "x": torch.randn(5, 4)}], forward=forward)
    assert found.keys() == dict(model.named_parameters()).keys()
    with pytest.raises(KeyError, match="another"):
        squared_gradients(model, [batch], forward=lambda m, b: m(b["another"]))


def test_reentrant_checkpoints_are_refused_with_the_way_out() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self[1], self[0](x), use_reentrant=self.reentrant)
            return self[2](hidden)

    model = Checkpointed(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    model.reentrant = True
    with pytest.raises(SaliencyError, match="use_reentrant=False"):
        squared_gradients(model, [torch.randn(3, 4)])
    model.reentrant = False
    assert squared_gradients(model, [torch.randn(3, 4)])["1.weight"].any()
