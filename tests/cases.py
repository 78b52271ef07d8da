"""Architectures that the scores have to be right for, as (model, batch) makers.

All are small, in float64 and in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Lambda(nn.Module):
    """A module from a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Twice(nn.Module):
    """A module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).relu())


class Tied(nn.Module):
    """One matrix, as table and as output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh().mean(1))


class Scaled(nn.Linear):
    """A subclass of a known layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2.0 + 0.1, self.bias)


class Functional(nn.Module):
    """Parameters without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4))
        self.gain, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.w).tanh() * self.gain - self.shift) @ self.w.t()


class Transformer(nn.Module):
    """Class token, positions, encoder layers."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.table(x) + self.position], 1)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return self.head(x[:, 0] if self.batch_first else x[0])


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 8))
        self.attention = nn.MultiheadAttention(
            8, 2, kdim=6, vdim=6, add_bias_kv=True, batch_first=True
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(self.query.expand(len(x), -1, -1), x, x)
        return self.head(out.flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class TimeDistributed(nn.Module):
    """Frames folded into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        frames = self.conv(x.flatten(0, 1)).relu().flatten(1)
        return self.head(frames.reshape(n, t, -1).mean(1))


class PositionTable(nn.Module):
    """A look-up that no sample takes part in."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.position, self.head = (
            nn.Embedding(7, 6),
            nn.Embedding(4, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return self.head((self.table(x) + self.position(places)).tanh().sum(1))


class InPlace(nn.Module):
    """Outputs and inputs of layers changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu_()
        h = h + self.second(h).mul_(0.5)
        return self.third(h.sigmoid_())


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.u @ self.v)


class Gpt2Conv(nn.Module):
    """A linear layer as GPT-2's code writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, 4), self.weight)
        return flat.reshape(*x.shape[:-1], 6).tanh().mean(1)


def real(*shape: int) -> Tensor:
    return torch.randn(*shape)


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def conv(layer: nn.Module, *rest: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), *rest, nn.Flatten(), nn.LazyLinear(3))


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "linear": lambda: (nn.Linear(4, 3), real(5, 4)),
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), real(7, 6)),
    "linear over a sequence": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        real(5, 3, 4),
    ),
    "conv1d same padding": lambda: (
        conv(nn.Conv1d(2, 4, 3, padding="same", dilation=2)),
        real(4, 2, 7),
    ),
    "conv2d": lambda: (conv(nn.Conv2d(2, 4, 3)), real(4, 2, 6, 6)),
    "conv2d strided, padded, dilated, grouped": lambda: (
        conv(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2)),
        real(4, 4, 7, 6),
    ),
    "conv2d depthwise": lambda: (conv(nn.Conv2d(4, 8, 3, groups=4, bias=False)), real(3, 4, 5, 5)),
    "conv2d circular": lambda: (
        conv(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
        real(3, 2, 5, 5),
    ),
    "conv2d reflect": lambda: (
        conv(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")),
        real(3, 2, 5, 5),
    ),
    "conv2d replicate": lambda: (
        conv(nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate")),
        real(3, 2, 5, 5),
    ),
    "conv3d": lambda: (conv(nn.Conv3d(2, 3, 2, stride=2)), real(3, 2, 4, 5, 4)),
    "transposed conv1d": lambda: (
        conv(nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1)),
        real(3, 2, 5),
    ),
    "transposed conv2d, grouped": lambda: (
        conv(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
        ),
        real(3, 4, 4, 5),
    ),
    "transposed conv3d": lambda: (conv(nn.ConvTranspose3d(2, 2, 2, stride=2)), real(2, 2, 2, 3, 2)),
    "embedding with padding": lambda: (
        nn.Sequential(nn.Embedding(8, 5, padding_idx=2), nn.Flatten(), nn.Linear(20, 3)),
        ids(8, 6, 4),
    ),
    "layer norm": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
        real(5, 4),
    ),
    "rms norm": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 3)),
        real(5, 2, 4)[:, 0],
    ),
    "group norm": lambda: (conv(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)), real(4, 2, 4, 4)),
    "instance norm": lambda: (
        conv(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True)),
        real(4, 2, 4, 4),
    ),
    "batch norm": lambda: (conv(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)), real(4, 2, 4, 4)),
    "residual": lambda: (
        nn.Sequential(
            nn.Linear(4, 6),
            Residual(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)),
            nn.Linear(6, 3),
        ),
        real(5, 4),
    ),
    "module called twice": lambda: (Twice(), real(5, 5)),
    "tied weights": lambda: (Tied(), ids(9, 5, 4)),
    "subclass with its own forward": lambda: (
        nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        real(5, 4),
    ),
    "bare parameters": lambda: (Functional(), real(6, 5)),
    "transformer": lambda: (Transformer(), ids(20, 4, 5)),
    "transformer, sequence first": lambda: (Transformer(batch_first=False), ids(20, 5, 5)),
    "transformer, norm first": lambda: (Transformer(norm_first=True), ids(20, 3, 5)),
    "cross attention": lambda: (CrossAttention(), real(4, 3, 6)),
    "lstm": lambda: (Recurrent(nn.LSTM), real(4, 3, 4)),
    "gru": lambda: (Recurrent(nn.GRU), real(4, 3, 4)),
    "frames folded into the batch": lambda: (TimeDistributed(), real(4, 3, 1, 4, 4)),
    "position table": lambda: (PositionTable(), ids(7, 5, 4)),
    "as many positions as samples": lambda: (PositionTable(), ids(7, 4, 4)),
    "changed in place": lambda: (InPlace(), real(5, 5)),
    "weight norm": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        real(5, 4),
    ),
    "low rank": lambda: (LowRank(), real(5, 5)),
    "addmm": lambda: (Gpt2Conv(), real(5, 3, 4)),
    "dense prediction": lambda: (
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1)),
        real(3, 1, 3, 3),
    ),
    "bilinear": lambda: (SelfBilinear(), real(5, 4)),
}


class SelfBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x.flip(1))


def make(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """Build a case in float64 and eval mode."""
    torch.manual_seed(seed)
    model, batch = CASES[name]()
    with torch.no_grad():
        model(batch)  # materialises lazy layers
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model, batch.double() if batch.is_floating_point() else batch
