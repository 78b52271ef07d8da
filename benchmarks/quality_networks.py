"""What the quality benchmark prunes: networks, their data in three parts, their dense training.

The test part leaves this file by :func:`test_part` only, and nothing but the function that writes a
row calls it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import networks

BATCH = 64
ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)
PARTS = {8: (1200, 200, 397), 28: (3600, 400, 1000), 32: (3600, 400, 1000)}
"""Image size -> digits for training, for validation (choosing), and for the test."""
SPLIT = 1
"""Which digits are in which part. The recipe was put together by the tables of split 0, which the
benchmarks of generated data still are of."""


@dataclass(frozen=True)
class Subject:
    """A network, the size of its images, and how it is trained before anything is removed."""

    build: Callable[[], nn.Module]
    size: int = 28
    epochs: int = 20
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM
    shifts: bool = False
    batch_norm: bool = False


def mlp(*widths: int, bias: bool = True) -> nn.Module:
    """Return a network of linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Module:
    """Return two 3x3 convolutions with batch norm and two linear layers, for 8x8 images."""
    features: list[nn.Module] = []
    for width_in, width in ((1, 16), (16, 32)):
        features += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


SUBJECTS = {
    # By SGD, as the published ones: Adam moves the weights of rare pixels as far as those of all
    # others, and magnitude without retraining falls to 30 % at a sparsity of 90 %.
    "784-40-20-10": Subject(
        lambda: mlp(784, 40, 20, 10, bias=False),
        epochs=60,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        shifts=True,
    ),
    "784-128-10": Subject(networks.mlp),
    "LeNet-300-100": Subject(lambda: mlp(784, 300, 100, 10)),
    # With channels last a step of training takes three quarters of the time.
    "LeNet-5": Subject(lambda: networks.lenet().to(memory_format=torch.channels_last)),
    "digits-8x8-convnet": Subject(convnet, size=8, batch_norm=True),
    "ResNet-20": Subject(networks.resnet20, size=32, epochs=10, batch_norm=True),
}
"""In the order of the runs."""

Data = tuple[Tensor, Tensor]


@cache
def _digits(size: int, split: int) -> Data:
    if size == 8:
        x, y = load_digits(return_X_y=True)
        images, labels = torch.from_numpy(x).float().div(16).reshape(-1, 1, 8, 8), torch.tensor(y)
    else:
        images, labels = networks.digits(size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(split))
    return images[order], labels.long()[order]


def _part(name: str, index: int, split: int) -> Data:
    size = SUBJECTS[name].size
    x, y = (t.split(PARTS[size])[index] for t in _digits(size, split))
    return x, y


def train_part(name: str, split: int = SPLIT) -> Data:
    """Return the digits to train on and to score on."""
    return _part(name, 0, split)


def validation_part(name: str, split: int = SPLIT) -> Data:
    """Return the digits by which the learning rate is chosen."""
    return _part(name, 1, split)


def test_part(name: str, split: int = SPLIT) -> Data:  # noqa: PT028  (no test)
    """Return the digits that count. Called where a row is written, and nowhere else."""
    return _part(name, 2, split)


class Batches:
    """Training batches of one run: shuffled anew at each pass, in an order fixed by the seed.

    Plain loops and Trainers read the same batches in the same order. With ``shifts`` each batch is
    moved by up to a pixel.
    """

    def __init__(self, name: str, seed: int, split: int = SPLIT) -> None:
        self.x, self.y = train_part(name, split)
        self.shifts = SUBJECTS[name].shifts
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.x) / BATCH)

    def __iter__(self) -> Iterator[Data]:
        for index in torch.randperm(len(self.x), generator=self.generator).split(BATCH):
            x = self.x[index]
            if self.shifts:
                move = torch.randint(-1, 2, (2,), generator=self.generator).tolist()
                x = x.roll(tuple(move), (2, 3))
            yield x, self.y[index]


def moved(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return pictures (N, 1, H, W), each moved by up to ``most`` pixels along both axes."""
    moves = torch.randint(-most, most + 1, (2, len(x), 1), generator=generator)
    rows, columns = (
        (torch.arange(size) - by) % size for size, by in zip(x.shape[2:], moves, strict=True)
    )
    return x.squeeze(1)[
        torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]
    ].unsqueeze(1)


def accuracy(net: nn.Module, data: Data) -> float:
    """Return the percentage that ``net`` gets right, in eval mode."""
    return 100 * (_logits(net, data[0]).argmax(1) == data[1]).double().mean().item()


def mean_loss(net: nn.Module, data: Data) -> float:
    """Return the mean cross entropy, in eval mode."""
    return F.cross_entropy(_logits(net, data[0]), data[1]).item()


@torch.no_grad()
def _logits(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(part) for part in x.split(500)])


def dense(name: str, seed: int, cache_folder: Path, split: int = SPLIT) -> nn.Module:
    """Return the trained network of a seed; all arms of a seed start from this one."""
    subject = SUBJECTS[name]
    torch.manual_seed(seed)
    net = subject.build()
    file = cache_folder / f"{name}-{seed}-split{split}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    batches = Batches(name, seed, split)
    optimizer = subject.optimizer(net.parameters())
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, subject.epochs * len(batches))
    for _ in range(subject.epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            decay.step()
    cache_folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")  # renamed when complete: another may be reading
    torch.save(net.state_dict(), part)
    part.rename(file)
    return net.eval()


def fingerprint(net: nn.Module) -> str:
    """Return a short hash of all weights and statistics: other digits for any other bit."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]
