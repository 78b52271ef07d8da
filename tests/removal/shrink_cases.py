"""Architectures that a cut has to be right for, as makers of (model, example inputs).

All are small; batch norms have statistics as after training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree


class Mapped(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(self, parts: Mapping[str, nn.Module], how: Callable[..., Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.how = how

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.how(self, *args, **kwargs)


class Basic(nn.Module):
    """A residual block, with a projection where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = width_in != width or stride > 1
        projection = nn.Sequential(
            nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )
        self.skip = projection if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.two(F.relu(self.bn1(self.one(x)))))
        return F.relu(y + self.skip(x))


class PreAct(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.bn2(self.one(F.relu(self.bn1(x))))))


class Dense(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Attention(nn.Module):
    """Two heads, written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        mixed = (heads[0] @ heads[1].transpose(-1, -2) / 2).softmax(-1) @ heads[2]
        return self.out(mixed.transpose(1, 2).flatten(2))


def _chain(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


def mlp() -> tuple[nn.Module, Any]:
    return _chain(
        nn.Linear(9, 24), nn.Tanh(), nn.Linear(24, 20), nn.Sigmoid(), nn.Linear(20, 3)
    ), torch.randn(5, 9)


def mlp_batch_norm() -> tuple[nn.Module, Any]:
    parts = [nn.Linear(9, 24, bias=False), nn.BatchNorm1d(24), nn.PReLU(24), nn.Linear(24, 20)]
    return _chain(*parts, nn.PReLU(), nn.Linear(20, 3, bias=False)), torch.randn(5, 9)


def lenet() -> tuple[nn.Module, Any]:
    convs = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convs += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    head = [nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10)]
    return _chain(*convs, *head), torch.randn(3, 1, 16, 16)


def resnet() -> tuple[nn.Module, Any]:
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    blocks = [Basic(8, 8), Basic(8, 12, 2), Basic(12, 12)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
    return _chain(*stem, *blocks, *head), torch.randn(2, 3, 8, 8)


def preact() -> tuple[nn.Module, Any]:
    head = [nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return _chain(nn.Conv2d(3, 8, 3, padding=1), PreAct(8), PreAct(8), *head), torch.randn(
        2, 3, 8, 8
    )


def densenet() -> tuple[nn.Module, Any]:
    parts = [nn.Conv2d(3, 8, 3, padding=1), Dense(8, 6), Dense(14, 6), nn.BatchNorm2d(20)]
    head = [nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(160, 4)]
    return _chain(*parts, *head), torch.randn(2, 3, 8, 8)


def mobilenet() -> tuple[nn.Module, Any]:
    def block(a: int, b: int) -> list[nn.Module]:
        depthwise = [nn.Conv2d(a, a, 3, 1, 1, groups=a, bias=False), nn.BatchNorm2d(a), nn.ReLU6()]
        return [*depthwise, nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6()]

    parts = [nn.Conv2d(3, 8, 3, 2, 1), nn.Hardswish(), *block(8, 12), *block(12, 16)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return _chain(*parts, *head), torch.randn(2, 3, 12, 12)


def grouped() -> tuple[nn.Module, Any]:
    parts = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.GELU()]
    return _chain(
        *parts, nn.Conv2d(24, 12, 1, groups=2), nn.SiLU(), nn.Flatten(), nn.Linear(192, 4)
    ), torch.randn(2, 3, 8, 8)


def depth_multiplier() -> tuple[nn.Module, Any]:
    parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU()]
    parts += [nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4), nn.ReLU()]
    return _chain(*parts, nn.Flatten(), nn.Linear(64, 4)), torch.randn(2, 3, 8, 8)


def decoder() -> tuple[nn.Module, Any]:
    parts = [
        nn.Linear(6, 12),
        nn.ReLU(),
        nn.Unflatten(1, (12, 1, 1)),
        nn.ConvTranspose2d(12, 10, 4),
    ]
    parts += [nn.BatchNorm2d(10), nn.ReLU(), nn.ConvTranspose2d(10, 8, 4, 2, 1), nn.LeakyReLU()]
    return _chain(*parts, nn.ConvTranspose2d(8, 1, 2, 2), nn.Sigmoid()), torch.randn(3, 6)


def unet() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.b(F.max_pool2d(a, 2)))
        up = F.relu(m.up(b))
        return m.out(F.relu(m.join(torch.cat([a, up], 1))))

    parts = {
        "a": nn.Conv2d(2, 8, 3, padding=1),
        "b": nn.Conv2d(8, 12, 3, padding=1),
        "up": nn.ConvTranspose2d(12, 8, 2, 2),
        "join": nn.Conv2d(16, 8, 3, padding=1),
        "out": nn.Conv2d(8, 1, 1),
    }
    return Mapped(parts, how), torch.randn(2, 2, 8, 8)


def conv1d() -> tuple[nn.Module, Any]:
    parts = [nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 3), nn.ELU()]
    return _chain(*parts, nn.MaxPool1d(2), nn.Flatten(), nn.Linear(48, 4)), torch.randn(3, 2, 12)


def conv3d() -> tuple[nn.Module, Any]:
    parts = [nn.Conv3d(1, 6, 3), nn.ReLU(), nn.Conv3d(6, 8, 2), nn.ReLU(), nn.AvgPool3d(2)]
    return _chain(*parts, nn.Flatten(), nn.Linear(8, 4)), torch.randn(3, 1, 5, 5, 5)


def padded_pools() -> tuple[nn.Module, Any]:
    parts = [nn.Conv2d(1, 8, 3), nn.Softplus(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 2)]
    parts += [nn.Tanh(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Flatten()]
    return _chain(*parts, nn.Linear(6, 3)), torch.randn(3, 1, 9, 9)


def reflecting() -> tuple[nn.Module, Any]:
    parts = [
        nn.Conv2d(1, 8, 3),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    ]
    parts += [nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 3, padding="same")]
    return _chain(*parts), torch.randn(3, 1, 6, 6)


def layer_norm() -> tuple[nn.Module, Any]:
    parts = [nn.Linear(9, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 20), nn.ReLU()]
    return _chain(*parts, nn.Linear(20, 3)), torch.randn(5, 9)


def group_norm() -> tuple[nn.Module, Any]:
    parts = [nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()]
    parts += [nn.Conv2d(12, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.Flatten()]
    return _chain(*parts, nn.Linear(96, 3)), torch.randn(3, 1, 8, 8)


def embedding() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        return m.head(m.hidden(m.table(x).mean(1)).relu())

    parts = {"table": nn.Embedding(11, 12), "hidden": nn.Linear(12, 16), "head": nn.Linear(16, 3)}
    return Mapped(parts, how), torch.randint(0, 11, (4, 5))


def transformer() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        return m.head(m.layer(m.into(x)).mean(1))

    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
    parts = {"into": nn.Linear(5, 8), "layer": layer, "head": nn.Linear(8, 3)}
    return Mapped(parts, how), torch.randn(3, 6, 5)


def attention() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        h = m.into(x)
        h = h + m.attention(h)
        return m.head((h + m.two(F.gelu(m.one(h)))).mean(1))

    parts = {
        "into": nn.Linear(5, 8),
        "attention": Attention(8),
        "one": nn.Linear(8, 24),
        "two": nn.Linear(24, 8),
        "head": nn.Linear(8, 3),
    }
    return Mapped(parts, how), torch.randn(3, 6, 5)


def recurrent() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        h = m.gru(m.lstm(m.into(x).relu())[0])[0][:, -1]
        return m.head(m.hidden(h).relu())

    parts = {
        "into": nn.Linear(5, 8),
        "lstm": nn.LSTM(8, 6, batch_first=True),
        "gru": nn.GRU(6, 6, batch_first=True),
        "hidden": nn.Linear(6, 16),
        "head": nn.Linear(16, 3),
    }
    return Mapped(parts, how), torch.randn(3, 4, 5)


def tied() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        code = m.hidden(m.encoder(x).relu()).relu()
        return F.linear(m.back(code), m.encoder.weight.t())

    parts = {
        "encoder": nn.Linear(9, 8),
        "hidden": nn.Linear(8, 12),
        "back": nn.Linear(12, 8),
    }
    return Mapped(parts, how), torch.randn(4, 9)


def twice() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        h = m.shared(m.shared(m.into(x).relu()).relu()).relu()
        return m.head(m.hidden(h).relu())

    parts = {
        "into": nn.Linear(9, 8),
        "shared": nn.Linear(8, 8),
        "hidden": nn.Linear(8, 16),
        "head": nn.Linear(16, 3),
    }
    return Mapped(parts, how), torch.randn(4, 9)


def two_inputs() -> tuple[nn.Module, Any]:
    def how(m: Any, picture: Tensor, words: Tensor) -> Tensor:
        a = m.conv(picture).relu().mean((2, 3))
        b = m.table(words).mean(1)
        return m.head(m.hidden(torch.cat([a, b], 1)).relu())

    parts = {
        "conv": nn.Conv2d(1, 8, 3),
        "table": nn.Embedding(7, 6),
        "hidden": nn.Linear(14, 12),
        "head": nn.Linear(12, 3),
    }
    return Mapped(parts, how), {
        "picture": torch.randn(3, 1, 6, 6),
        "words": torch.randint(0, 7, (3, 4)),
    }


def two_outputs() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> dict[str, Any]:
        features = m.features(m.inner(x).relu())
        return {"features": features, "heads": (m.a(features.relu()), m.b(m.c(features).relu()))}

    parts = {
        "inner": nn.Linear(9, 16),
        "features": nn.Linear(16, 8),
        "a": nn.Linear(8, 3),
        "b": nn.Linear(12, 2),
        "c": nn.Linear(8, 12),
    }
    return Mapped(parts, how), torch.randn(4, 9)


def highway() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        h = m.into(x).relu()
        gate = m.gate(h).sigmoid()
        h = gate * m.value(h).relu() + (1 - gate) * h
        return m.head(h)

    parts = {
        "into": nn.Linear(9, 16),
        "gate": nn.Linear(16, 16),
        "value": nn.Linear(16, 16),
        "head": nn.Linear(16, 3),
    }
    return Mapped(parts, how), torch.randn(4, 9)


def bilinear() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        return x + m.out(m.a(x) * m.b(x)) + m.both(x, x)

    parts = {
        "a": nn.Linear(6, 16),
        "b": nn.Linear(6, 16),
        "out": nn.Linear(16, 6),
        "both": nn.Bilinear(6, 6, 6),
    }
    return Mapped(parts, how), torch.randn(4, 6)


def squeeze_excite() -> tuple[nn.Module, Any]:
    parts = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), SqueezeExcite(8)]
    parts += [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
    return _chain(*parts), torch.randn(3, 1, 6, 6)


def concatenated_input() -> tuple[nn.Module, Any]:
    def how(m: Any, x: Tensor) -> Tensor:
        return m.head(m.hidden(torch.cat([x, m.into(x).relu()], 1)).relu())

    parts = {"into": nn.Linear(5, 8), "hidden": nn.Linear(13, 12), "head": nn.Linear(12, 3)}
    return Mapped(parts, how), torch.randn(4, 5)


def mixer() -> tuple[nn.Module, Any]:
    """Channels and positions of the same number, taken by turns."""

    def how(m: Any, x: Tensor) -> Tensor:
        h = m.into(x).relu()
        h = m.along(h.transpose(1, 2)).relu().transpose(1, 2)
        return m.head(m.hidden(h).relu().sum(1))

    parts = {
        "into": nn.Linear(5, 8),
        "along": nn.Linear(8, 8),
        "hidden": nn.Linear(8, 12),
        "head": nn.Linear(12, 3),
    }
    return Mapped(parts, how), torch.randn(3, 8, 5)


def split_in_two() -> tuple[nn.Module, Any]:
    """A gated unit: one layer, cut into halves that are multiplied."""

    def how(m: Any, x: Tensor) -> Tensor:
        a, b = m.into(x).chunk(2, 1)
        return m.head(a * b.sigmoid())

    return Mapped({"into": nn.Linear(5, 16), "head": nn.Linear(8, 3)}, how), torch.randn(4, 5)


def written_width() -> tuple[nn.Module, Any]:
    """A forward in which the width is a number."""

    def how(m: Any, x: Tensor) -> Tensor:
        h = m.conv(x).relu().reshape(-1, 8 * 16)
        return m.head(m.hidden(h).relu())

    parts = {"conv": nn.Conv2d(1, 8, 3), "hidden": nn.Linear(128, 12), "head": nn.Linear(12, 3)}
    return Mapped(parts, how), torch.randn(3, 1, 6, 6)


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    maker.__name__: maker
    for maker in (
        mlp, mlp_batch_norm, lenet, resnet, preact, densenet, mobilenet, grouped, depth_multiplier,
        decoder, unet, conv1d, conv3d, padded_pools, reflecting, layer_norm, group_norm, embedding,
        transformer, attention, recurrent, tied, twice, two_inputs, two_outputs, highway, bilinear,
        squeeze_excite, concatenated_input, mixer, split_in_two, written_width,
    )
}  # fmt: skip


def made(name: str, seed: int) -> tuple[nn.Module, Any]:
    """Return an architecture with weights, biases and statistics as after training."""
    torch.manual_seed(seed)
    model, inputs = ARCHITECTURES[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.5)
    return model, inputs


def scattered(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Return masks that keep weights here and there."""
    return {n: torch.rand_like(p) >= share for n, p in model.named_parameters() if p.dim() > 1}


def whole_units(model: nn.Module, *, biases: bool) -> dict[str, Tensor]:
    """Return masks that remove the first half of every layer's outputs, but for the last layer's.

    With ``biases`` their biases and what a batch norm does to them go too.
    """
    masks = {}
    last = [name for name, p in model.named_parameters() if p.dim() > 1][-1]
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    for name, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        for local, parameter in module.named_parameters(recurse=False):
            if f"{name}.{local}" == last or (parameter.dim() == 1 and not biases):
                continue
            mask = torch.ones_like(parameter, dtype=torch.bool)
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            axis = int(transposed and parameter.dim() > 1)
            mask.narrow(axis, 0, parameter.shape[axis] // 2).fill_(False)
            if f"{name}.bias" == last.replace("weight", "bias"):
                continue
            masks[f"{name}.{local}".lstrip(".")] = mask
    return masks


def in_double(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


def fresh(inputs: Any, seed: int) -> list[Any]:
    """Return inputs of the same shapes that no proof has seen: wide, tiny, sparse, all zero."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(leaf: Tensor, scale: float, share: float) -> Tensor:
        if not leaf.is_floating_point():
            return leaf.flatten()[torch.randperm(leaf.numel(), generator=generator)].view_as(leaf)
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.double)
        return scale * noise * (torch.rand(leaf.shape, generator=generator) < share)

    kinds = ((1.0, 1.0), (10.0, 1.0), (0.1, 1.0), (3.0, 0.3), (1.0, 0.0))
    return [
        pytree.tree_map(lambda x, a=scale, b=share: drawn(x, a, b), inputs)
        for scale, share in kinds
    ]


def answers(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors in a model's output in eval mode."""
    model.eval()
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def largest_difference(a: nn.Module, b: nn.Module, inputs: Any) -> float:
    """Return the largest difference of two models' outputs, as a share of their scale."""
    worst = 0.0
    for x, y in zip(answers(a, inputs), answers(b, inputs), strict=True):
        assert x.shape == y.shape
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp(min=1e-12)))
    return worst


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy with the removed weights at zero: what a smaller one has to equal."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return twin
