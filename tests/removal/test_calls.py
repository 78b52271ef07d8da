"""A copy of a model runs as the model was written, on tensors of its own."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn

from lightning_prune.removal import RemovalError, compare, shrink
from lightning_prune.removal.calls import copied

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Net(L.LightningModule):
    """Half of its hidden units are dead; a batch norm, since it is traced in another way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.last = None
        with torch.no_grad():
            self.net[3].weight[:, :4] = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Nested(nn.Module):
    """A plain module around a LightningModule that was compiled on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()
        self.inner.compile(backend="eager")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def called_compile() -> nn.Module:
    model = Net()
    model.compile(backend="eager")
    return model


def as_a_trainer_unwraps_it() -> nn.Module:
    return from_compiled(torch.compile(Net(), backend="eager"))


def own_forward_compiled() -> nn.Module:
    model = Net()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def part_compiled() -> nn.Module:
    model = Net()
    model.net = torch.compile(model.net, backend="eager")
    return model.eval()


COMPILED = [
    called_compile,
    as_a_trainer_unwraps_it,
    own_forward_compiled,
    part_compiled,
    lambda: torch.compile(Net(), backend="eager"),
    Nested,
]


@pytest.mark.parametrize("make", COMPILED)
def test_a_smaller_copy_of_a_compiled_model_runs_its_own_weights(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    with torch.no_grad():
        expected = model(X)
        small = shrink(model, example_inputs=X[:4])
        assert [tuple(p.shape) for p in small.parameters()][-2:] == [(3, 4), (3,)]
        torch.testing.assert_close(small(X), expected, rtol=1e-5, atol=1e-6)
        for parameter in small.parameters():
            parameter.zero_()
        assert small(X).abs().max() == 0
        torch.testing.assert_close(model(X), expected, rtol=0, atol=0)  # as it was
    assert str(compare(model, small, X[:4], latency=False))


def test_a_copy_keeps_methods_that_were_not_compiled() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.forward = self.doubled
            self.compiled = torch.compile(self.doubled, backend="eager")

        def doubled(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    model = Own()
    twin = copied(model)
    assert vars(twin)["forward"].__self__ is twin
    assert vars(twin)["compiled"].__self__ is twin
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(twin(X), expected)
        model.layer.weight.zero_()
        assert torch.equal(twin(X), expected)


def test_what_no_copy_can_follow_is_refused() -> None:
    model = Net()
    original = model.forward
    model.forward = lambda x: 2 * original(x)
    with pytest.raises(RemovalError, match="called a Sequential of the original"):
        shrink(model, example_inputs=X[:4])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tensors_with_a_history_are_copied_without_it() -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.hidden = [self.net[0](x)]
            return self.net[3](self.net[2](self.hidden[0]))

    model = Keeps()
    model.last = model(X).sum()
    twin = copied(model)
    assert twin.last.grad_fn is None
    assert twin.last == model.last
    assert model.last.grad_fn is not None
    small = shrink(model, example_inputs=X[:4])
    assert small.net[3].in_features == 4
    with torch.no_grad():
        torch.testing.assert_close(small(X), model(X), rtol=1e-5, atol=1e-6)
