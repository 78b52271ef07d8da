"""The layers that can be cut: which axis of which tensor is a unit, and how a cut goes.

A layer has two sides. Its *outputs* are its units (rows of a Linear, output channels of a
convolution), its *inputs* the columns that take another layer's units. A layer that passes
channels through one by one (batch norm, PReLU, a depthwise convolution) has one side only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Side: TypeAlias = Literal["outputs", "inputs", "channels"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    *CONVOLUTIONS,
    *TRANSPOSED,
    *BATCH_NORMS,
    nn.PReLU,
    nn.Embedding,
)


def obstacle(module: nn.Module) -> str | None:
    """Return why a layer can't be cut, ``None`` if it can."""
    known = next((kind for kind in KNOWN if isinstance(module, kind)), None)
    if known is None:
        return f"a {type(module).__name__} is not cut"
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(known, method, None):
            return f"{type(module).__name__} has a {method} of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which may change what goes through it"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    grouped = getattr(module, "groups", 1) > 1
    if grouped and isinstance(module, TRANSPOSED):
        return "it is a transposed convolution with groups"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it renormalises its rows (max_norm)"
    return None


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether each channel goes through a convolution by itself, one in and one out."""
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups > 1
        and module.groups == module.out_channels == module.in_channels
    )


def width(module: nn.Module, side: Side) -> int:
    """Return the number of units on one side of a layer."""
    known: Any = module
    if isinstance(module, nn.Linear):
        size = known.out_features if side == "outputs" else known.in_features
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        size = known.in_channels if side == "inputs" else known.out_channels
    elif isinstance(module, BATCH_NORMS):
        size = known.num_features
    elif isinstance(module, nn.PReLU):
        size = known.num_parameters
    else:
        size = known.embedding_dim
    return int(size)


def sizes(module: nn.Module) -> dict[str, int]:
    """Return the attributes of a layer that say how wide it is.

    Example:
        >>> sizes(nn.Linear(4, 3))
        {'in_features': 4, 'out_features': 3}
    """
    names = [
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "groups",
        "num_features",
        "num_parameters",
        "embedding_dim",
    ]
    return {name: int(getattr(module, name)) for name in names if hasattr(module, name)}


def rows(module: nn.Module) -> Tensor:
    """Return the weights that make each unit, of shape (units, weights)."""
    weight = _weight(module)
    axis = 1 if isinstance(module, (*TRANSPOSED, nn.Embedding)) else 0
    return weight.movedim(axis, 0).flatten(1)


def columns(module: nn.Module) -> Tensor:
    """Return the weights that take each input, of shape (inputs, weights)."""
    weight = _weight(module)
    if isinstance(module, TRANSPOSED):
        return weight.flatten(1)
    groups = int(getattr(module, "groups", 1))
    split = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return split.reshape(weight.shape[1] * groups, -1)


def cut(module: nn.Module, side: Side, gone: Tensor) -> list[tuple[str, Tensor, Mapping[str, int]]]:
    """Say what a layer's tensors become without some of its units; changes nothing.

    Args:
        module: A layer for which :func:`obstacle` is ``None``.
        side: Which units.
        gone: Their indices, shape (gone,); with groups, equally many of each group.

    Returns:
        One entry a tensor that changes: its name in the module, where each entry of the new tensor
        lies in the old one (flat index, int64, in the new shape), and the module's new sizes.
    """
    kept = torch.ones(width(module, side), dtype=torch.bool)
    kept[gone] = False
    index = kept.nonzero()[:, 0]
    if isinstance(module, nn.Linear):
        return _cut_linear(module, side, index)
    if isinstance(module, TRANSPOSED):
        return _cut_transposed(module, side, index)
    if isinstance(module, CONVOLUTIONS):
        return _cut_convolution(module, side, index)
    if isinstance(module, BATCH_NORMS):
        names = ("weight", "bias", "running_mean", "running_var")
        return _along(module, names, 0, index, {"num_features": len(index)})
    if isinstance(module, nn.PReLU):
        return _along(module, ("weight",), 0, index, {"num_parameters": len(index)})
    return _along(module, ("weight",), 1, index, {"embedding_dim": len(index)})


def _cut_linear(
    module: nn.Linear, side: Side, index: Tensor
) -> list[tuple[str, Tensor, Mapping[str, int]]]:
    if side == "outputs":
        return _along(module, ("weight", "bias"), 0, index, {"out_features": len(index)})
    return _along(module, ("weight",), 1, index, {"in_features": len(index)})


def _cut_transposed(
    module: nn.Module, side: Side, index: Tensor
) -> list[tuple[str, Tensor, Mapping[str, int]]]:
    sizes = {"in_channels" if side == "inputs" else "out_channels": len(index)}
    if side == "inputs":
        return _along(module, ("weight",), 0, index, sizes)
    found = _along(module, ("weight",), 1, index, sizes)
    return found + _along(module, ("bias",), 0, index, sizes)


def _cut_convolution(
    module: nn.Module, side: Side, index: Tensor
) -> list[tuple[str, Tensor, Mapping[str, int]]]:
    known: Any = module
    size = len(index)
    if is_depthwise(module):
        sizes = {"in_channels": size, "out_channels": size, "groups": size}
        return _along(module, ("weight", "bias"), 0, index, sizes)
    if side == "outputs":
        return _along(module, ("weight", "bias"), 0, index, {"out_channels": size})
    # Every group keeps equally many of its own inputs, at places of its own.
    groups = int(known.groups)
    each = int(known.in_channels) // groups
    where = (index % each).view(groups, 1, -1)
    shape = _weight(module).shape
    flat = _positions(_weight(module)).view(groups, shape[0] // groups, shape[1], -1)
    places = where[..., None].expand(groups, flat.shape[1], size // groups, flat.shape[3])
    kept = flat.gather(2, places).view(shape[0], size // groups, *shape[2:])
    return [("weight", kept, {"in_channels": size})]


def _along(
    module: nn.Module, names: tuple[str, ...], axis: int, index: Tensor, sizes: Mapping[str, int]
) -> list[tuple[str, Tensor, Mapping[str, int]]]:
    found = []
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            found.append((name, _positions(tensor).index_select(axis, index), sizes))
    return found


def _positions(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel()).view(tensor.shape)


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    if weight is None:
        raise TypeError(f"Expected a layer with a weight, but got {module}.")
    return weight.detach()
