"""The 2:4 form of NVIDIA's tensor cores: two of four weights, stored without the other two.

Enters: a model with linear layers of that pattern on a CUDA device. Leaves: a copy that stores them
so, or an error that says what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.removal.calls import Model, copied

CAPABILITY = (8, 0)
"""The first generation with sparse tensor cores is Ampere."""
MULTIPLES = {
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.int8: (32, 128),
}
"""By dtype: what D_out and D_in have to be multiples of, for torch's CUTLASS and cuSPARSELt kernels
alike."""


def to_semi_structured(model: Model, *, layers: Iterable[str] | None = None) -> Model:
    """Return a copy whose 2:4 sparse linear layers are stored and multiplied as such.

    Uses ``torch.sparse.to_sparse_semi_structured`` (Mishra et al., 2021, Accelerating sparse deep
    neural networks). Half of the products and a bit more than half of the memory are left of these
    layers. For inference: the weights are no longer trainable.

    Args:
        model: The model, on a CUDA device; it is left as it was.
        layers: Names of the linear layers to convert. By default, all of pattern 2:4.

    Raises:
        ValueError: A layer that should be converted cannot be; the message names all faults.

    Example:
        >>> layer = nn.Linear(64, 32).half()
        >>> _ = layer.weight.data[:, ::2].zero_()
        >>> to_semi_structured(nn.Sequential(layer))
        Traceback (most recent call last):
        ValueError: Expected linear layers that the GPU can multiply in 2:4 form, but:
        - '0': is on cpu; move the model to a CUDA device first
    """
    small = copied(model)
    modules = dict(small.named_modules())
    wanted = _two_of_four_layers(modules) if layers is None else list(layers)
    faults = [fault for name in wanted for fault in layer_faults(name, modules.get(name))]
    if not wanted:
        faults = ["no linear layer has at least two zeros in each four weights; prune with N:M 2:4"]
    if faults:
        raise ValueError(
            "\n- ".join(
                ["Expected linear layers that the GPU can multiply in 2:4 form, but:", *faults]
            )
        )
    for name in wanted:
        layer: Any = modules[name]
        sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return small


def layer_faults(name: str, layer: nn.Module | None) -> list[str]:
    """Return why a layer cannot be stored in 2:4 form, one line a reason; empty if it can.

    Example:
        >>> for fault in layer_faults("head", nn.Linear(60, 32)):
        ...     print(fault)
        'head': is torch.float32; the kernels take float16, bfloat16, int8
        'head': has more than two of four weights that are not zero, in 480 of 480 places
        'head': is on cpu; move the model to a CUDA device first
    """
    if layer is None:
        return [f"{name!r}: there is no module of this name"]
    if type(layer) is not nn.Linear:
        return [f"{name!r}: is a {type(layer).__name__}, not a Linear"]
    weight = layer.weight.detach()
    faults = []
    if weight.dtype not in MULTIPLES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in MULTIPLES)
        faults.append(f"is {weight.dtype}; the kernels take {kinds}")
    else:
        multiples = MULTIPLES[weight.dtype]
        if any(size % multiple for size, multiple in zip(weight.shape, multiples, strict=True)):
            faults.append(
                f"has a weight of {tuple(weight.shape)}; for {weight.dtype} (D_out, D_in) have to "
                f"be multiples of {multiples}"
            )
    if weight.shape[1] % 4:
        faults.append(f"has {weight.shape[1]} inputs, which is no multiple of 4")
    else:
        counts = _in_fours(weight)
        if wrong := int((counts > 2).sum()):
            faults.append(
                f"has more than two of four weights that are not zero, in {wrong} of "
                f"{counts.numel()} places"
            )
    faults += _device_faults(weight.device)
    return [f"{name!r}: {fault}" for fault in faults]


def _device_faults(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"is on {device}; move the model to a CUDA device first"]
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return [
            f"is on {torch.cuda.get_device_name(device)} of compute capability {capability}; "
            f"sparse tensor cores begin with {CAPABILITY}"
        ]
    return []


def _two_of_four_layers(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the linear layers with at least two zeros in each four inputs."""
    return [
        name
        for name, module in modules.items()
        if type(module) is nn.Linear
        and module.weight.numel()
        and not module.weight.shape[1] % 4
        and bool((_in_fours(module.weight.detach()) <= 2).all())
    ]


def _in_fours(weight: Tensor) -> Tensor:
    """Return how many of each four consecutive weights of a row are not zero."""
    return (weight != 0).reshape(len(weight), -1, 4).sum(2)
