"""Copies of real inputs in a generator's place: what is drawn, and where it can be used."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SaliencyPruningCallback, VAEAugmentCallback, prune
from lightning_prune.augment import Generator, TransformedInputs


def shifted(x: Tensor) -> Tensor:
    """Move one picture (8, 8) by up to a pixel along each axis."""
    return x.roll(torch.randint(-1, 2, (2,)).tolist(), (0, 1))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(x).float().div(16).reshape(-1, 8, 8)
    return images[order], torch.from_numpy(y).long()[order]


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = digits[0][:1000], digits[1][:1000]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(
                model(torch.stack([shifted(one) for one in x[index]])), y[index]
            ).backward()
            optimizer.step()
    return model


def test_every_input_is_drawn_once_before_any_is_drawn_twice() -> None:
    source = TransformedInputs(torch.arange(5.0)[:, None], lambda x: x)
    drawn = source.sample(12)[:, 0].long()
    counts = torch.bincount(drawn, minlength=5)
    assert counts.tolist() == torch.bincount(drawn[10:], minlength=5).add(2).tolist()
    assert sorted(drawn[:5].tolist()) == sorted(drawn[5:10].tolist()) == list(range(5))
    assert source.sample(0).shape == (0, 1)


def test_each_input_gets_a_draw_of_its_own_unless_the_transform_takes_them_all() -> None:
    shapes: list[Any] = []

    def noisy(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x + torch.rand(())

    torch.manual_seed(0)
    one = TransformedInputs(torch.zeros(3, 2), noisy).sample(3)
    assert shapes == [(2,)] * 3
    assert len(one[:, 0].unique()) == 3
    together = TransformedInputs(torch.zeros(3, 2), noisy, batched=True).sample(3)
    assert shapes[3:] == [(3, 2)]
    assert len(together[:, 0].unique()) == 1


def test_it_is_a_generator_with_nothing_to_train_or_to_save() -> None:
    source = TransformedInputs(torch.ones(2, 3), lambda x: x)
    assert isinstance(source, Generator)
    assert not list(source.parameters())
    assert source.state_dict() == {}
    assert float(source.loss(torch.ones(4, 3))) == 0


@pytest.mark.parametrize(
    ("inputs", "transform", "error", "words"),
    [
        ([1.0], lambda x: x, TypeError, "`inputs` to be a tensor"),
        (torch.ones(()), lambda x: x, ValueError, r"got shape \(\)"),
        (torch.ones(0, 3), lambda x: x, ValueError, r"got shape \(0, 3\)"),
        (torch.ones(2, 3), "shift", TypeError, "`transform` to be a callable"),
    ],
)
def test_what_it_cannot_draw_from_is_refused(inputs, transform, error, words) -> None:
    with pytest.raises(error, match=words):
        TransformedInputs(inputs, transform)


def test_few_digits_and_their_copies_keep_a_network_better_than_the_digits_alone(
    trained, digits
) -> None:
    few, right = digits[0][1000:1050], []
    for source in (None, TransformedInputs(few, shifted)):
        net = copy.deepcopy(trained)
        options: dict[str, Any] = {"criterion": "obs", "refit": "outputs", "stages": 4}
        if source is not None:
            options |= {"generator": source, "generated": 600}
        prune(net, [few], sparsity=0.9, **options)
        with torch.no_grad():
            found = net(digits[0][1100:]).argmax(1) == digits[1][1100:]
        right.append(float(found.float().mean()))
    assert right[1] > right[0] + 0.02


def test_a_prune_call_fixes_its_draws(trained, digits) -> None:
    found = []
    for _ in range(2):
        net = copy.deepcopy(trained)
        source = TransformedInputs(digits[0][:100], shifted)
        prune(net, [digits[0][:100]], sparsity=0.8, refit=True, generator=source, generated=300)
        found.append(net.state_dict())
        torch.rand(3)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_in_a_fit_it_stands_in_for_the_vae(trained, digits, tmp_path) -> None:
    train, val = (
        DataLoader(TensorDataset(x, y), 50)
        for x, y in ((digits[0][:200], digits[1][:200]), (digits[0][200:300], digits[1][200:300]))
    )
    copies = VAEAugmentCallback(
        TransformedInputs(digits[0][:200], shifted), inject=("saliency", "train")
    )
    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.8}, criterion="obs", refit="layers")
    trainer = L.Trainer(
        max_epochs=3,
        callbacks=[pruner, copies],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
    )
    trainer.fit(Classifier(copy.deepcopy(trained)), train, val)
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)
    assert copies.generate(5).shape == (5, 8, 8)
    assert float(trainer.callback_metrics["vae/distillation"]) >= 0
