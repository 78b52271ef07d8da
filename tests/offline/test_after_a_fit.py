"""A LightningModule after its fit: its Trainer is still there, but nobody collects what it logs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_prune import compare, prune, squared_gradients
from tests.callbacks.pruning_cases import Digits, digits, loaders, trainer, zeros


class Logging(Digits):
    """Logs in its forward, which Lightning allows in the steps of a fit only."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.log("largest", logits.max(), batch_size=len(x))
        self.log_dict({"smallest": logits.min()}, batch_size=len(x))
        return logits


@pytest.fixture
def fitted() -> Logging:
    torch.manual_seed(1)
    model = Logging()
    trainer(max_epochs=1).fit(model, *loaders())
    return model


class Noise:
    def sample(self, n: int) -> Tensor:
        return torch.rand(n, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"refit": "layers"},
        {"criterion": "obs", "refit": "outputs"},
        {"criterion": "obc"},
        {"criterion": "magnitude", "refit": "layers", "generator": Noise(), "generated": "auto"},
    ],
)
def test_it_can_be_pruned_though_its_forward_logs(fitted: Logging, options: Any) -> None:
    with pytest.raises(
        MisconfigurationException, match="result collection"
    ):  # what the passes would meet
        fitted(digits()[0][:2])
    prune(fitted, [digits()[0][:100]], sparsity=0.5, **options)
    assert zeros(fitted) == 888
    assert not {"log", "log_dict"} & set(vars(fitted))
    trainer(max_epochs=1).fit(fitted, *loaders())  # where it logs again


def test_it_can_be_scored_and_compared(fitted: Logging) -> None:
    fitted.eval()
    x = digits()[0][:50]
    assert set(squared_gradients(fitted, [x])) >= {"net.0.weight", "net.3.weight"}
    assert compare(fitted, fitted, x, latency=False).agreement.absolute == 0
